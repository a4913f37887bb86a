"""Figures of a task hinting run: accuracy against length, losses of tasks, kinds of errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..figures import COLOURS, GRID, INK, save, style

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
    figure = Figure(figsize=(8.4, 5.6), layout="constrained")
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
    figure.legend(frameon=False, fontsize=7, loc="outside lower left", ncols=2, handlelength=3.5)  # dashes take room
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
    for axes in list(panels.flat)[: len(shares)][-columns:]:  # the last of each column, above hidden ones too
        axes.xaxis.set_tick_params(labelbottom=True)
        axes.set_xlabel("items")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.legend(handles, kinds, frameon=False, fontsize=8, loc="outside lower left", ncols=5)
    save(figure, path)


def probe_scores(
    found: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]], longest: int, path: Path, *, title: str
) -> None:
    """Scores of linear probes by length, a panel a probe and an arm's colour: `found[arm][probe][length][layer]`, of
    the last layer a thick line and of the others, with the embedding, thinner ones."""
    names = list(dict.fromkeys(name for probes in found.values() for name in probes))
    if not names:
        raise ValueError("no probes to draw")
    figure = Figure(figsize=(2.6 * len(names) + 0.6, 3.4), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False, sharex=True)
    for axes, name in zip(panels.flat, names, strict=True):
        for number, (arm, probes) in enumerate(found.items()):
            if name not in probes:
                continue
            lengths = sorted(probes[name])
            layers = np.array([probes[name][n] for n in lengths]).T
            for layer, values in enumerate(layers):
                last = layer == len(layers) - 1
                axes.plot(lengths, values, color=COLOURS[number % len(COLOURS)], label=arm if last else None,
                          linewidth=1.8 if last else 0.5 + 0.5 * layer / len(layers),
                          marker="o" if last else None, markersize=3)  # fmt: skip
        axes.axvspan(0, longest, color="#eeeeee", zorder=0)
        style(axes, name)
        axes.grid(color=GRID, linewidth=0.7)
        axes.set(xlabel="items", xlim=(0, None))
        axes.set_ylabel("R²" if name == "rank" else "share right")
        if name == "rank":
            axes.set_ylim(bottom=max(-1.0, axes.get_ylim()[0]))  # worse than the mean: how much says nothing
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower left", ncols=2)
    save(figure, path)


def attention_heads(found: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], path: Path, *, title: str) -> None:
    """Attention mass on each kind of token of each head, a panel an arm: `found[arm][kind][layer][head]`."""
    if not found:
        raise ValueError("no arms to draw")
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    masses = {arm: {kind: np.array(mass) for kind, mass in kinds.items()} for arm, kinds in found.items()}
    layers, heads = next(iter(next(iter(masses.values())).values())).shape
    figure = Figure(figsize=(columns * (1.2 + 0.36 * layers * heads) + 0.8, 2.3 * lines + 0.5), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes in panels.flat[len(found) :]:
        axes.set_visible(False)
    for axes, (arm, kinds) in zip(panels.flat, masses.items(), strict=False):
        values = np.array([mass.reshape(-1) for mass in kinds.values()])
        axes.imshow(values, cmap="Greens", vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7,
                      color="white" if value > 0.6 else INK)  # fmt: skip
        style(axes, fill(arm, 12 + 5 * layers * heads))
        axes.title.set_fontsize(8)
        axes.set_yticks(range(len(kinds)), list(kinds))
        names = [f"{layer + 1}.{head + 1}" for layer in range(layers) for head in range(heads)]
        axes.set_xticks(range(layers * heads), names)
        axes.set_xlabel("layer.head", fontsize=8)
        axes.tick_params(length=0, labelsize=8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    save(figure, path)


def task_losses(
    curves: Mapping[str, Mapping[str, Sequence[Sequence[tuple[float, float]]]]], path: Path, *, title: str
) -> None:
    """Training losses, a panel a task and a line an arm, the mean over seeds in a band from the lowest to the highest:
    `curves[task][arm][seed]`, points (step, loss). Steps that not all seeds have logged are left out."""
    if not curves:
        raise ValueError("no losses to draw")
    arms = list(dict.fromkeys(arm for found in curves.values() for arm in found))
    figure = Figure(figsize=(3.4 * len(curves) + 0.6, 4.2), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False, sharex=True, sharey=True)
    for axes, (task, found) in zip(panels.flat, curves.items(), strict=True):
        for arm, seeds in found.items():
            each = [dict(points) for points in seeds]
            steps = sorted(set.intersection(*(set(points) for points in each)))
            values = np.array([[points[step] for step in steps] for points in each])
            colour, line = COLOURS[arms.index(arm) % len(COLOURS)], "-" if arms.index(arm) < len(COLOURS) else "--"
            axes.plot(steps, values.mean(0), line, color=colour, linewidth=1.6, label=arm,
                      marker="o" if len(steps) < 3 else None, markersize=3)  # fmt: skip
            if len(seeds) > 1:
                axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0)
        style(axes, task)
        axes.grid(color=GRID, linewidth=0.7)
        axes.set(xlabel="step", yscale="log")
    panels.flat[0].set_ylabel("nats per token")
    handles = {
        label: handle for axes in panels.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.legend([handles[arm] for arm in arms], arms, frameon=False, fontsize=8, loc="outside lower left", ncols=2,
                  handlelength=3)  # fmt: skip
    save(figure, path)
