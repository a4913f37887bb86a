"""The report of a task hinting run: table, claims, figures and samples, from what every arm and seed has measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...files import is_main_process
from ..report import RunFolder, results_table, wide_console
from ..results import Records, bounds, sample_lines, screen_rows, show_verdicts, table
from ..results import read_records as read_all
from ..statistics import Metric
from .figures import attention_heads, by_length, error_kinds, probe_scores, task_losses
from .summary import COLLATERAL, STANDARD, UNTOUCHED, Results, bounded, claims


def read_records(folder: Path, seeds: Sequence[int]) -> Records:
    """What `seed_*/*/measured.json` hold: `records[seed][arm]`, in the table's order."""
    return read_all(folder, seeds, lambda record: record["order"])


def write_report(run: RunFolder, records: Records, base_model: Mapping[str, Any]) -> None:
    """Fill the run folder."""
    results = Results(records)
    shown = results.columns()
    rows = table(results, shown)
    names = {column.title: column.title if column is COLLATERAL else f"em/{column.title}" for column in shown}
    arms = {row["method"]: {name: row[title] for title, name in names.items() if title in row} for row in rows}
    probes = {results.label(arm): found for arm in results.arms if (found := results.probes(arm))}
    before = next((arm for arm in (UNTOUCHED, STANDARD) if arm in results.arms), next(iter(results.arms)))
    run.update(
        metrics={
            "before": arms.pop(results.label(before)),
            "others": arms,
            "tokens": {results.label(arm): results.tokens(arm) for arm in results.arms},
            "hints": {results.label(arm): own for arm in results.arms if (own := results.hints(arm))},
            "breakdown": {results.label(arm): results.breakdown(arm) for arm in results.arms},
            "errors": {
                results.label(arm): {str(n): results.errors(arm, n) for n in results.lengths} for arm in results.arms
            },
            **({"probes": probes} if probes else {}),
            **({"prompt_tokens": {str(n): tokens[n] for n in tokens}} if (tokens := results.prompt_tokens()) else {}),
            "paired": results.paired(STANDARD, [arm for arm in results.arms if arm != STANDARD], shown[0]),
        },
        claims=claims(results, bool(run.results["toy"])),
        trainable_parameters=max(row["parameters"] for row in rows),
        cost={
            "seconds": {row["method"]: round(row["seconds"], 2) for row in rows if row["seconds"]},
            "tokens_per_second": {
                row["method"]: round(row["tokens_per_second"]) for row in rows if row["tokens_per_second"]
            },
            "peak_memory_bytes": {row["method"]: row["peak_memory_bytes"] for row in rows},
        },
        base_model=base_model,
        **_to_load(run, results),
    )
    run.samples(sample_lines(records))
    _draw(run, results, probes)
    run.update()  # the card lists the figures


def _to_load(run: RunFolder, results: Results) -> dict[str, Any]:
    """The section of `results.json` that says how to load a model: the first hint's, else the first trained one's."""
    trained = [arm[0] for arm in results.arms if not arm[1] and results.draws(results.seeds[0], arm)[0]["trained"]]
    name = next((name for name in trained if name.startswith("hint_")), trained[0])
    folder = f"seed_{results.seeds[0]}/{name}/model"
    if (run.path / folder / "adapter_config.json").exists():
        return {"adapter": folder}
    return {"model": {"folder": folder, "module": "steerbook.trainers.task_hinting", "function": "load"}}


def _draw(run: RunFolder, results: Results, probes: Mapping[str, Any]) -> None:
    curves = {results.label(arm): [results.curve(seed, arm) for seed in results.seeds] for arm in results.arms}
    title = "Right throughout, mean and range over seeds" if len(results.seeds) > 1 else "Right throughout"
    by_length(curves, results.longest, run.figure("accuracy"), title=title, label="right throughout (%)")
    looks = {results.label(arm): [results.looks(seed, arm) for seed in results.seeds] for arm in results.arms}
    if all(found for seeds in looks.values() for found in seeds):
        title = "Attention on the numbers that may come next, of the head with most of it"
        by_length(looks, results.longest, run.figure("attention"), title=title, label="attention mass (%)")
        for seed in results.seeds:
            heads = {results.label(arm): results.heads(seed, arm) for arm in results.arms if not arm[1]}
            title = f"What each head looks at as the next number is said, at length {results.main_length}, seed {seed}"
            attention_heads(heads, run.figure(f"attention_heads_seed_{seed}"), title=title)
    if probes:
        title = "What a linear probe finds as the next number is said: last layer, and thinner the ones before"
        probe_scores(probes, results.longest, run.figure("probes"), title=title)
    kinds = {results.label(arm): {n: results.errors(arm, n) for n in results.lengths} for arm in results.arms}
    error_kinds(kinds, run.figure("errors"), title="Kind of the first error")
    task_losses(results.losses(), run.figure("loss"), title="Training loss of each task, mean and range over seeds")


def show(run: RunFolder) -> None:
    """Print the table, the claims and where everything is; on rank 0."""
    if not is_main_process():
        return
    results = Results(read_records(run.path, sorted(int(folder.name[5:]) for folder in run.path.glob("seed_*"))))
    shown = results.columns()
    lines = screen_rows(table(results, shown), shown)
    every, extra = f"seeds at {results.main_length}", ["area", "under 90 %", "under 50 %"]
    for line, arm in zip(lines, results.arms, strict=True):
        found = results.breakdown(arm)
        if "area" in found:
            line["area"] = bounded(100 * sum(found["area"]) / len(found["area"]))
        for level in (0.9, 0.5):
            line[f"under {100 * level:.0f} %"] = " ".join(
                "-" if n is None else str(n) for n in found[f"under_{level}"]
            )
        line[every] = line.pop("each seed", "")
    ordered = [str(n) for n in results.lengths] + [COLLATERAL.title] * (COLLATERAL in shown)
    titles = ["method", "seconds", "MB", *ordered, *([every] if len(results.seeds) > 1 else []), *extra]
    note = "" if len(results.seeds) > 1 else ", over questions (one seed)"
    results_table(
        lines, titles, f"Held-out questions of N items right throughout, per cent, with 95 % intervals{note}"
    )
    _show_tokens(results)
    console = wide_console()
    console.print(
        f"In training up to {results.longest} items. 'under': the first length tested where a seed is below."
    )
    if tokens := results.prompt_tokens():
        console.print("Prompts in tokens: " + ", ".join(f"{n} items {tokens[n]:.0f}" for n in results.lengths))
    show_verdicts(console, run.results, "standard")
    console.print(f"Results, figures, samples and models: {run.path}")


def _show_tokens(results: Results) -> None:
    """Print the shares of tokens that are right, and how the hints themselves are answered."""
    lines: list[dict[str, str]] = []

    def line(name: str, found: Mapping[str, Metric], key: str) -> None:
        metrics = {str(n): found[f"{key}/{n}"] for n in results.lengths}
        cells = {n: f"{100 * metric['value']:.1f}" + bounds(metric, 100, 0) for n, metric in metrics.items()}
        lines.append({"method": name, **cells})

    for arm in results.arms:
        line(results.label(arm), results.tokens(arm), "tokens")
        own = results.hints(arm)
        for hint in dict.fromkeys(key.split("/")[1] for key in own):
            line(f"  {hint} itself", own, f"em/{hint}")
    title = "Tokens of answers right, per cent; of hints themselves, questions right throughout"
    results_table(lines, ["method", *map(str, results.lengths)], title)
