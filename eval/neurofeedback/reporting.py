"""Reports: the label of every sentence of a long conversation, behind all those before it (spec 3.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax
from transformers import PreTrainedTokenizerBase

from ..choices import CausalLM, evaluating, keeps_logits, model_device
from .axes import check_length
from .dialogue import SYSTEM, Turn, dialogue, score_tokens

Array = NDArray[np.float64]


def label_logits(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    labels: Sequence[int],
    levels: int = 2,
    *,
    template: Mapping[str, Any] | None = None,
) -> Array:
    """`[sentences, levels]`: logits of every label at each sentence's score, in one forward pass: row n is what the
    model says of sentence n after n examples.

    Raises:
        ValueError: a label that is no single token, or more tokens than the model has positions.
    """
    turns = [Turn(sentence, int(label)) for sentence, label in zip(sentences, labels, strict=True)]
    made = dialogue(tokenizer, turns, template or {}, SYSTEM)
    tokens = score_tokens(tokenizer, made.before, levels)
    for label, place in zip(labels, made.scores, strict=True):
        if made.ids[place] != tokens[label]:
            raise ValueError(f"the score {label} is another token there than behind the first sentence")
    places = np.array(made.scores) - 1
    last = int(places[-1]) + 1
    check_length(model, last)
    device = model_device(model)
    ids, wanted = torch.tensor([made.ids[:last]], device=device), torch.tensor(places, device=device)
    with evaluating(model):
        if keeps_logits(model):  # the vocabulary's matrix at the scores' places alone
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=wanted).logits[0]
        else:
            logits = model(input_ids=ids, use_cache=False).logits[0, wanted]
    return logits[:, tokens].double().cpu().numpy()


def judged(logits: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    """Of `[sentences, levels]`: 1 where the most probable label is the right one, and nats of the right one. Among
    equally probable labels the highest counts."""
    values, right = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    said = values.shape[1] - 1 - values[:, ::-1].argmax(1)
    nats = -np.take_along_axis(log_softmax(values, axis=1), right[:, None], axis=1)[:, 0]
    return (said == right).astype(np.float64), nats
