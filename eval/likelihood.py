"""Tokens of texts under a causal model, whole texts in one forward pass: nats, and what greedy decoding would say."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .choices import CausalLM, encode, evaluating, keeps_logits, model_device, right_padded, token_logprobs
from .statistics import Metric, metric


@dataclass(frozen=True)
class TokenScores:
    """The scored tokens of one text: their summed surprisal, and the most probable token at each of their places,
    given the text's own tokens before it. Equal to the text's tokens: greedy decoding would have written them."""

    nats: float
    greedy: list[int]


def score_tokens(
    model: CausalLM,
    ids: Sequence[Sequence[int]],
    starts: Sequence[int],
    *,
    batch_size: int = 64,
    progress: bool = False,
    unit: str = "text",
) -> list[TokenScores]:
    """For each text its tokens from `starts` on (at least 1: something stands before a scored token), in order.

    Batches of similar length, padded on the right, where a causal model cannot see it. Softmax and sums in fp32 and
    fp64. The model's mode is restored. Raises ValueError for a text longer than the model's positions.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(range(len(ids)), key=lambda index: len(ids[index]))
    if limit is not None and len(ids[longest]) > limit:
        raise ValueError(f"{unit} {longest} is {len(ids[longest])} tokens; the model takes {limit}")
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    found: list[TokenScores | None] = [None] * len(ids)
    device, keeps = model_device(model), keeps_logits(model)
    with evaluating(model), tqdm(total=len(ids), disable=not progress, desc=f"{unit}s", unit=unit) as bar:
        for begin in range(0, len(ids), batch_size):
            part = order[begin : begin + batch_size]
            batch = right_padded([ids[index] for index in part], device)
            first = min(starts[index] for index in part)
            keep = batch.shape[1] - first
            output = model(input_ids=batch[:, :-1], use_cache=False, **({"logits_to_keep": keep} if keeps else {}))
            logits = output.logits[:, -keep:]  # from the right: prompt tuning adds positions on the left
            place = torch.arange(first, batch.shape[1], device=device)
            lows = torch.tensor([starts[index] for index in part], device=device)[:, None]
            highs = torch.tensor([len(ids[index]) for index in part], device=device)[:, None]
            logprobs = token_logprobs(logits, batch[:, first:]).masked_fill((place < lows) | (place >= highs), 0.0)
            nats, best = (-logprobs.sum(1, dtype=torch.float64)).tolist(), logits.argmax(-1).tolist()
            for index, value, tokens in zip(part, nats, best, strict=True):
                found[index] = TokenScores(value, tokens[starts[index] - first : len(ids[index]) - first])
            bar.update(len(part))
    return [scores for scores in found if scores is not None]


def text_nats(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int,
    progress: bool,
) -> list[tuple[float, int]]:
    """Summed nats and number of scored tokens of each row's `text`.

    The first token of a text (BOS, where there is one) is not scored: nothing stands before it.
    """
    ids = encode(tokenizer, [row["text"] for row in rows])
    for row, tokens in zip(rows, ids, strict=True):
        if len(tokens) < 2:
            raise ValueError(f"row {row['id']!r}: a text needs at least two tokens, got {row['text']!r}")
    scored = score_tokens(model, ids, [1] * len(ids), batch_size=batch_size, progress=progress)
    return [(scores.nats, len(tokens) - 1) for scores, tokens in zip(scored, ids, strict=True)]


def perplexity(nats: Sequence[float], tokens: Sequence[int], groups: Sequence[Hashable]) -> dict[str, Metric]:
    """`nats_per_token` over all tokens of texts, and its exponential, from each text's nats per token."""
    found = metric(nats, groups, weights=tokens)
    low, high = found["low"], found["high"]
    exponential: Metric = {
        "value": math.exp(found["value"]),
        "low": None if low is None else math.exp(low),
        "high": None if high is None else math.exp(high),
        "n": found["n"],
    }
    return {"nats_per_token": found, "perplexity": exponential}
