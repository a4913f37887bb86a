"""Exact log-probabilities of a few tokens behind many prompts: one forward pass a batch, no padding in front."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from .choices import CausalLM, evaluating, keeps_logits, model_device, right_padded


def next_token_logprobs(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    candidates: Sequence[int],
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> NDArray[np.float64]:
    """`log p(candidate | prompt)` in nats, `[prompts, candidates]`, of prompts in tokens.

    Prompts of similar length are batched, padded on the right, where a causal model cannot see it. Softmax in fp32.
    The model's mode is restored.

    Raises:
        ValueError: an empty prompt.
    """
    if not all(prompts):
        raise ValueError("a prompt has no tokens; give a text or a tokenizer that prepends BOS")
    found = np.empty((len(prompts), len(candidates)))
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    device, keeps = model_device(model), keeps_logits(model)
    wanted = torch.tensor(candidates, device=device)
    with evaluating(model), tqdm(total=len(order), disable=not progress, desc="choices", unit="prompt") as bar:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            lengths = torch.tensor([len(prompts[place]) for place in part], device=device)
            ids = right_padded([prompts[place] for place in part], device)
            window = int(lengths.max() - lengths.min()) + 1  # from the right: the last token of the shortest one on
            logits = model(input_ids=ids, use_cache=False, **({"logits_to_keep": window} if keeps else {})).logits
            last = lengths - 1 - ids.shape[1] + logits.shape[1]
            logs = logits[torch.arange(len(part), device=device), last].float().log_softmax(-1)
            found[part] = logs[:, wanted].cpu().double().numpy()
            bar.update(len(part))
    return found
