"""Figures of a PING run: the search, the probe by position, and refusals by the stance dose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from matplotlib.figure import Figure

from ..figures import COLOURS, GRID, INK, save, style
from ..statistics import Metric

Curve: TypeAlias = Sequence[tuple[float, Metric]]


def search(pools: Mapping[int, Sequence[tuple[float, float, int]]], winners: Mapping[int, tuple[float, float]],
           path: Path) -> None:  # fmt: skip
    """Of every seed what was scored (performance, refusal, round): darker is later; a star is the winner, scored again
    on fresh tasks."""
    figure = Figure(figsize=(3.4 * len(pools) + 0.6, 3.6), layout="constrained")
    places = figure.subplots(1, len(pools), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (seed, pool) in zip(places, pools.items(), strict=True):
        rounds = [number for _, _, number in pool]
        dots = axes.scatter([one for one, _, _ in pool], [other for _, other, _ in pool], c=rounds, cmap="viridis_r",
                            s=18, alpha=0.75, linewidths=0, vmin=0)  # fmt: skip
        axes.scatter(*winners[seed], marker="*", s=170, color=COLOURS[3], edgecolor=INK, linewidth=0.6, zorder=3)
        style(axes, f"seed {seed}")
        axes.grid(color=GRID, linewidth=0.7)
        axes.set(xlabel="harmless tasks worked on", xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))
    places[0].set_ylabel("harmful tasks refused")
    figure.colorbar(dots, ax=list(places), label="round", shrink=0.9)
    save(figure, path)


def probe(logits: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Mean logits of harmful prompts: `logits[opening][position]`, a dot a seed."""
    openings, positions = list(logits), list(next(iter(logits.values())))
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for number, position in enumerate(positions):
        for place, opening in enumerate(openings):
            values = logits[opening][position]
            x = place + (number - (len(positions) - 1) / 2) * 0.22
            axes.bar(x, sum(values) / len(values), 0.2, color=COLOURS[number], label=None if place else position)
            axes.scatter([x] * len(values), values, color=INK, s=10, zorder=3)
    style(axes, "What a probe of harm reads on harmful requests, a dot a seed")
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_xticks(range(len(openings)), openings)
    axes.set(ylabel="logit (above 0: harmful)")
    axes.legend(frameon=False, fontsize=9)
    save(figure, path)


def lines(curves: Mapping[str, Curve], path: Path, *, title: str, xlabel: str) -> None:
    """Rates in per cent with intervals along a number, a line a name."""
    panels({title: curves}, path, title="", xlabel=xlabel)


def panels(groups: Mapping[str, Mapping[str, Curve]], path: Path, *, title: str, xlabel: str) -> None:
    """The same, a panel a group; all have the same names."""
    figure = Figure(figsize=(max(6.0, 3.2 * len(groups)), 3.4), layout="constrained")
    places = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for axes, (group, curves) in zip(places, groups.items(), strict=True):
        for number, (name, points) in enumerate(curves.items()):
            x = [one for one, _ in points]
            y = [100 * metric["value"] for _, metric in points]
            low = [100 * (metric["value"] if metric["low"] is None else metric["low"]) for _, metric in points]
            high = [100 * (metric["value"] if metric["high"] is None else metric["high"]) for _, metric in points]
            axes.plot(x, y, color=COLOURS[number], marker="o", markersize=4, linewidth=1.7, label=name)
            axes.fill_between(x, low, high, color=COLOURS[number], alpha=0.15, linewidth=0)
        style(axes, group)
        axes.grid(color=GRID, linewidth=0.7)
        axes.set(xlabel=xlabel, ylim=(-3, 103))
    places[0].set_ylabel("% of tasks")
    figure.suptitle(title)
    handles, names = places[0].get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        frameon=False,
        fontsize=9,
        loc="outside lower center",
        ncols=2 if len(names) > 3 else len(names),
    )
    save(figure, path)
