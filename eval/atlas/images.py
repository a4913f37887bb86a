"""What an aTLAS run on images set out to show."""

from __future__ import annotations

from typing import Any

from ..results import claim
from .claims import claims
from .summary import Results


def image_claims(results: Results) -> list[dict[str, Any]]:
    """Claims of what is above what; each holds only if its whole 95 % interval does. At least three seeds judge."""
    if len(results.seeds) < 3:
        return []
    made = claims(results, toy=False)
    base, ours = ("adaptation", "base", None), ("adaptation", "ufm", None)
    for other, text in ((base, "the base"), (("adaptation", "layernorm", None), "LayerNorm tuning with UFM")):
        if results.has(ours, "test") and results.has(other, "test"):
            found = results.combination({ours: 1, other: -1}, "test", "accuracy")
            made.append(claim(f"without labels: aTLAS with UFM above {text}", found, 0.0))
    return made
