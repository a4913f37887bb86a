"""Whole models in a job whose training keeps a part of the weights in every process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


@contextmanager
def whole_models(args: TrainingArguments) -> Iterator[None]:
    """Within the block `from_pretrained` loads whole models, though under ZeRO-3 it would cut them over processes."""
    plugin = getattr(args, "deepspeed_plugin", None)
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if plugin is not None:
            plugin.set_deepspeed_weakref()
