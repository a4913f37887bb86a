"""Figures of a self-interpretability run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..figures import COLOURS, GRID, INK, save, style


def scatter(pairs: Mapping[str, Sequence[tuple[Any, Any]]], path: Path, *, title: str) -> None:
    """Reported against learned weights, a panel each; of every seed the points, `(reported, learned)` [contexts,
    attributes], in a colour of its own, with the least-squares line."""
    if not pairs:
        raise ValueError("no weights to draw")
    figure = Figure(figsize=(3.3 * len(pairs) + 0.5, 3.7), layout="constrained")
    panels = figure.subplots(1, len(pairs), squeeze=False, sharex=True, sharey=True)
    for axes, (name, seeds) in zip(panels.flat, pairs.items(), strict=True):
        for number, (reported, learned) in enumerate(seeds):
            x, y = np.ravel(learned), np.ravel(reported)
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(x, y, ".", color=colour, markersize=3, alpha=0.35)
            if np.ptp(x) > 0:
                slope, offset = np.polyfit(x, y, 1)
                ends = np.array([-100.0, 100.0])
                axes.plot(ends, slope * ends + offset, color=colour, linewidth=1.6)
        axes.plot([-100, 100], [-100, 100], color="#999999", linewidth=0.8, linestyle=":")
        style(axes, name)
        axes.title.set_fontsize(9)
        axes.grid(color=GRID, linewidth=0.7)
        axes.set(xlabel="learned weight", xlim=(-110, 110), ylim=(-110, 110))
    panels.flat[0].set_ylabel("reported weight")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    save(figure, path)


def validity_table(counts: Mapping[str, Mapping[str, int]], path: Path) -> None:
    """A table as a figure: of each stage, how many replies were written freely and how many are valid reports."""
    figure = Figure(figsize=(6.4, 0.8 + 0.27 * max(1, len(counts))), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_title("Valid reports among replies written freely", loc="left", fontsize=11, color=INK)
    cells = [
        [name, f"{one['replies']:,}", f"{one['valid']:,}", f"{100 * one['valid'] / one['replies']:.1f} %"]
        for name, one in counts.items()
    ]
    if cells:
        titles = ["", "replies", "valid", "share"]
        table = axes.table(
            cells, colLabels=titles, colWidths=[0.62, 0.13, 0.13, 0.12], loc="center", edges="horizontal"
        )
        table.auto_set_font_size(False)
        table.set_fontsize(9)
        table.scale(1.0, 1.25)
        for (_, column), cell in table.get_celld().items():
            cell.set_edgecolor(GRID)
            cell.PAD = 0.03
            cell.get_text().set_color(INK)
            cell.get_text().set_horizontalalignment("right" if column else "left")
    save(figure, path)
