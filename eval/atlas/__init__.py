"""Evaluation of aTLAS: scorers (`scores`) and the report (`summary`, `report`, `figures`).

`python -m steerbook.eval.atlas --model DIR --rows FILE` scores a saved model, composed or not.
"""

from .scores import Completions, accuracy, classify, disentanglement, evaluate, normalised, predicted

__all__ = ["Completions", "accuracy", "classify", "disentanglement", "evaluate", "normalised", "predicted"]
