"""The map of head scores, from data to a PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from ..figures import INK, save, style

MARK = "#d1495b"


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
    style(axes, f"{title} ({len(selected)} of {layers * heads} selected, framed)")
    axes.set(xlabel="head", ylabel="layer")
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(10, integer=True))
    scale = axes.inset_axes((1.0 + 0.25 / (heads * cell), 0, 0.16 / (heads * cell), 1))  # as high as the map
    figure.colorbar(image, cax=scale).set_label("score", color=INK)
    scale.tick_params(colors=INK, labelsize=9)
    save(figure, path)
