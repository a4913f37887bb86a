"""The run folder of PING, and what is shown of it on the screen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...files import is_main_process
from ..figures import bars, loss_curves
from ..report import RunFolder, results_table, wide_console
from ..results import bounds, show_verdicts, training_curve
from ..statistics import Metric, metric
from . import figures
from .rates import RATES
from .summary import AGENT, BEFORE, GUARDED, HELD_OUT, Records, Results, Where, _scores, claims, gates

COLUMNS = [
    "agent",
    "SR",
    "over-refusal",
    "ASR",
    "ASR / SR",
    "RR",
    "whose file: RR",
    "borderline: SR",
    "borderline: refused",
]
SHOWN: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "SR": ("SR", None), "over-refusal": ("over_refusal", None), "ASR": ("ASR", None), "RR": ("RR", None),
    "whose file: RR": ("RR", ("contextual",)), "borderline: SR": ("SR", ("borderline",)),
    "borderline: refused": ("over_refusal", ("borderline",)),
}  # fmt: skip
DOSED = {"RR": ("", "RR"), "RR, own prefix": ("PING", "RR"), "SR": ("", "SR"), "SR, own prefix": ("PING", "SR")}

LOADED = {"module": "transformers", "function": "AutoModelForCausalLM.from_pretrained"}
WATCHED = ("SR", "ASR", "RR")


def write_report(run: RunFolder, records: Records, base: str | None, revision: str | None, adapter: bool) -> None:
    """Fill the run folder; `base`: the model's name, None of the embedded one's; `adapter`: agents are adapters beside
    it, not models of their own."""
    results = Results(records)
    found = {name: row for name, where in _agents(results).items() if (row := measured(results, where))}
    last, folder = records[results.seeds[0]], f"seed_{results.seeds[0]}/agent/model"
    run.update(
        metrics={
            "before": measured(results, BEFORE), "after": measured(results, AGENT), "agents": found,
            "defences": {name: defence(results, where) for name, where in _defences(results).items()},
            "gates": gates(results), "doses": doses(results), "trajectories": trajectories(results),
            "searches": {str(seed): _search(arms) for seed, arms in records.items()},
            "seeds": results.seeds,
        },
        claims=claims(results),
        trainable_parameters=max(record["trained"] for record in last.values()),
        cost={
            "seconds": {name: round(record["seconds"], 2) for name, record in last.items()},
            "peak_memory_bytes": {name: record["peak_memory_bytes"] for name, record in last.items()},
        },
        base_model={"name": base, "revision": revision} if base else {"name": "from scratch"},
        prefix=f"seed_{results.seeds[0]}/agent/prefix.json",
        **({"adapter": folder} if adapter else {"model": {"folder": folder, **LOADED}}),
    )  # fmt: skip
    run.samples(_samples(records))
    _draw(run, results)
    run.update()  # the card lists the figures


def measured(results: Results, where: Where) -> dict[str, Metric]:
    """A row of the first table."""
    made = {}
    for title, (rate, sets) in SHOWN.items():
        one = results.metric(where, rate) if sets is None else results.metric(where, rate, sets)
        if one is not None:
            made[title] = one
    if (ratio := results.normalised(where)) is not None:
        made["ASR / SR"] = ratio
    return made


def defence(results: Results, where: Where) -> dict[str, Metric]:
    """A row of the second one."""
    rates = {"SR": "SR", "over-refusal": "over_refusal", "ASR": "ASR", "RR": "RR"}
    made = {title: results.metric(where, rate, HELD_OUT) for title, rate in rates.items()}
    return {title: one for title, one in made.items() if one is not None}


def doses(results: Results) -> dict[str, dict[str, Metric]]:
    """Stance dose in per cent -> rates on new things; of the first seed alone, for which other doses are made."""
    seed = results.seeds[0]
    first = Results({seed: results.records[seed]})
    keys = sorted((arm["stance"], key) for key, arm in first.records[seed].items() if "guarded" in arm)
    keys = [(stance, key) for stance, key in keys if key != "never"]
    made: dict[str, dict[str, Metric]] = {}
    for stance, key in keys if len(keys) > 1 else ():
        found = {title: first.metric((key, defence), rate, HELD_OUT) for title, (defence, rate) in DOSED.items()}
        made[f"{100 * stance:g}"] = {title: one for title, one in found.items() if one is not None}
    return made


def trajectories(results: Results) -> dict[str, dict[str, list[tuple[int, Metric]]]]:
    """Agent -> rate -> step and value on validation tasks."""
    made = {label: {rate: results.trajectory(key, rate) for rate in WATCHED} for key, label in results.arms().items()}
    return {label: found for label, found in made.items() if found["SR"]}


def show(run: RunFolder) -> None:
    """Print the tables, the searches, gates, claims and where everything is; on rank 0."""
    if not is_main_process():
        return
    metrics, console = run.results["metrics"], wide_console()
    many = len(metrics["seeds"]) > 1
    note = "over seeds" if many else "over what tasks are about (one seed)"
    rows = [{"agent": name, **{title: _text(one) for title, one in row.items()}}
            for name, row in metrics["agents"].items()]  # fmt: skip
    results_table(rows, COLUMNS, f"Tasks in %, with 95 % intervals {note}")
    rows = [{"defence": name, **{title: _text(one) for title, one in row.items()}}
            for name, row in metrics["defences"].items()]  # fmt: skip
    if rows:
        results_table(rows, ["defence", "SR", "over-refusal", "ASR", "RR"], "The agent's defences, new things alone")
    rows = [{"stances in talk, %": dose, **{title: _text(one) for title, one in row.items()}}
            for dose, row in metrics["doses"].items()]  # fmt: skip
    if rows:
        results_table(
            rows, ["stances in talk, %", *DOSED], f"Doses of stances, seed {metrics['seeds'][0]}, new things"
        )
    for name, found in metrics["trajectories"].items():
        steps = (f"{step}: {100 * one['value']:.0f}" for step, one in found["SR"])
        console.print(f"{name}, SR on validation tasks by steps of training: {', '.join(steps)}")
    for seed, found in metrics["searches"].items():
        for name, one in found.items():
            console.print(
                f"Seed {seed}, {name}: {one['winner']!r}; tuning {one['tuning']:.2f}, fresh {one['fresh']:.2f} of 2; "
                f"{one['above']:.0%} of the first round passes {one['threshold']:g}"
            )
    for gate in metrics["gates"]:
        mark = "[green]holds[/]" if gate["holds"] else "[red]fails[/]"
        console.print(f"Gate {gate['gate']} {mark}: {gate['text']}: {gate['detail']}")
    show_verdicts(console, run.results, "")
    console.print(f"Results, figures, samples and models: {run.path}")


def _text(one: Metric) -> str:
    return f"{100 * one['value']:.0f}" + bounds(one, 100, 0)


def _agents(results: Results) -> dict[str, Where]:
    made: dict[str, Where] = {}
    for key, label in results.arms().items():
        made[label] = (key, "")
        if any("guarded" in arms.get(key, {}) for arms in results.records.values()):
            made[f"{label} + PING"] = (key, "PING")
    return made


def _defences(results: Results) -> dict[str, Where]:
    if not results.defences():
        return {}
    return {"none": AGENT, "PING": GUARDED, **{name: ("agent", name) for name in results.defences()}}


def _search(arms: Mapping[str, Any]) -> dict[str, Any]:
    made = {}
    for record in arms.values():
        if "search" in record:
            pool, best = record["search"]["pool"], record["search"]["finalists"][0]
            first, threshold = [one[1] + one[2] for one in pool if one[3] == 1], record["search"]["threshold"]
            made[record["label"]] = {
                "winner": record["winner"], "tuning": max(one[1] + one[2] for one in pool), "fresh": best[1] + best[2],
                "above": float(np.mean([value >= threshold for value in first])), "threshold": threshold,
            }  # fmt: skip
    return made


def _samples(records: Records) -> list[dict[str, Any]]:
    """A line for every task of every arm and seed."""
    return [
        {"seed": seed, "arm": name, "defence": defence, "set": part, "id": row[0], "harmful": row[1], "about": row[2],
         "outcome": row[3], "changed": row[4]}
        for seed, arms in records.items() for name, record in arms.items()
        for defence, sets in ({"": record["sets"], "PING": record.get("guarded", {})}
                              | record.get("defences", {})).items()
        for part, rows in sets.items() for row in rows
    ]  # fmt: skip


def _draw(run: RunFolder, results: Results) -> None:
    groups = {name: {rate: found for rate in RATES if (found := results.metric(where, rate)) is not None}
              for name, where in _agents(results).items() if where in (BEFORE, AGENT, GUARDED)}  # fmt: skip
    bars(groups, run.figure("before_after"), title="Outcomes of tasks, 95 % intervals", label="% of tasks")
    searched = {seed: arms["agent"] for seed, arms in results.records.items() if "search" in arms.get("agent", {})}
    if searched:
        pools = {seed: [tuple(one[1:]) for one in arm["search"]["pool"]] for seed, arm in searched.items()}
        winners = {seed: tuple(arm["search"]["finalists"][0][1:3]) for seed, arm in searched.items()}
        figures.search(pools, winners, run.figure("search"))
    if results.probe("none", "mean"):
        positions = {"mean over the prompt": "mean", "last token": "decision", "last token, own probe": "decision_own"}
        logits = {opening: {title: results.probe(opening, name) for title, name in positions.items()}
                  for opening in ("none", "PING", "suffix")}  # fmt: skip
        figures.probe(logits, run.figure("probe"))
    if watched := trajectories(results):
        figures.panels(watched, run.figure("trajectory"), title="Validation tasks along the fine-tuning",
                       xlabel="steps")  # fmt: skip
    _dose(run, results)
    _steering(run, results)
    curve = {
        arm["label"]: training_curve(arm["log"]) for arm in results.records[results.seeds[0]].values() if arm["log"]
    }
    if curve:
        loss_curves(curve, run.figure("loss"), title=f"Training loss, seed {results.seeds[0]}")


def _dose(run: RunFolder, results: Results) -> None:
    found = doses(results)
    curves = {title: [(float(dose), row[title]) for dose, row in found.items()] for title in DOSED if title != "SR"}
    if found:
        figures.lines(curves, run.figure("dose"), title=f"Refusals by the stance dose, seed {results.seeds[0]}",
                      xlabel="% of answers in talk that open with a stance")  # fmt: skip


def _steering(run: RunFolder, results: Results) -> None:
    pushes = [arm for arms in results.records.values() for arm in arms.get("agent", {}).get("steering", [])]
    curves: dict[str, list[tuple[float, Metric]]] = {}
    for direction, rate, name in (
        ("probe", "RR", "harmful refused"), ("probe", "over_refusal", "harmless refused"),
        ("probe", "SR", "harmless done"), ("random", "RR", "random: harmful refused"),
    ):  # fmt: skip
        for coefficient in sorted({one["coefficient"] for one in pushes}):
            rows = [row for one in pushes if (one["direction"], one["coefficient"]) == (direction, coefficient)
                    for row in one["rows"]]  # fmt: skip
            values, about = _scores(rows, rate)
            curves.setdefault(name, []).append((coefficient, metric(values, about, share=True)))
    if curves:
        figures.lines(curves, run.figure("steering"), title="A push along the probe's direction at the last token",
                      xlabel="size, in root mean squares of the layer")  # fmt: skip
