"""Evaluation of aTLAS: scorers (`scores`) and the report (`summary`, `report`, `figures`).

`python -m steerbook.eval.atlas --model DIR --rows FILE` scores a saved model, composed or not.
"""

from .scores import accuracy, classify, completions, disentanglement, evaluate, normalised, predicted, task_means

__all__ = [
    "accuracy", "classify", "completions", "disentanglement", "evaluate", "normalised", "predicted", "task_means",
]  # fmt: skip
