"""Figures of a task hinting run: accuracy against length, losses of tasks, kinds of errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..figures import COLOURS, GRID, save, style

AT_TEST = ", softmax at test"  # how labels of models end that have it for the test only


def by_length(
    curves: Mapping[str, Sequence[Mapping[int, float]]], longest: int, path: Path, *, title: str, label: str
) -> None:
    """A line an arm, the mean over seeds, in a band from the lowest to the highest seed; `curves[arm][seed][length]`.

    What ends in `AT_TEST` has the colour of the arm without that, and dashes. The lengths of training, up to
    `longest`, are shaded.
    """
    if not curves:
        raise ValueError("no curves to draw; give at least one arm")
    figure = Figure(figsize=(7.2, 5.6), layout="constrained")
    axes = figure.add_subplot()
    arms = list(dict.fromkeys(name.removesuffix(AT_TEST) for name in curves))
    for name, seeds in curves.items():
        number, line = arms.index(name.removesuffix(AT_TEST)), "--" if name.endswith(AT_TEST) else "-"
        lengths = sorted(seeds[0])
        values = 100 * np.array([[curve[n] for n in lengths] for curve in seeds])
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(lengths, values.mean(0), line, color=colour, linewidth=1.8, label=name, marker="o", markersize=3)
        if len(seeds) > 1:
            axes.fill_between(lengths, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0)
    axes.axvspan(0, longest, color="#eeeeee", zorder=0)
    axes.annotate("in training", (longest, 2), (-4, 0), textcoords="offset points", ha="right", fontsize=8)
    style(axes, title)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set(xlabel="items", ylabel=label, ylim=(-2, 102), xlim=(0, None))
    figure.legend(frameon=False, fontsize=8, loc="outside lower left", ncols=2)
    save(figure, path)


def error_kinds(shares: Mapping[str, Mapping[int, Mapping[str, float]]], path: Path, *, title: str) -> None:
    """Stacked bars of the first error's kind, one panel an arm: `shares[arm][length][kind]`, of all rows."""
    if not shares:
        raise ValueError("no arms to draw")
    columns = min(3, len(shares))
    lines = -(-len(shares) // columns)
    figure = Figure(figsize=(3.1 * columns + 1.4, 2.3 * lines + 0.6), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes in panels.flat[len(shares) :]:
        axes.set_visible(False)
    each = [kind for found in shares.values() for at in found.values() for kind, share in at.items() if share]
    kinds = [kind for kind in next(iter(next(iter(shares.values())).values())) if kind in each]
    handles: list[Rectangle] = []
    for axes, (name, found) in zip(panels.flat, shares.items(), strict=False):
        lengths = sorted(found)
        floor = np.zeros(len(lengths))
        handles = []
        for number, kind in enumerate(kinds):
            values = 100 * np.array([found[n][kind] for n in lengths])
            places = range(len(lengths))
            axes.bar(places, values, 0.8, bottom=floor, color=COLOURS[number])
            handles.append(Rectangle((0, 0), 1, 1, color=COLOURS[number]))
            floor += values
        style(axes, fill(name, 34))
        axes.title.set_fontsize(8)
        axes.set_xticks(range(len(lengths)), [str(n) for n in lengths])
        axes.set(ylim=(0, 100))
    for axes in panels[:, 0]:
        axes.set_ylabel("wrong (%)")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.legend(handles, kinds, frameon=False, fontsize=8, loc="outside lower left", ncols=5)
    save(figure, path)


def probe_scores(
    found: Mapping[str, Mapping[str, Mapping[int, float]]], longest: int, path: Path, *, title: str
) -> None:
    """Scores of linear probes by length, a panel a probe and a line an arm: `found[arm][probe][length]`."""
    names = list(dict.fromkeys(name for probes in found.values() for name in probes))
    if not names:
        raise ValueError("no probes to draw")
    figure = Figure(figsize=(2.6 * len(names) + 0.6, 3.4), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False, sharex=True)
    for axes, name in zip(panels.flat, names, strict=True):
        for number, (arm, probes) in enumerate(found.items()):
            if name in probes:
                lengths = sorted(probes[name])
                axes.plot(lengths, [probes[name][n] for n in lengths], color=COLOURS[number % len(COLOURS)],
                          linewidth=1.8, marker="o", markersize=3, label=arm)  # fmt: skip
        axes.axvspan(0, longest, color="#eeeeee", zorder=0)
        style(axes, name)
        axes.grid(color=GRID, linewidth=0.7)
        axes.set(xlabel="items", xlim=(0, None))
        axes.set_ylabel("R²" if name == "rank" else "share right")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower left", ncols=2)
    save(figure, path)
