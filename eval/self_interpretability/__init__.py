"""Evaluation of self-interpretability: the weights behind choices, and how well reports agree with them.

`python -m steerbook.eval.self_interpretability --scenarios S.csv --selections C.csv --reports R.csv --out DIR` works
on files of any model.
"""

from .agreement import agreement, disattenuated, gain, permuted
from .weights import fit_weights, linearity

__all__ = ["agreement", "disattenuated", "fit_weights", "gain", "linearity", "permuted"]
