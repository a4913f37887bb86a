"""Figures of a neurofeedback run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..figures import COLOURS, GRID, INK, save, style
from ..statistics import Metric


def accuracy_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]], chance: float, path: Path) -> None:
    """A panel for each axis: accuracy over the number of examples, a line for each arm, the model's with its
    interval."""
    figure = Figure(figsize=(3.3 * len(curves) + 2.2, 3.4), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for axes, (title, curve) in zip(panels, curves.items(), strict=True):
        places = range(len(curve))
        for number, name in enumerate(curve[0]["accuracy"]):
            found = [one["accuracy"][name] for one in curve]
            colour, line = (COLOURS[number], "--") if number < len(COLOURS) else (INK, (":", "-.")[number % 2])
            axes.plot(places, [one["value"] for one in found], color=colour, label=name,
                      linestyle="-" if number == 0 else line, linewidth=2.0 if number == 0 else 1.2)  # fmt: skip
            if number == 0 and all(one["low"] is not None for one in found):
                axes.fill_between(places, [one["low"] for one in found], [one["high"] for one in found],
                                  color=colour, alpha=0.15, linewidth=0)  # fmt: skip
        axes.axhline(chance, color="#999999", linewidth=0.8)
        style(axes, title)
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.set_xticks(places, [f"{one['from']}" for one in curve])
        axes.set(xlabel="examples before", ylim=(0, 1.02))
    panels[0].set_ylabel("share of labels reported rightly")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside right upper", fontsize=8)
    save(figure, path)


def effect_sizes(effects: Mapping[str, Mapping[int, Metric]], path: Path, *, title: str) -> None:
    """Cohen's d by layer, a line for each axis, with intervals."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, found) in enumerate(effects.items()):
        shift = 0.06 * (number - (len(effects) - 1) / 2)  # intervals beside, not over each other
        places = [layer + shift for layer in found]
        values = [one["value"] for one in found.values()]
        reach = [[one["value"] - (one["low"] or 0.0) for one in found.values()],
                 [(one["high"] or 0.0) - one["value"] for one in found.values()]]  # fmt: skip
        colour = COLOURS[number % len(COLOURS)]
        axes.errorbar(places, values, yerr=reach, color=colour, marker="o", markersize=4, capsize=2, label=name)
    axes.axhline(0.0, color="#999999", linewidth=0.8)
    style(axes, title)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set(xlabel="layer", ylabel="effect size d")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside right upper")
    save(figure, path)
