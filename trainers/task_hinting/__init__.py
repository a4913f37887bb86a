"""Task hinting: train a simpler task beside the main one, so that this works on longer inputs (arXiv 2310.00726)."""

from .models import ScratchConfig, named_tokenizer, scratch_model
from .softmax import LengthSoftmax, length_softmax, load, save, use_length_softmax

__all__ = [
    "LengthSoftmax",
    "ScratchConfig",
    "length_softmax",
    "load",
    "named_tokenizer",
    "save",
    "scratch_model",
    "use_length_softmax",
]
