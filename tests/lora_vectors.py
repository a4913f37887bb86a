"""Random LoRA task vectors on tiny models, and their merged weights written out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from steerbook.trainers import TaskVector
from steerbook.trainers.atlas import LowRank
from steerbook.trainers.fingerprint import model_fingerprint


def lora_vectors(model: PreTrainedModel, n: int = 3, scale: float = 1.0) -> list[TaskVector]:
    """Vectors of the ranks 2, 3, ... on the matrices of the decoder layers; each leaves out every fourth, another."""
    targets = [
        f"{name}.weight" for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and not name.endswith("lm_head")
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    vectors = []
    for number in range(n):
        entries = {}
        for place, name in enumerate(targets):
            rows, columns = model.get_parameter(name).shape
            a = torch.randn(number + 2, columns, generator=generator).to(model.dtype)
            b = torch.randn(rows, number + 2, generator=generator).to(model.dtype)
            if (place + number) % 4:
                entries[name] = LowRank(a, b, 0.04 * scale * (number + 1))
        vectors.append(TaskVector(entries, source=f"vector {number}"))
    return vectors


def randomised(composer) -> None:
    """Coefficients in which every entry differs."""
    values = torch.randn(composer.coefficients.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    composer.coefficients.data.copy_(0.6 * values)


def merged_deltas(
    vectors: Sequence[TaskVector], names: Sequence[str], weights: torch.Tensor
) -> dict[str, torch.Tensor]:
    """`sum_i weights[i, j] * s_i * B_i @ A_i` for each name, in fp64."""
    found = {}
    for column, name in enumerate(names):
        terms = [
            weights[i, column] * v[name].scale * (v[name].b.double() @ v[name].a.double())
            for i, v in enumerate(vectors)
            if name in v
        ]
        found[name] = torch.stack(terms).sum(0)
    return found


def quantised_llama(folder: Path, kind: str) -> tuple[PreTrainedModel, list[TaskVector]]:
    """A tiny Llama loaded in 4 or 8 bits, and vectors of its plain base (which is saved in the folder)."""
    shapes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "num_key_value_heads": 2}
    plain = tiny_llama(**shapes, num_attention_heads=4)
    plain.save_pretrained(folder)
    base = model_fingerprint(plain)
    settings = {
        "4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
        "8bit": BitsAndBytesConfig(load_in_8bit=True),
    }
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings[kind], device_map="cpu", dtype=torch.float32
    )
    return model, [TaskVector(v.tensors, base=base, source=v.source) for v in lora_vectors(plain)]
