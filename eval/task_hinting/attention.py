"""What a sorting model looks at as it says the next number: attention mass on kinds of tokens (spec 1.9)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..choices import CausalLM, evaluating, model_device
from .scores import EOS, Rows, Telling, told

KINDS = ("identity", "successor", "smaller", "larger", "mark", "answer")
EAGER = {"sdpa": "eager", "eager": "eager", "length_softmax": "length_softmax_eager"}


def attention_masses(
    model: CausalLM, rows: Rows, batch_size: int = 100, telling: Telling | None = None
) -> dict[str, list[list[float]]]:
    """Kind -> mean mass of each layer's heads [layers][heads], at the places where a list's next number is said and
    the last token is a number x of the sorted list so far.

    Kinds: "identity": tokens x of the question; "successor": those of the true next number, if it is another one;
    "smaller": than x; "larger": than x, without the successor; "mark": behind the question; "answer": what was said.
    They sum to 1.

    Args:
        rows: of `sort`, from `test_sets`.
    """
    sums: dict[str, Any] = dict.fromkeys(KINDS, 0.0)
    count = 0
    ids, lengths, questions = (torch.as_tensor(part) for part in (rows.ids, rows.lengths, rows.questions))
    targets = torch.as_tensor(rows.targets)
    with evaluating(model), _with_weights(model):
        for start in range(0, len(ids), batch_size):
            part = slice(start, start + batch_size)
            batch = ids[part].to(model_device(model))
            with told(telling, lengths[part]):
                found = model(input_ids=batch, use_cache=False, output_attentions=True).attentions
            weights = torch.stack(found).permute(1, 3, 0, 2, 4).cpu().double()  # rows, queries, layers, heads, keys
            asks, masks = _kinds(ids[part], targets[part], questions[part])
            count += int(asks.sum())
            for kind, mask in masks.items():
                sums[kind] = sums[kind] + (weights * mask[:, :, None, None, :])[asks].sum(-1).sum(0)
    if not count:
        raise ValueError("no row has a second number to say; give lists of at least two items")
    return {kind: (np.asarray(total) / count).tolist() for kind, total in sums.items()}


def asking(ids: Tensor, targets: Tensor, questions: Tensor) -> tuple[Tensor, Tensor]:
    """The places [rows, width] where a number is said after a number of the answer, and each place's next token."""
    following = torch.cat([ids[:, 1:], torch.zeros_like(ids[:, :1])], dim=1)
    says = torch.cat([targets[:, 1:], torch.zeros_like(targets[:, :1])], dim=1)
    return says & (following != EOS) & (torch.arange(ids.shape[1]) > questions[:, None]), following


def _kinds(ids: Tensor, targets: Tensor, questions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Which queries [rows, width] count, and of each kind which keys it takes [rows, queries, keys]."""
    width = ids.shape[1]
    place = torch.arange(width)
    asks, following = asking(ids, targets, questions)
    x, successor, key = ids[:, :, None], following[:, :, None], ids[:, None, :]
    inside = (place < questions[:, None])[:, None, :]
    masks = {
        "identity": inside & (key == x),
        "successor": inside & (key == successor) & (successor != x),
        "smaller": inside & (key < x),
        "larger": inside & (key > x) & (key != successor),
        "mark": (place == questions[:, None])[:, None, :].expand(-1, width, -1),
        "answer": (place > questions[:, None])[:, None, :].expand(-1, width, -1),
    }
    return asks, masks


@contextmanager
def _with_weights(model: Any) -> Iterator[None]:
    """Within the block attention returns its weights."""
    before = model.config.get_text_config()._attn_implementation
    if before not in EAGER:
        raise ValueError(f"attention of the kind {before!r} has no weights to look at; known: {', '.join(EAGER)}")
    model.set_attn_implementation(EAGER[before])
    try:
        yield
    finally:
        model.set_attn_implementation(before)
