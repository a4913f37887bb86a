"""Figures every recipe draws: bars with intervals, loss curves. Plain functions from data to a PNG file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from ..files import replacing
from .statistics import Metric

INK, GRID = "#222222", "#d9d9d9"
COLOURS = ("#00798c", "#edae49", "#66717e", "#d1495b", "#6b4e9b", "#4f9d69")


def bars(
    groups: Mapping[str, Mapping[str, Metric]], path: Path, *, title: str, label: str, scale: float = 100.0
) -> None:
    """Horizontal bars with intervals, a group a method: ``groups[method][metric]``; ``scale=100``: per cent."""
    names = list(dict.fromkeys(name for metrics in groups.values() for name in metrics))
    if not groups or not names:
        raise ValueError("no bars to draw; give at least one method with one metric")
    height = 0.82 / len(names)
    figure = Figure(figsize=(7.2, 1.2 + len(groups) * (0.16 + 0.17 * len(names))), layout="constrained")
    axes = figure.add_subplot()
    ends = [0.0]
    for number, name in enumerate(names):
        for place, metrics in enumerate(groups.values()):
            if name not in metrics:
                continue
            metric = metrics[name]
            y, value = place + (number - (len(names) - 1) / 2) * height, metric["value"] * scale
            low = value if metric["low"] is None else metric["low"] * scale
            high = value if metric["high"] is None else metric["high"] * scale
            axes.barh(y, value, height * 0.92, color=COLOURS[number % len(COLOURS)], label=name if not place else None)
            if metric["low"] is not None:
                spread = [[max(0.0, value - low)], [max(0.0, high - value)]]
                axes.errorbar(value, y, xerr=spread, color=INK, linewidth=1.0, capsize=2)
            axes.annotate(
                _short(value), (max(high, value, 0.0), y), (3, 0), textcoords="offset points", va="center", fontsize=8,
                color=INK,
            )  # fmt: skip
            ends += [low, high, value]
    style(axes, title)
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.set(xlabel=label, xlim=(1.1 * min(ends), (1.1 * max(ends)) or 1.0), ylim=(len(groups) - 0.4, -0.6))
    axes.set_yticks(range(len(groups)), list(groups))
    axes.tick_params(axis="y", length=0)
    if len(names) > 1:
        handles = [Rectangle((0, 0), 1, 1, color=COLOURS[n % len(COLOURS)]) for n in range(len(names))]
        figure.legend(handles, names, frameon=False, ncols=len(names), loc="outside lower left", fontsize=9)
    save(figure, path)


def loss_curves(curves: Mapping[str, Sequence[tuple[float, float]]], path: Path, *, title: str) -> None:
    """Lines of (step, loss), one for each name."""
    lengths = {name: len(points) for name, points in curves.items()}
    if not curves or not all(lengths.values()):
        raise ValueError(f"every curve needs at least one point, got {lengths}")
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(curves.items()):
        steps, losses = zip(*points, strict=True)
        marker = "o" if len(points) < 3 else None
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(steps, losses, color=colour, linewidth=1.7, label=name, marker=marker, markersize=4)
    style(axes, title)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set(xlabel="step", ylabel="loss")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.legend(frameon=False, fontsize=9)
    save(figure, path)


def style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")
    axes.tick_params(colors=INK, labelsize=9)


def _short(value: float) -> str:
    return (
        f"{value:.0f}"
        if abs(value) >= 9.95
        else f"{value:.1f}"
        if abs(value) >= 0.95 or value == 0
        else f"{value:.2g}"
    )


def save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=160, metadata={"Software": None})
