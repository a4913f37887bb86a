"""Text generation in batches, for scorers: greedy, or sampled with a seed; of a served model, greedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..endpoint import Endpoint, side_by_side
from .choices import CausalLM, encode, evaluating, model_device

NEW_TOKENS = 16  # as the reference of LoFiT decodes MQuAKE and CLUTRR


def generate(
    model: CausalLM | Endpoint,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = NEW_TOKENS,
    min_new_tokens: int = 0,
    batch_size: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    progress: bool = False,
) -> list[str]:
    """Continuations, batched with padding on the left. White space at the start of a continuation is kept.

    `temperature`: 0 decodes greedily; above, tokens are sampled from the model's whole distribution, and the global
    random state is afterwards what it was before.

    A served model needs no tokenizer; of its requests `batch_size` are under way at once. Its texts are those of the
    same model here where the server decodes greedily at temperature 0, without penalties of its own.

    Raises:
        ValueError: a prompt without tokens, or longer than the model takes; sampling of a served model.
        OSError: a server that fails after all retries.
    """
    if isinstance(model, Endpoint):
        if temperature > 0 or min_new_tokens:
            raise ValueError(f"{model.url}: a served model is only decoded greedily, without a least length")
        ask = partial(model.complete, max_tokens=max_new_tokens, temperature=0)
        return side_by_side(ask, prompts, batch_size, progress=progress)
    if tokenizer is None:
        raise ValueError("a model that is loaded here needs its tokenizer")
    ends = stop_tokens(model, tokenizer)
    end = ends or None
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    # transformers fills what a configuration leaves open from the model's own (sampling, beams, penalties): for the
    # time of the call the model's own is empty.
    drawn: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    if min_new_tokens:
        drawn["min_new_tokens"] = min_new_tokens
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=pad, **drawn)
    ids = encode(tokenizer, prompts)
    if not all(ids):
        raise ValueError(f"prompt {ids.index([])} has no tokens; give a text or a tokenizer that prepends BOS")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(range(len(ids)), key=lambda place: len(ids[place]), default=None)
    if longest is not None and limit is not None and len(ids[longest]) >= limit:
        raise ValueError(f"prompt {longest} has {len(ids[longest])} tokens and the model takes {limit}")
    order = sorted(range(len(prompts)), key=lambda index: len(ids[index]))
    texts = [""] * len(prompts)
    device = model_device(model)
    run: Any = model.generate
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    with (
        evaluating(model),
        _plain_decoding(base),
        torch.random.fork_rng(enabled=temperature > 0),
        tqdm(total=len(prompts), disable=not progress, desc="answers", unit="answer") as bar,
    ):
        if temperature > 0:
            torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            part = order[start : start + batch_size]
            width = len(ids[part[-1]])
            batch = torch.tensor([[pad] * (width - len(ids[index])) + ids[index] for index in part], device=device)
            mask = torch.tensor(
                [[0] * (width - len(ids[index])) + [1] * len(ids[index]) for index in part], device=device
            )
            output: torch.Tensor = run(
                input_ids=batch, attention_mask=mask, generation_config=config, synced_gpus=False
            )  # each process has texts of its own
            for index, tokens in zip(part, output[:, width:].tolist(), strict=True):
                stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
                texts[index] = continuation(tokenizer, ids[index], tokens[:stop])
            bar.update(len(part))
    return texts


def local(model: CausalLM | Endpoint, what: str) -> CausalLM:
    """The model, where it is loaded here. ValueError for a served one, of which `what` needs more than texts."""
    if isinstance(model, Endpoint):
        raise ValueError(
            f"{what} needs the model's own probabilities, and {model.url} gives texts: score the checkpoint itself, "
            "--model FOLDER without --url"
        )
    return model


def stop_tokens(model: CausalLM, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a text: the model's, or where it names none the tokenizer's."""
    own = model.generation_config.eos_token_id
    end = own if own is not None else tokenizer.eos_token_id
    return [end] if isinstance(end, int) else list(end or [])


@contextmanager
def _plain_decoding(model: Any) -> Iterator[None]:
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def continuation(tokenizer: PreTrainedTokenizerBase, prompt: list[int], tokens: list[int]) -> str:
    """Decoded together with the prompt: on their own, many tokenizers drop the first token's leading space, and the
    strict form of exact match turns on it."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    head, whole = (str(tokenizer.decode(ids, **options)) for ids in (prompt, prompt + tokens))
    if not whole.startswith(head):  # bytes at the seam that only together are a letter: the prompt must not come along
        return str(tokenizer.decode(tokens, **options))
    return whole[len(head) :]
