"""The report of an aTLAS run: tables, claims, figures and samples, from what every arm of every seed has measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ...files import is_main_process
from ..figures import bars, loss_curves
from ..report import RunFolder, results_table, wide_console
from ..results import Records, each_seed, sample_lines, screen_rows, show_verdicts, table, training_curve
from .claims import claims, crossover
from .figures import alpha_curve, coefficients_map, data_curve, disentanglement_map
from .summary import (
    ALPHA,
    ATLAS,
    ISOTROPIC,
    NAMES,
    SECTIONS,
    TUNED,
    Results,
    chosen_alphas,
    columns,
    per_task,
    read_records,
)

BASE = ("addition", "base", None)


def write_report(run: RunFolder, records: Records, base_model: Mapping[str, Any]) -> None:
    """Fill the run folder. `samples.jsonl` gets the samples of the addition; the other sections' are many, and stand
    in the records."""
    results = Results(records)
    rows = {section: table(results, columns(results, section), results.of(section)) for section in SECTIONS}
    named = {
        section: {
            f"{section}: {row['method']}" if section != "addition" else row["method"]: row for row in rows[section]
        }
        for section in SECTIONS
    }
    metrics = {
        section: {name: _metrics(results, section, row) for name, row in named[section].items()}
        for section in SECTIONS
    }
    addition = metrics.pop("addition")
    before, after = results.label(BASE), results.label(ATLAS)
    flat = {name: row for section in SECTIONS for name, row in named[section].items()}
    run.update(
        metrics={
            "before": addition.get(before, {}),
            "after": addition.get(after, {}),
            "baselines": {name: values for name, values in addition.items() if name not in (before, after)},
            **{section: values for section, values in metrics.items() if values},
            "per_task": _lists(per_task(results)),
            "alpha": {section: chosen_alphas(results, section) for section in ("addition", "negation")},
            "paired": results.paired(ATLAS, _others(results), columns(results, "addition")[0]) if addition else {},
            **({"crossover": crossover(results)} if results.sizes("data") else {}),
        },
        claims=claims(results, run.results["toy"]),
        trainable_parameters={  # the same numbers again in the other sections
            name: row["parameters"] for name, row in (named["addition"] or flat).items() if row["parameters"]
        },
        cost={
            "seconds": {name: round(row["seconds"], 2) for name, row in flat.items() if row["seconds"]},
            "tokens_per_second": {
                name: round(row["tokens_per_second"]) for name, row in flat.items() if row["tokens_per_second"]
            },
            "peak_memory_bytes": {name: row["peak_memory_bytes"] for name, row in flat.items()},
        },
        base_model=base_model,
    )  # fmt: skip
    run.samples(sample_lines({
        seed: {key: record for key, record in arms.items() if record["section"] == "addition"}
        for seed, arms in records.items()
    }))  # fmt: skip
    draw(run, results)
    run.update()  # the card lists the figures


def draw(run: RunFolder, results: Results) -> None:
    """All figures that the run has data for."""
    test = ("test", "accuracy")
    methods = {results.label(a): {"accuracy": results.metric(a, *test)} for a in results.of("addition")}
    if methods:
        bars(methods, run.figure("addition"), title="All tasks at once, 95 % intervals", label="accuracy (%)")
    if ALPHA in results.arms:
        curves = [
            [(entry["alpha"], entry["accuracy"]) for entry in results.draws(seed, ALPHA)[0]["log"]]
            for seed in results.seeds
        ]
        learned = {
            results.label(arm): [results.draws(seed, arm)[0]["dev"]["accuracy"] for seed in results.seeds]
            for arm in (ISOTROPIC, ATLAS)
            if arm in results.arms
        }
        alpha_curve(curves, learned, run.figure("alpha"), title="Accuracy on dev rows against alpha")
    lines: dict[str, dict[int, Any]] = {}
    for _, name, n in results.of("data"):
        lines.setdefault(NAMES[name], {})[n] = results.metric(("data", name, n), *test)
    if lines:
        data_curve(lines, run.figure("data"), title="Accuracy by rows to fit on, 95 % intervals")
    shots: dict[str, dict[str, Any]] = {}
    for _, name, n in results.of("fewshot"):
        if n is not None:
            shots.setdefault(NAMES[name], {})[f"{n} shots"] = results.metric(("fewshot", name, n), *test)
    if shots:
        base = ("fewshot", "base", None)
        start = f" (base: {100 * results.metric(base, *test)['value']:.0f} %)" if base in results.arms else ""
        bars(shots, run.figure("fewshot"), title=f"New tasks{start}, 95 % intervals", label="accuracy (%)")
    forgotten = {
        results.label(arm): {name: results.metric(arm, "test", name) for name in ("target", "control")}
        for arm in results.of("negation")
    }
    if forgotten:
        bars(forgotten, run.figure("negation"), title="Forgetting a task, 95 % intervals", label="accuracy (%)")
    _draw_learned(run, results)


def show(run: RunFolder) -> None:
    """Print the tables, the claims and where everything is; on rank 0."""
    if not is_main_process():
        return
    seeds = sorted(int(folder.name[5:]) for folder in run.path.glob("seed_*"))
    results = Results(read_records(run.path, seeds))
    note = "" if len(seeds) > 1 else ", over rows (one seed)"
    for section, title in SECTIONS.items():
        shown = columns(results, section)
        rows = table(results, shown, results.of(section))
        if not rows:
            continue
        lines = screen_rows(rows, shown)
        titles = ["method", "parameters", "seconds", "MB", shown[0].title, "each seed"]
        for column in shown[1:]:
            titles += [column.title]
            if column.title == "control":  # as much the point of a negation as its target
                titles += ["control, each seed"]
                for line, row in zip(lines, rows, strict=True):
                    line["control, each seed"] = each_seed(row["control"])
        results_table(lines, titles, f"{title}: held-out rows, per cent, with 95 % intervals{note}")
        if section == "addition":
            _show_tasks(results)
    console = wide_console()
    found = crossover(results)
    if found is not None:
        n = found["rows_per_task"]
        where = f"none up to {found['up_to']} rows a task" if n is None else f"{n} rows a task"
        console.print(f"Joint fine-tuning is ahead of aTLAS from: {where}")
    show_verdicts(console, run.results, "aTLAS")
    console.print(f"Results, figures, samples and coefficients: {run.path}")


def _show_tasks(results: Results) -> None:
    lines = [
        {"method": name} | {task: f"{100 * value:.0f}" for task, value in each.items()}
        for name, each in per_task(results).items()
    ]
    tasks = list(dict.fromkeys(task for line in lines for task in line if task != "method"))
    results_table(lines, ["method", *tasks], "Each task: per cent, mean over seeds")


def _lists(tasks: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """One line a method in the model card, instead of one a task and method."""
    names = list(dict.fromkeys(task for each in tasks.values() for task in each))
    return {"tasks": names} | {method: [each[task] for task in names] for method, each in tasks.items()}


def _metrics(results: Results, section: str, row: Mapping[str, Any]) -> dict[str, Any]:
    return {column.title: row[column.title] for column in columns(results, section) if column.title in row}


def _others(results: Results) -> Iterable[Any]:
    return [arm for arm in results.of("addition") if arm not in (ATLAS, TUNED)]


def _draw_learned(run: RunFolder, results: Results) -> None:
    """Coefficients, losses and disentanglement of the addition."""
    if ATLAS not in results.arms:
        return
    matrices = []
    for seed in results.seeds:
        record = results.draws(seed, ATLAS)[0]
        if record.get("coefficients"):
            coefficients_map(
                record["coefficients"], record["block_names"], record["vectors"],
                run.figure(f"coefficients_seed_{seed}"), title=f"Coefficients, seed {seed}",
            )  # fmt: skip
        found = {
            results.label(arm): training_curve(log)
            for arm in (ISOTROPIC, ATLAS)
            if arm in results.arms and (log := results.draws(seed, arm)[0]["log"])
        }
        if found and all(found.values()):
            loss_curves(found, run.figure(f"loss_seed_{seed}"), title=f"Training loss, seed {seed}")
        if record.get("disentanglement"):
            matrices.append(np.array(record["disentanglement"]))
    if matrices:
        tasks = results.draws(results.seeds[0], ATLAS)[0]["disentanglement_tasks"]
        title = "aTLAS, mean over seeds" if len(matrices) > 1 else "aTLAS"
        disentanglement_map(np.mean(matrices, axis=0), tasks, run.figure("disentanglement"), title=title)
