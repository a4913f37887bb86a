"""Scorers, statistics and the run report. Names are loaded when first used: importing this package is quick."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .choices import choice_logprobs
    from .generation import generate
    from .report import RunFolder, format_interval, results_table
    from .statistics import Metric, PairedTest, bootstrap_interval, metric, paired_test, seed_interval, seed_metric

__all__ = [
    "Metric",
    "PairedTest",
    "RunFolder",
    "bootstrap_interval",
    "choice_logprobs",
    "format_interval",
    "generate",
    "metric",
    "paired_test",
    "results_table",
    "seed_interval",
    "seed_metric",
]

_MODULES = {
    "choice_logprobs": "choices",
    "generate": "generation",
    "RunFolder": "report",
    "format_interval": "report",
    "results_table": "report",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES.get(name, 'statistics')}", __name__), name)
