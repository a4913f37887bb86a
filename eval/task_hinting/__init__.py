"""Evaluation of task hinting: scores by length of rows of tokens (`scores`) and of text (`text`), what attention looks
at (`attention`), and the report (`summary`, `report`, `figures`).

`python -m steerbook.eval.task_hinting --model DIR --rows FILE` scores a saved model on rows of text.
"""

from .scores import area, by_length, error_kind, error_shares, falls_under, generated, teacher_forced
from .text import collateral, evaluate

__all__ = [
    "area",
    "by_length",
    "collateral",
    "error_kind",
    "error_shares",
    "evaluate",
    "falls_under",
    "generated",
    "teacher_forced",
]
