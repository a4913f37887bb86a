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


def check_engine(args: TrainingArguments, toy: bool) -> None:
    """ValueError for an engine in an embedded world (`toy`), and for another FSDP than the second."""
    if (by := engine(args)) is None:
        return
    if toy:
        raise ValueError(
            f"{by} is for models that one process does not hold; the embedded world is tiny: start one process, or "
            "give --model_name_or_path"
        )
    if by == "FSDP" and os.environ.get("FSDP_VERSION") != "2":
        raise ValueError("FSDP's first version is not supported: launch with accelerate_configs/fsdp2.yaml")


def to_train(model: Any, args: TrainingArguments) -> tuple[Any, Any]:
    """What to give the trainer, and what waits for `joined`: the model and None, or under an engine a copy of it,
    which the engine brings to its device, and the model itself, which waits on the CPU."""
    if engine(args) is None:
        return model, None
    whole = model.to("cpu")
    return copy.deepcopy(whole), whole


def joined(trainer: Trainer, whole: Any = None, peft_config: PeftConfig | None = None) -> Any:
    """The trained model (all of its adapter that was trained), whole in every process, on the training's device; of
    `to_train`'s copy the trainer lets go.

    All processes must call this.

    Args:
        whole, peft_config: what `to_train` has kept, and the adapter that the trainer was given.

    Raises:
        NonFiniteError: a trained parameter holds NaN or infinite values.
    """
    tuned = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if whole is None:
        check_finite(tuned, trainer.state.global_step)
        return tuned
    if peft_config is not None:
        whole = get_peft_model(whole, peft_config)
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            whole.get_parameter(plain_name(name)).data.copy_(full(parameter, trainer.is_deepspeed_enabled))
    check_finite(whole, trainer.state.global_step)
    del tuned, parameter
    trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    return whole.to(trainer.args.device)


def full(parameter: torch.nn.Parameter, by_deepspeed: bool) -> torch.Tensor:
    """A trained parameter's values from all processes: of DeepSpeed's fp32 master copy, where it trains in bf16."""
    if by_deepspeed:
        from deepspeed.utils import safe_get_full_fp32_param  # an extra

        found: torch.Tensor | None = safe_get_full_fp32_param(parameter)
        return parameter.data if found is None else found
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.data


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers (activation checkpointing, torch.compile) put into it."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
