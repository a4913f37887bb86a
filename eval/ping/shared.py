"""Greedy continuations of every prompt behind every opening, the work on a prompt being done once for all openings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..choices import CausalLM, common_prefix, encode, evaluating, keeps_logits, model_device, select_rows
from ..generation import continuation, generate, stop_tokens


def continuations(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    openings: Sequence[str],
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    batch_size: int = 64,
) -> list[list[str]]:
    """`[openings][prompts]`: what the model writes behind prompt and opening, as `generate` would.

    Keys and values of a prompt are computed once. Rows of unequal length are padded on the left, in front of prompts
    and between prompts and openings, and the padding is masked. `batch_size` bounds the rows. A model whose cache is
    more than keys and values of all positions (sliding windows, recurrent states), or that puts tokens of its own in
    front, gets whole prompts: the same, slower.
    """
    texts = [[prompt + opening for prompt in prompts] for opening in openings]
    if not prompts or not openings:
        return [[] for _ in openings]
    if not _plain_cache(model):
        flat = [text for row in texts for text in row]
        found = generate(model, tokenizer, flat, max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens,
                         batch_size=batch_size)  # fmt: skip
        return [found[start : start + len(prompts)] for start in range(0, len(flat), len(prompts))]
    ids = [encode(tokenizer, row) for row in texts]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(one) for row in ids for one in row)
    if limit is not None and longest >= limit:
        raise ValueError(f"a prompt with its opening has {longest} tokens and the model takes {limit}")
    shared = [_shared([row[place] for row in ids]) for place in range(len(prompts))]
    made: list[list[str]] = [[""] * len(prompts) for _ in openings]
    order = sorted(range(len(prompts)), key=lambda place: shared[place])
    each = max(1, batch_size // len(openings))
    with evaluating(model):
        for start in range(0, len(order), each):
            part = order[start : start + each]
            cache, mask = _read(model, [ids[0][place][: shared[place]] for place in part])
            rows = [(number, place) for number in range(len(openings)) for place in part]
            rows.sort(key=lambda row: len(ids[row[0]][row[1]]) - shared[row[1]])
            for first in range(0, len(rows), batch_size):
                some = rows[first : first + batch_size]
                which = torch.tensor([part.index(place) for _, place in some])
                tails = [ids[number][place][shared[place] :] for number, place in some]
                written = _decode(model, tokenizer, select_rows(cache, which), mask[which], tails, min_new_tokens,
                                  max_new_tokens)  # fmt: skip
                for (number, place), tokens in zip(some, written, strict=True):
                    made[number][place] = continuation(tokenizer, ids[number][place], tokens)
    return made


def _plain_cache(model: CausalLM) -> bool:
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return False
    ids = torch.zeros((1, 1), dtype=torch.long, device=model_device(model))
    with evaluating(model):
        cache = model(input_ids=ids, use_cache=True).get("past_key_values")
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def _shared(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with; each keeps one of its own."""
    heads = [row[:-1] for row in rows]
    return common_prefix(min(heads), max(heads))


def _read(model: CausalLM, rows: Sequence[list[int]]) -> tuple[Any, torch.Tensor]:
    """The cache of prompts padded on the left, and which of its places are real, `[rows, width]`."""
    device, width = model_device(model), max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], dtype=torch.long, device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    if not width:
        return DynamicCache(), mask.long()
    keep = {"logits_to_keep": 1} if keeps_logits(model) else {}
    output = model(input_ids=ids, attention_mask=mask, position_ids=_positions(mask), use_cache=True, **keep)
    return output.past_key_values, mask


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def _decode(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, cache: Any, mask: torch.Tensor, tails: Sequence[list[int]],
    least: int, most: int,
) -> list[list[int]]:  # fmt: skip
    """The most probable tokens, one after the other, `least` to `most` up to an end, which is not among them."""
    device, width = mask.device, max(map(len, tails))
    ends = torch.tensor(stop_tokens(model, tokenizer), device=device)
    ids = torch.tensor([[0] * (width - len(tail)) + tail for tail in tails], device=device)
    real = torch.tensor([[0] * (width - len(tail)) + [1] * len(tail) for tail in tails], device=device)
    mask = torch.cat([mask, real], dim=1)
    positions = _positions(mask)[:, -width:]
    active = list(range(len(tails)))  # rows that are still written, in the order of the cache
    written: list[list[int]] = [[] for _ in tails]
    keep = {"logits_to_keep": 1} if keeps_logits(model) else {}
    for number in range(most):
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **keep
        ).logits[:, -1]
        if number < least:
            logits[:, ends] = -torch.inf
        best = logits.argmax(-1)
        going = ~torch.isin(best, ends)
        for row, token, goes in zip(active, best.tolist(), going.tolist(), strict=True):
            if goes:
                written[row].append(token)
        if not bool(going.any()):
            break
        if not bool(going.all()):
            left = going.nonzero()[:, 0]
            cache, mask, positions, best = select_rows(cache, left), mask[left], positions[left], best[left]
            active = [active[place] for place in left.tolist()]
        ids = best[:, None]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        positions = positions[:, -1:] + 1
    return written
