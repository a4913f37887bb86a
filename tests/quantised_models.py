"""A tiny base in a folder, the ways to quantise it, and what must not change of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from trl import ModelConfig

from steerbook.trainers.base_model import load_base
from steerbook.trainers.tiny_lm import build_tokenizer

KINDS = {
    "nf4": {"load_in_4bit": True},
    "nested": {"load_in_4bit": True, "use_bnb_nested_quant": True},
    "int8": {"load_in_8bit": True},
}
IDS = torch.tensor([[1, 70, 90, 40, 33, 120, 50, 210], [1, 30, 35, 80, 30, 31, 61, 44]])
ROWS = Dataset.from_list([{"prompt": f"{n} and", "completion": f" {n + 1}", "task": "all"} for n in range(8)])


def save_base(folder: Path, template: str | None = None) -> Path:
    """Of widths that are multiples of 64, the blocks of 4-bit weights; its probabilities are far from uniform."""
    tokenizer = build_tokenizer([], "byte")
    tokenizer.chat_template = template
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def flags(kind: str) -> list[str]:
    return [text for name in KINDS[kind] for text in (f"--{name}", "true")]


def load(folder: Path, kind: str) -> PreTrainedModel:
    """As recipes load it."""
    return load_base(ModelConfig(model_name_or_path=str(folder), **KINDS[kind]))[0]


def logits(model: nn.Module, training: bool = False) -> Tensor:
    """Afterwards it is in evaluation mode. 8-bit layers round their inputs, in evaluation alone."""
    with torch.no_grad():
        found = model.train(training)(input_ids=IDS).logits
    model.eval()
    return found


def stored(model: nn.Module) -> dict[str, Tensor]:
    """The quantised weights and their scales, as they are saved, by the names that they have without adapters."""
    found = {name.replace(".base_layer.", ".").removeprefix("base_model.model."): tensor.clone()
             for name, tensor in model.state_dict().items() if "_proj." in name and "lora_" not in name
             and "lofit_" not in name}  # fmt: skip
    assert sum(not tensor.is_floating_point() for tensor in found.values()) >= 14
    return found


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = stored(model)
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def arguments(kind: type, folder: Path, **more: Any) -> Any:
    """Of a trainer, for a few steps."""
    usual = {"use_cpu": True, "bf16": False, "report_to": [], "max_steps": 3, "learning_rate": 0.01,
             "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "per_device_train_batch_size": 4,
             "gradient_checkpointing": False}  # fmt: skip
    return kind(str(folder), **usual | more)


def randomised(tuned: Any, std: float = 0.05) -> Any:
    """The adapted model, all numbers of its adapter drawn anew."""
    generator = torch.Generator().manual_seed(1)
    for name, one in tuned.named_parameters():
        if "lora_" in name or "lofit_" in name:
            one.data.copy_(std * torch.randn(one.shape, generator=generator))
    return tuned
