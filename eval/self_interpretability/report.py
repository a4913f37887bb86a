"""The report of a self-interpretability run: table, claims and figures, from what every arm and seed has measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...files import is_main_process
from ..figures import bars, loss_curves
from ..report import RunFolder, results_table, wide_console
from ..results import bounds, show_verdicts
from .agreement import STATISTICS
from .comparisons import AFTER, HELD_OUT, NATIVE, SHUFFLED, Record, instilled_agreement, instilled_r
from .figures import scatter, validity_table
from .summary import Results, claims

SHOWN = (AFTER, HELD_OUT, NATIVE, SHUFFLED)
FEW = 0.9  # with a smaller share of valid replies, what they say is no summary of the model (spec 4.6)


def write_report(run: RunFolder, records: Mapping[int, Mapping[str, Record]], base_model: Mapping[str, Any]) -> None:
    """Fill the run folder."""
    results = Results(records)
    rows = {name: {statistic: results.metric(name, statistic) for statistic in STATISTICS} for name in results.rows}
    seeds = {name: {str(seed): {key: found["value"] for key, found in estimates.items()}
                    for seed, estimates in results.estimates(name).items()} for name in results.rows}  # fmt: skip
    arms: dict[str, Record] = dict(records[results.seeds[0]])
    run.update(
        metrics={
            "before": rows.get("base model's reports", {}),
            "after": rows.get(HELD_OUT, {}),
            "agreement": rows,
            "each_seed": seeds,
            "validity": results.validity(),
            "details": results.more(),
            "stopped": {str(seed): gates for seed in results.seeds if (gates := stopped(records[seed]))},
        },
        claims=claims(results),
        trainable_parameters=max(record["trained"] for record in arms.values()),
        cost={
            "seconds": {name: round(_seconds(records, name), 2) for name in arms},
            "peak_memory_bytes": {name: record["peak_memory_bytes"] for name, record in arms.items()},
        },
        base_model=base_model,
    )
    run.samples(_samples(records))
    _draw(run, results)
    run.update()  # the card lists the figures


def stopped(arms: Mapping[str, Record]) -> dict[str, str]:
    """Of the levels whose reports were not trained, why."""
    levels = {record["level"] for record in arms.values() if record["kind"] == "instilled"}
    going_on = {record["level"] for record in arms.values() if record["kind"] == "reported"}
    return {
        level: f"instilling did not take: learned against target r = {instilled_r(record):.2f}, and "
        f"{instilled_agreement(record):.0%} of choices as the target's"
        for level in sorted(levels - going_on)
        for record in arms.values()
        if record["kind"] == "instilled" and record["level"] == level
    }


def show(run: RunFolder) -> None:
    """Print the table, the claims and where everything is; on rank 0."""
    if not is_main_process():
        return
    metrics = run.results["metrics"]
    seeds = sorted((folder.name[5:] for folder in run.path.glob("seed_*")), key=int)
    lines = []
    for name, found in metrics["agreement"].items():
        line = {"weights": name, "contexts": f"{found['pooled_r']['n']}"}
        for statistic, metric in found.items():
            digits = 0 if statistic == "mae" else 2
            line[statistic] = f"{metric['value']:.{digits}f}" + bounds(metric, 1, digits)
        each = metrics["each_seed"][name]
        line["each seed's r"] = " ".join(f"{each[seed]['pooled_r']:.2f}" if seed in each else "–" for seed in seeds)
        if count := metrics["validity"].get(name):
            line["valid replies"] = f"{count['valid']:,}/{count['replies']:,}"
        lines.append(line)
    columns = ["weights", *STATISTICS, *(["each seed's r"] if len(seeds) > 1 else []), "contexts", "valid replies"]
    note = "over seeds" if len(seeds) > 1 else "over contexts (one seed)"
    results_table(lines, columns, f"How well weights agree, with 95 % intervals {note}")
    console = wide_console()
    for seed, details in metrics["details"].items():
        chance = details["chance"]
        probe = f"a probe reads {read:.2f}; " if (read := details.get("readable from embeddings")) is not None else ""
        console.print(
            f"Seed {seed}: by chance r = {_text(chance['other contexts'])} (other contexts), "
            f"{_text(chance['other attributes'])} (other attributes); gain {_text(details['gain'])}; "
            f"{probe}off-answer mass {details['off-answer mass']:.2g}, mass on "
            f"numbers {details['mass on numbers']:.3f}, linearity {details['linearity']:.2f}"
        )
        if crooked := details["contexts with linearity under 0.7"]:
            console.print(f"Seed {seed}: choices of {crooked} contexts are not linear (R^2 under 0.7)")
    for name, count in metrics["validity"].items():
        if count["valid"] < FEW * count["replies"]:
            share = count["valid"] / count["replies"]
            console.print(f"{name}: only {share:.0%} of replies written freely are valid; its r says what the model "
                          "would report in a given form")  # fmt: skip
    for seed, gates in metrics["stopped"].items():
        for level, reason in gates.items():
            console.print(f"Seed {seed}, {level}: {reason}; no reports were trained")
    show_verdicts(console, run.results, "")
    console.print(f"Results, figures, samples and models: {run.path}")


def _seconds(records: Mapping[int, Mapping[str, Record]], name: str) -> float:
    """Of an arm's training, the mean over the seeds that have it."""
    return float(np.mean([arms[name]["seconds"] for arms in records.values() if name in arms]))


def _text(found: Any) -> str:
    return f"{found['value']:.2f}" + bounds(found, 1, 2)


def _samples(records: Mapping[int, Mapping[str, Record]]) -> list[dict[str, Any]]:
    """A line for every context of every arm and seed."""
    return [
        {"seed": seed, "arm": name, "context": context, **one}
        for seed, arms in records.items()
        for name, record in arms.items()
        for context, one in record["contexts"].items()
    ]


def _draw(run: RunFolder, results: Results) -> None:
    pairs = {name: [row[:2] for row in results.rows[name].values()] for name in SHOWN if name in results.rows}
    if pairs:
        scatter(pairs, run.figure("reports"), title="Reported against learned weights, a colour a seed")
    if results.rows:
        validity_table(results.validity(), run.figure("validity"))
        r = {name: {"r": results.metric(name)} for name in results.rows}
        bars(r, run.figure("agreement"), title="Agreement of weights, 95 % intervals", label="Pearson's r", scale=1.0)
    seed = results.seeds[0]
    curves: dict[str, list[tuple[float, float]]] = {}
    for name in ("instilled", "reported_0", "shuffled"):
        for entry in results.records[seed].get(name, {}).get("log", []):
            for key, value in entry.items():
                if key.startswith("loss/"):
                    curves.setdefault(f"{name}: {key[5:]}", []).append((entry["step"], value))
    if curves:
        loss_curves(curves, run.figure("loss"), title=f"Training loss of each task, seed {seed}")
