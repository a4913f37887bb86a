"""Tiny random models that chat: a template that writes what it is given, and weights far from uniform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from steerbook.trainers.tiny_lm import TinyConfig, build_tokenizer, new_model

CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_tokenizer(kind: str = "byte", corpus: Sequence[str] = (), template: str | None = CHAT) -> Any:
    tokenizer = build_tokenizer(corpus, kind)
    tokenizer.chat_template = template
    return tokenizer


def chat_model(tokenizer: Any, seed: int = 0, layers: int = 2, positions: int = 4096) -> Any:
    """In evaluation mode; its probabilities differ by far more than rounding does."""
    model = new_model(tokenizer, TinyConfig(layers=layers), seed=seed).eval()
    model.config.max_position_embeddings = positions
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model
