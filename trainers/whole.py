"""Whole models in a job whose training keeps a part of the weights in every process.

DeepSpeed and FSDP take over the model that they train and cut it. Everything else here (measuring, merging, saving,
the next stage) wants whole models, so a copy is trained, and what it has learned is brought back.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from transformers.integrations import deepspeed

from .training import check_finite


@contextmanager
def whole_models() -> Iterator[None]:
    """Within the block `from_pretrained` loads whole models, though under ZeRO-3 it would cut them over processes."""
    reference = deepspeed._hf_deepspeed_config_weak_ref  # what is_deepspeed_zero3_enabled() looks at
    config = reference and reference()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def engine(args: TrainingArguments) -> str | None:
    """What takes the model over while it trains: "DeepSpeed", "FSDP" or nothing (one process, DDP)."""
    if args.deepspeed_plugin is not None:
        return "DeepSpeed"
    return "FSDP" if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true" else None


def to_train(model: Any, args: TrainingArguments, peft_config: PeftConfig | None = None) -> tuple[Any, Any, Any]:
    """What to give the trainer, and what waits for `joined`: (model, adapter's config, whole model or None).

    Under an engine the model, with its adapter, waits on the CPU while a copy of it is trained.
    """
    if engine(args) is None:
        return model, peft_config, None
    whole = model if peft_config is None else get_peft_model(model, peft_config)
    return copy.deepcopy(whole), None, whole.to("cpu")


def joined(trainer: Trainer, whole: Any = None) -> Any:
    """The trained model, whole in every process (all of which must call this), on the training's device.

    Raises:
        NonFiniteError: a trained parameter holds NaN or infinite values.
    """
    tuned = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if whole is None:
        check_finite(tuned, trainer.state.global_step)
        return tuned
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            whole.get_parameter(name).data.copy_(full(parameter, trainer.is_deepspeed_enabled))
    check_finite(whole, trainer.state.global_step)
    trainer.accelerator.free_memory()
    return whole.to(trainer.args.device)


def full(parameter: torch.nn.Parameter, by_deepspeed: bool) -> torch.Tensor:
    """A trained parameter's values from all processes: of DeepSpeed's fp32 master copy, where it trains in bf16."""
    if by_deepspeed:
        from deepspeed.utils import safe_get_full_fp32_param  # an extra

        found: torch.Tensor | None = safe_get_full_fp32_param(parameter)
        return parameter.data if found is None else found
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.data
