"""Figures of an aTLAS run, from data to PNG files: coefficients, disentanglement, alpha search, data efficiency."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import ArrayLike

from ..figures import COLOURS, INK, save, style
from ..statistics import Metric

_LAYER = re.compile(r"^(?:(.*?)\.)?(\d+)(?:\.(.+))?$")


def layer_and_kind(blocks: Sequence[str]) -> tuple[list[tuple[int | None, str]], list[str]]:
    """Of every block its layer (None: outside of the layers) and kind, and all kinds in their order in the model.

    A kind is what stands behind the layer's number (`self_attn.q_proj.weight`), with what stands in front of it where
    the model has several stacks of layers.
    """
    parts = [_LAYER.match(block) for block in blocks]
    stacks = {part.group(1) for part in parts if part}
    found: list[tuple[int | None, str]] = []
    for block, part in zip(blocks, parts, strict=True):
        if part is None:
            found.append((None, block))
        else:
            stack, layer, rest = part.groups(default="")
            kind = (rest or stack) if len(stacks) == 1 else ".".join([stack, "*", *([rest] if rest else [])])
            found.append((int(layer), kind))
    return found, list(dict.fromkeys(kind for _, kind in found))


def coefficients_map(
    coefficients: ArrayLike, blocks: Sequence[str], vectors: Sequence[str], path: Path, *, title: str
) -> None:
    """Coefficients ``[vectors, blocks]``: their mean over vectors by layer and kind; below, a row a vector."""
    grid = np.asarray(coefficients, dtype=np.float64)
    if grid.shape != (len(vectors), len(blocks)) or not grid.size or not np.isfinite(grid).all():
        raise ValueError(
            f"coefficients must be finite and [{len(vectors)} vectors, {len(blocks)} blocks], got shape {grid.shape}"
        )
    places, kinds = layer_and_kind(blocks)
    layers = sorted({layer for layer, _ in places if layer is not None})
    columns: list[int | None] = [*layers, *([None] if any(layer is None for layer, _ in places) else [])]
    mean = np.full((len(kinds), len(columns)), np.nan)
    for (layer, kind), value in zip(places, grid.mean(0), strict=True):
        mean[kinds.index(kind), columns.index(layer)] = value
    # By kind, then by layer: neighbours are the same weight in the next layer. What is in no layer comes last.
    order = sorted(range(len(blocks)), key=lambda j: (places[j][0] is None, kinds.index(places[j][1]), places[j][0]))
    groups = ["no layer" if places[j][0] is None else places[j][1].removesuffix(".weight") for j in order]
    starts = [at for at, group in enumerate(groups) if at == 0 or group != groups[at - 1]]

    cell = 0.24
    heights = [len(kinds) * cell, max(len(vectors), 4) * cell]
    size = (min(16.0, max(7.0, 2.6 + max(len(columns) * cell, 0.1 * len(blocks)))), sum(heights) + 2.9)
    figure = Figure(figsize=size, layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=heights)
    _diverging(figure, top, mean, f"{title}: mean over vectors")
    top.set_yticks(range(len(kinds)), [kind.removesuffix(".weight") for kind in kinds])
    top.set_xticks(range(len(columns)), ["no layer" if layer is None else str(layer) for layer in columns])
    top.set_xlabel("layer")
    _diverging(figure, bottom, grid[:, order], "each vector (in each kind, the layers from first to last)")
    bottom.set_yticks(range(len(vectors)), vectors)
    bottom.set_xticks(starts, [groups[at] for at in starts])
    bottom.tick_params(axis="x", labelrotation=90, labelsize=8)
    for at in starts[1:]:
        bottom.axvline(at - 0.5, color=INK, linewidth=0.6)
    save(figure, path)


def disentanglement_map(matrix: ArrayLike, tasks: Sequence[str], path: Path, *, title: str) -> None:
    """Shares ``[tasks, tasks]`` of the row's predictions that change as the column's vector is added, in per cent."""
    grid = 100 * np.asarray(matrix, dtype=np.float64)
    if grid.shape != (len(tasks), len(tasks)) or not np.isfinite(grid).all() or grid.min() < 0 or grid.max() > 100:
        raise ValueError(f"shares must be [{len(tasks)}, {len(tasks)}] and in [0, 1], got shape {grid.shape}")
    np.fill_diagonal(grid, np.nan)
    side = 0.48 * len(tasks)
    figure = Figure(figsize=(side + 2.4, side + 1.5), layout="constrained")
    axes = figure.add_subplot()
    top = max(float(np.nanmax(grid, initial=0.0)), 1.0)
    image = axes.imshow(grid, cmap="Blues", vmin=0, vmax=top)
    for i, j in np.argwhere(np.isfinite(grid)):
        colour = "white" if grid[i, j] > 0.6 * top else INK
        axes.text(j, i, f"{grid[i, j]:.0f}", ha="center", va="center", fontsize=8, color=colour)
    style(axes, title)
    axes.set(xlabel="vector added", ylabel="task, with its own vector")
    axes.set_xticks(range(len(tasks)), tasks, rotation=90)
    axes.set_yticks(range(len(tasks)), tasks)
    _scale(figure, axes, image, "predictions that change (%)")
    save(figure, path)


def alpha_curve(
    curves: Sequence[Sequence[tuple[float, float]]], learned: Mapping[str, Sequence[float]], path: Path, *, title: str
) -> None:
    """Accuracy against alpha, one line of (alpha, accuracy) a seed and their mean; learned ones as level lines.

    ``learned``: method -> accuracy under each seed, on the same rows as the curves.
    """
    if not curves or not all(curves) or len({tuple(alpha for alpha, _ in curve) for curve in curves}) > 1:
        raise ValueError("give at least one curve of (alpha, accuracy), all at the same alphas")
    figure = Figure(figsize=(6.8, 3.8), layout="constrained")
    axes = figure.add_subplot()
    alphas = [alpha for alpha, _ in curves[0]]
    values = 100 * np.array([[value for _, value in curve] for curve in curves])
    if len(curves) > 1:
        for curve in values:
            axes.plot(alphas, curve, color=COLOURS[0], linewidth=0.8, alpha=0.45)
    axes.plot(alphas, values.mean(0), color=COLOURS[0], linewidth=2, label="one alpha for all")
    for number, (name, each) in enumerate(learned.items(), 1):
        colour = COLOURS[number % len(COLOURS)]
        axes.axhline(100 * float(np.mean(each)), color=colour, linewidth=2, linestyle="--", label=name)
        if len(each) > 1:
            axes.axhspan(100 * min(each), 100 * max(each), color=colour, alpha=0.15, linewidth=0)
    style(axes, title)
    axes.set(xlabel="alpha", ylabel="accuracy (%)", ylim=(0, 102), xlim=(min(alphas), max(alphas)))
    _lines(axes, "thin: single seeds; band: range over seeds" if len(curves) > 1 else "")
    save(figure, path)


def data_curve(lines: Mapping[str, Mapping[int, Metric]], path: Path, *, title: str) -> None:
    """Accuracy with its interval against the rows a task that were fitted on, ``lines[method][rows]``."""
    sizes = sorted({n for points in lines.values() for n in points})
    if not sizes or sizes[0] < 1:
        raise ValueError(f"give at least one method with at least one number of rows above 0, got {sizes}")
    figure = Figure(figsize=(6.8, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(lines.items()):
        rows = sorted(points)
        values = np.array([points[n]["value"] for n in rows])
        spread = np.array(
            [[point["value"] if point[end] is None else point[end] for end in ("low", "high")]
             for point in (dict(points[n]) for n in rows)], dtype=np.float64,
        )  # fmt: skip
        shift = 1.03 ** (number - (len(lines) - 1) / 2)  # so that intervals do not cover each other
        colour = COLOURS[number % len(COLOURS)]
        axes.errorbar(
            np.array(rows) * shift, 100 * values, yerr=100 * np.abs(spread.T - values), label=name, color=colour,
            linewidth=1.7, marker="o", markersize=4, capsize=2, elinewidth=1,
        )  # fmt: skip
    style(axes, title)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(n) for n in sizes])
    axes.set(xlabel="rows a task", ylabel="accuracy (%)")
    _lines(axes, "")
    save(figure, path)


def _diverging(figure: Figure, axes: Axes, grid: np.ndarray, title: str) -> None:
    """A heat map around 0. A few extreme cells (the final norm, a temperature) would leave the others pale."""
    sizes = np.abs(grid[np.isfinite(grid)])
    top = float(min(sizes.max(), 1.5 * np.quantile(sizes, 0.95))) or 1.0
    image = axes.imshow(grid, cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto", interpolation="nearest")
    axes.set_facecolor("#f2f2f2")
    style(axes, title)
    _scale(figure, axes, image, "coefficient", "both" if sizes.max() > top else "neither")


def _scale(figure: Figure, axes: Axes, image: AxesImage, label: str, extend: str = "neither") -> None:
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05, extend=extend)
    bar.set_label(label, color=INK, fontsize=9)
    bar.ax.tick_params(colors=INK, labelsize=8)


def _lines(axes: Axes, note: str) -> None:
    axes.grid(color="#d9d9d9", linewidth=0.7)
    axes.legend(frameon=False, fontsize=9, title=note or None, title_fontsize=8, alignment="left")
