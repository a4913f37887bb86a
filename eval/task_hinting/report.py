"""The report of a task hinting run: table, claims, figures and samples, from what every arm and seed has measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...files import is_main_process
from ..figures import loss_curves
from ..report import RunFolder, results_table, wide_console
from ..results import Records, sample_lines, screen_rows, show_verdicts, table
from ..results import read_records as read_all
from .figures import by_length, error_kinds, probe_scores
from .summary import COLLATERAL, STANDARD, Results, bounded, claims


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
    standard = results.label(STANDARD) if STANDARD in results.arms else next(iter(arms))
    run.update(
        metrics={
            "before": arms.pop(standard),
            "others": arms,
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
    )
    run.samples(sample_lines(records))
    curves = {results.label(arm): [results.curve(seed, arm) for seed in results.seeds] for arm in results.arms}
    title = "Right throughout, mean and range over seeds" if len(results.seeds) > 1 else "Right throughout"
    by_length(curves, results.longest, run.figure("accuracy"), title=title, label="right throughout (%)")
    looks = {results.label(arm): [results.looks(seed, arm) for seed in results.seeds] for arm in results.arms}
    if all(found for seeds in looks.values() for found in seeds):
        title = "Attention on the numbers that may come next, of the head with most of it"
        by_length(looks, results.longest, run.figure("attention"), title=title, label="attention mass (%)")
    if probes:
        title = "What a linear probe of the last layer finds as the next number is said"
        probe_scores(probes, results.longest, run.figure("probes"), title=title)
    kinds = {results.label(arm): {n: results.errors(arm, n) for n in results.lengths} for arm in results.arms}
    error_kinds(kinds, run.figure("errors"), title="Kind of the first error")
    _draw_losses(run, results)
    run.update()  # the card lists the figures


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
    console = wide_console()
    console.print(
        f"In training up to {results.longest} items. 'under': the first length tested where a seed is below."
    )
    if tokens := results.prompt_tokens():
        console.print("Prompts in tokens: " + ", ".join(f"{n} items {tokens[n]:.0f}" for n in results.lengths))
    show_verdicts(console, run.results, "standard")
    console.print(f"Results, figures, samples and models: {run.path}")


def _draw_losses(run: RunFolder, results: Results) -> None:
    """Of the first seed: the loss of each task, of the arms with the usual softmax."""
    seed = results.seeds[0]
    curves: dict[str, list[tuple[float, float]]] = {}
    for arm in results.arms:
        if "softmax" in arm[0]:
            continue
        record = results.draws(seed, arm)[0]
        for entry in record.get("log", []):
            for key, value in entry.items():
                if key.startswith("loss/"):
                    curves.setdefault(f"{arm[0]}: {key[5:]}", []).append((entry["step"], value))
    if curves:
        loss_curves(curves, run.figure(f"loss_seed_{seed}"), title=f"Training loss of each task, seed {seed}")
