"""Exact log-probabilities of a few tokens behind many prompts, without padding in front."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel

from .choices import (
    CausalLM,
    common_prefix,
    evaluating,
    expandable,
    keeps_logits,
    model_device,
    right_padded,
    select_rows,
)


def next_token_logprobs(
    model: CausalLM, prompts: Sequence[Sequence[int]], candidates: Sequence[int], *, batch_size: int = 64
) -> NDArray[np.float64]:
    """`log p(candidate | prompt)` in nats, `[prompts, candidates]`, of prompts in tokens.

    What all prompts begin with is computed once, so give those together that have much in common. Prompts of similar
    length are batched, padded on the right, where a causal model cannot see it. Softmax in fp32. The model's mode is
    restored. A model whose cache cannot be copied row by row without loss reads whole prompts: the same, slower.

    Raises:
        ValueError: an empty prompt.
    """
    if not all(prompts):
        raise ValueError("a prompt has no tokens; give a text or a tokenizer that prepends BOS")
    ids = [list(prompt) for prompt in prompts]
    found = np.empty((len(ids), len(candidates)))
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    device, keeps = model_device(model), keeps_logits(model)
    wanted = torch.tensor(candidates, device=device)
    with evaluating(model):
        shared, cache = _shared(model, ids, device)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            lengths = torch.tensor([len(ids[place]) - shared for place in part], device=device)
            batch = right_padded([ids[place][shared:] for place in part], device)
            window = int(lengths.max() - lengths.min()) + 1  # from the right: the last token of the shortest one on
            past = None if cache is None else select_rows(cache, torch.zeros(len(part), dtype=torch.long))
            logits = model(
                input_ids=batch, past_key_values=past, use_cache=past is not None,
                **({"logits_to_keep": window} if keeps else {}),
            ).logits  # fmt: skip
            last = lengths - 1 - batch.shape[1] + logits.shape[1]
            logs = logits[torch.arange(len(part), device=device), last].float().log_softmax(-1)
            found[part] = logs[:, wanted].cpu().double().numpy()
    return found


def _shared(model: CausalLM, ids: list[list[int]], device: torch.device) -> tuple[int, object]:
    """How many tokens all prompts begin with (each keeps one of its own), and their keys and values."""
    heads = [row[:-1] for row in ids]
    shared = common_prefix(min(heads), max(heads))  # the first and last in order differ where any two do
    virtual = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning  # in front of every call
    if len(ids) < 2 or not shared or virtual:
        return 0, None
    keep = {"logits_to_keep": 1} if keeps_logits(model) else {}
    start = torch.tensor([ids[0][:shared]], device=device)
    cache = model(input_ids=start, use_cache=True, **keep).get("past_key_values")
    return (shared, cache) if expandable(cache) else (0, None)
