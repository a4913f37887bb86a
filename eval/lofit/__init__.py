"""Evaluation of LoFiT: scorers (`scores`), the report (`summary`, `report`, `figures`), lm_eval tasks (`lm_eval`).

`python -m steerbook.eval.lofit --model DIR --rows FILE` scores a saved model.
"""

from .scores import evaluate, exact_match, head_overlap, measure, multiple_choice

__all__ = ["evaluate", "exact_match", "head_overlap", "measure", "multiple_choice"]
