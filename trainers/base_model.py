"""Load the base model of a recipe: a real one, or the tiny one that is built on the spot."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from trl import ModelConfig, get_quantization_config

from .quantised import is_quantised, keep_4bit
from .whole import engine, whole_models


def load_base(
    config: ModelConfig,
    tiny: Callable[[], Path] | None = None,
    keep_in: Path | None = None,
    device: torch.device | str = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (whole, in eval mode, on `device`) and tokenizer; a tokenizer without a padding token pads with EOS.

    Args:
        config: TRL's model flags. Without `model_name_or_path` the folder that `tiny()` returns is the base.
        keep_in: a run's folder, into which the tiny base is copied (as `base_model`): its adapters stay usable.

    Raises:
        ValueError: 4 bits, and no type to compute in.
        OSError: the model is neither a local folder nor to be had from the Hub, or its files do not make a model (cut
            short, of an unknown architecture, without a tokenizer), or not with these flags.
    """
    name = config.model_name_or_path
    if name is None:
        assert tiny is not None, "either a name or a tiny model"
        folder = tiny()
        if keep_in is not None:
            shutil.copytree(folder, keep_in / "base_model", dirs_exist_ok=True)
            folder = keep_in / "base_model"
        name = str(folder)
    revision = config.model_revision if config.model_name_or_path else None
    options: dict[str, Any] = {"attn_implementation": config.attn_implementation, "dtype": config.dtype}
    if config.load_in_4bit and config.dtype == "auto":
        raise ValueError("--dtype auto: 4-bit weights are computed with in a type that must be named, as bfloat16")
    quantization = get_quantization_config(config)
    if quantization is not None:
        notices = logging.getLogger("bitsandbytes.autograd._functions")
        notices.setLevel(logging.ERROR)  # of 8 bits: a line for each layer and forward pass
        options |= {"quantization_config": quantization, "device_map": {"": device}}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        with whole_models():
            model = AutoModelForCausalLM.from_pretrained(name, revision=revision, **options)
    except OSError as error:
        raise OSError(
            f"cannot load --model_name_or_path {name}: neither a folder with config.json and weights, nor to be had "
            f"from the Hub ({str(error).splitlines()[0]})"
        ) from error
    except (ValueError, RuntimeError, ImportError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise OSError(f"cannot load --model_name_or_path {name} ({reason})") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    keep_4bit(model)
    return (model if is_quantised(model) else model.to(device)).eval(), tokenizer


def check_quantised(config: ModelConfig, args: TrainingArguments, adapter: bool | None = None) -> None:
    """ValueError for flags that a quantised base does not go with. `adapter`: one is trained (default: as the flags
    say)."""
    if not (config.load_in_4bit or config.load_in_8bit):
        return
    if not (config.use_peft if adapter is None else adapter):
        raise ValueError(
            "a quantised base cannot be trained itself: give --use_peft, which trains an adapter beside it"
        )
    plugin = getattr(args, "deepspeed_plugin", None)
    if engine(args) == "FSDP" or (plugin is not None and plugin.zero_stage == 3):
        raise ValueError("ZeRO-3 and FSDP cannot cut a quantised base over the processes: take ZeRO-2 or DDP")
