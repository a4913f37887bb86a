"""How much training a comparison would be."""

from __future__ import annotations

from collections.abc import Mapping


def show_cost(arms: Mapping[str, tuple[int, int]], parameters: int, steps: int, seeds: int, adapter: bool) -> None:
    """Print a line an arm, and the sum. `arms`: name -> rows and tokens of a row, of its first step.

    6 FLOP per parameter and token (2 forward, 2 each for the gradients of activations and weights), 4 for an adapter.
    """
    each, total = 4 if adapter else 6, 0
    print(f"{'arm':<60}{'rows a step':>12}{'tokens a step':>15}{'TFLOP':>10}")
    for name, (rows, width) in arms.items():
        flop = each * parameters * rows * width * steps
        total += flop * seeds
        print(f"{name:<60}{rows:>12,}{rows * width:>15,}{flop / 1e12:>10,.3g}")
    print(f"{len(arms)} models x {seeds} seeds, {steps:,} steps each: {total / 1e12:,.3g} TFLOP "
          f"({each} per parameter and token, attention not counted)")  # fmt: skip
