"""The report of a LoFiT run: table, claims, figures and samples, from what every arm of every seed has measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...files import is_main_process
from ..figures import bars, loss_curves
from ..report import RunFolder, results_table, wide_console
from ..results import Records, sample_lines, screen_rows, show_verdicts, table, training_curve
from ..results import read_records as read_all
from .figures import heads_map
from .summary import NAMES, Results, claims, columns, comparisons, overlaps


def read_records(folder: Path, seeds: Sequence[int]) -> Records:
    """What `seed_*/*/measured.json` hold: `records[seed][arm]`, the arms in the table's order."""
    names = list(NAMES)
    return read_all(folder, seeds, lambda r: (names.index(r["name"]), -(r["k"] or 0), r["draw"]))


def write_report(run: RunFolder, records: Records, base_model: Mapping[str, Any]) -> None:
    """Fill the run folder."""
    results = Results(records)
    first = records[results.seeds[0]]
    ks = results.ks
    shown = columns(first["base"]["splits"])
    rows = table(results, shown)
    arms = {
        row["method"]: {column.title: row[column.title] for column in shown if column.title in row} for row in rows
    }
    main = results.label(("lofit", ks[0]))
    run.update(
        metrics={
            "before": arms["base"],
            "after": arms.get(main, {}),
            "baselines": {name: values for name, values in arms.items() if name not in ("base", main)},
            "head_overlap": overlaps(results),
            "paired": comparisons(results, shown[0]),
        },
        claims=claims(results, shown[0]),
        trainable_parameters={row["method"]: row["parameters"] for row in rows if row["parameters"]},
        cost={
            "seconds": {row["method"]: round(row["seconds"], 2) for row in rows if row["seconds"]},
            "tokens_per_second": {
                row["method"]: round(row["tokens_per_second"]) for row in rows if row["tokens_per_second"]
            },
            "peak_memory_bytes": {row["method"]: row["peak_memory_bytes"] for row in rows},
        },
        base_model=base_model,
        **({"adapter": f"seed_{results.seeds[0]}/lofit_k{ks[0]}"} if ("lofit", ks[0]) in results.arms else {}),
    )
    run.samples(sample_lines(records))

    numbers = {name: {c.title: v[c.title] for c in shown[:3] if c.metric == shown[0].metric and c.title in v}
               for name, v in arms.items()}  # fmt: skip
    bars(numbers, run.figure("methods"), title="Held-out questions, 95 % intervals", label=f"{shown[0].title} (%)")
    for seed in results.seeds:
        selection = run.path / f"seed_{seed}" / "selection"
        record = records[seed].get(f"lofit_k{ks[0]}")
        if record is None or not (selection / "heads.json").exists():
            continue
        scores = json.loads((selection / "heads.json").read_text())["scores"]
        grid = np.array([scores[layer] for layer in sorted(scores, key=int)])
        title = f"Norm of the learned scales, seed {seed}"
        heads_map(grid, [tuple(head) for head in record["heads"]], run.figure(f"heads_seed_{seed}"), title=title)
        stage_1 = json.loads((selection / "finished.json").read_text())["log"]
        curves = {"scales (stage 1)": training_curve(stage_1), "offsets (stage 2)": training_curve(record["log"])}
        loss_curves(curves, run.figure(f"loss_seed_{seed}"), title=f"Training loss, seed {seed}")
    run.update()  # the card lists the figures


def show(run: RunFolder) -> None:
    """Print the table, the claims and where everything is; on rank 0."""
    if not is_main_process():
        return
    results = Results(read_records(run.path, sorted(int(folder.name[5:]) for folder in run.path.glob("seed_*"))))
    shown = columns(results.records[results.seeds[0]]["base"]["splits"])
    lines = screen_rows(table(results, shown), shown)
    titles = [
        "method",
        "parameters",
        "seconds",
        "MB",
        shown[0].title,
        "each seed",
        *(column.title for column in shown[1:]),
    ]
    note = "" if len(results.seeds) > 1 else ", over questions (one seed)"
    results_table(lines, titles, f"Held-out questions, per cent, with 95 % intervals{note}")
    console = wide_console()
    show_verdicts(console, run.results, "LoFiT")
    for k, shared in run.results.get("metrics", {}).get("head_overlap", {}).items():
        console.print(
            f"Heads two selections on one base share, {k}: {shared['observed']:.1f} (chance {shared['chance']:.1f})"
        )
    console.print(f"Results, figures, samples and adapters: {run.path}")
