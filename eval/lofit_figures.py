"""Figures of the LoFiT row: heads map, bars with intervals, loss curves. Plain functions from data to a PNG file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from ..files import replacing
from .statistics import Metric

INK, GRID, MARK = "#222222", "#d9d9d9", "#d1495b"
COLOURS = ("#00798c", "#edae49", "#66717e", "#d1495b", "#6b4e9b", "#4f9d69")


def heads_map(scores: ArrayLike, selected: Sequence[tuple[int, int]], path: Path, *, title: str) -> None:
    """Scores ``[layers, heads]`` as a map, the selected (layer, head) pairs framed. Layer 0 lies at the bottom."""
    grid = np.asarray(scores, dtype=np.float64)
    if grid.ndim != 2 or grid.size == 0 or not np.isfinite(grid).all() or grid.min() < 0:
        raise ValueError(f"scores must be finite, non-negative and [layers, heads], got shape {grid.shape}")
    layers, heads = grid.shape
    for layer, head in selected:
        if not (0 <= layer < layers and 0 <= head < heads):
            raise ValueError(f"head {(layer, head)} is outside the {layers} x {heads} map")
    cell = min(0.42, max(0.2, 9 / max(layers, heads)))
    figure = Figure(figsize=(max(4.2, heads * cell + 1.7), max(2.2, layers * cell + 1.0)), layout="constrained")
    axes = figure.add_subplot()
    # Strong L1 leaves scores that span orders of magnitude (noise and learned heads); else a linear scale is clearer.
    typical, top = float(np.median(grid)), float(grid.max())
    norm = LogNorm(max(typical / 3, top / 1e4), top, clip=True) if 0 <= typical < top / 30 else None
    image = axes.imshow(grid, origin="lower", cmap="Blues", norm=norm, aspect="equal")
    for layer, head in selected:
        axes.add_patch(
            Rectangle(
                (head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor=MARK, linewidth=2, clip_on=False, zorder=5
            )
        )
    _style(axes, f"{title} ({len(selected)} of {layers * heads} selected, framed)")
    axes.set(xlabel="head", ylabel="layer")
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(10, integer=True))
    scale = axes.inset_axes((1.0 + 0.25 / (heads * cell), 0, 0.16 / (heads * cell), 1))  # as high as the map
    figure.colorbar(image, cax=scale).set_label("score", color=INK)
    scale.tick_params(colors=INK, labelsize=9)
    _save(figure, path)


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
    _style(axes, title)
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.set(xlabel=label, xlim=(1.1 * min(ends), (1.1 * max(ends)) or 1.0), ylim=(len(groups) - 0.4, -0.6))
    axes.set_yticks(range(len(groups)), list(groups))
    axes.tick_params(axis="y", length=0)
    if len(names) > 1:
        handles = [Rectangle((0, 0), 1, 1, color=COLOURS[n % len(COLOURS)]) for n in range(len(names))]
        figure.legend(handles, names, frameon=False, ncols=len(names), loc="outside lower left", fontsize=9)
    _save(figure, path)


def loss_curves(curves: Mapping[str, Sequence[tuple[float, float]]], path: Path, *, title: str) -> None:
    """Lines of (step, loss), one for each name; a name that ends in " dev" is dashed, in the colour of its partner."""
    lengths = {name: len(points) for name, points in curves.items()}
    if not curves or not all(lengths.values()):
        raise ValueError(f"every curve needs at least one point, got {lengths}")
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    partners = list(dict.fromkeys(name.removesuffix(" dev") for name in curves))
    for name, points in curves.items():
        steps, losses = zip(*points, strict=True)
        colour = COLOURS[partners.index(name.removesuffix(" dev")) % len(COLOURS)]
        axes.plot(
            steps, losses, color=colour, linewidth=1.7, linestyle="--" if name.endswith(" dev") else "-", label=name,
            marker="o" if len(points) < 3 else None, markersize=4,
        )  # fmt: skip
    _style(axes, title)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set(xlabel="step", ylabel="loss")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def _style(axes: Axes, title: str) -> None:
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


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=160, metadata={"Software": None})
