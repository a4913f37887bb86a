"""LoFiT: choose a few attention heads, learn one offset vector for each (arXiv 2406.01563)."""

from .config import LofitConfig
from .export import export_merged
from .layer import LofitLayer
from .model import LofitModel, register
from .selection import HeadSelection

register()

__all__ = [
    "HeadSelection",
    "LofitConfig",
    "LofitDPOConfig",
    "LofitDPOTrainer",
    "LofitLayer",
    "LofitModel",
    "LofitSFTConfig",
    "LofitSFTTrainer",
    "export_merged",
]


def __getattr__(name: str) -> object:
    """The trainers on first use: importing TRL takes seconds, and loading an adapter does not need it."""
    if name in ("LofitSFTTrainer", "LofitSFTConfig", "LofitDPOTrainer", "LofitDPOConfig"):
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
