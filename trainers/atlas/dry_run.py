"""What composing would take, before any time is spent: bytes that stay in memory and bytes that move at each step."""

from __future__ import annotations

from rich.console import Console

from .composer import Composer


def show_composition(composer: Composer) -> None:
    """Print coefficients and memory of a composer."""
    console = Console(highlight=False)
    n, m = composer.coefficients.shape[:2]
    console.print(f"Coefficients: {composer.coefficients.numel():,} ({n} task vectors, {m} blocks).")
    for name, value in composition_bytes(composer).items():
        console.print(f"  {name:<42}{value:>16,} bytes")


def composition_bytes(composer: Composer) -> dict[str, int]:
    """Memory beside the model, and what one optimiser step of one micro-batch reads and writes (spec 5.3: 2nDb + 3Dw +
    the gradients); a further micro-batch reads the vectors and gradients once more."""
    n = composer.coefficients.shape[0]
    sizes = composer.sizes()
    weights = sum(elements * width for elements, width, _ in sizes)
    vectors = n * sum(elements * width for elements, _, width in sizes)
    largest = max(elements * width for elements, width, _ in sizes)
    return {
        "resident: copy of the base weights": weights,
        "resident: task vectors": 0 if composer.streams else vectors,
        "on disk: task vectors by block": vectors if composer.streams else 0,
        "alive at most: one weight gradient": largest,
        "moved a step: task vectors, read twice": 2 * vectors,
        "moved a step: weights, base and gradients": 4 * weights,
    }
