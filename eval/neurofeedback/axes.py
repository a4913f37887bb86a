"""Directions of hidden states: a classifier's, and principal components; scores along them and labels (spec 3.2, 3.3).

Source: arXiv 2505.13763.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.linear_model import LogisticRegression
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..choices import CausalLM, evaluating, keeps_logits, model_device
from .dialogue import Turn, dialogue

Array = NDArray[np.float64]
CLASSIFIER = "lr"


@dataclass(frozen=True)
class Axis:
    """A direction of the hidden states behind one layer.

    Attributes:
        direction: `[width]`; a score is `(vector @ direction + offset) / scale`.
        scale: standard deviation of scores on the sentences it was fitted on.
        edges: scores from which on the next label begins.
    """

    name: str
    layer: int
    direction: Array
    offset: float
    scale: float
    edges: Array

    def scores(self, vectors: ArrayLike) -> Array:
        """Of vectors `[..., width]`, in standard deviations."""
        return (np.asarray(vectors, dtype=np.float64) @ self.direction + self.offset) / self.scale

    def labels(self, vectors: ArrayLike) -> NDArray[np.int64]:
        return np.searchsorted(self.edges, self.scores(vectors), side="right").astype(np.int64)


def sentence_vectors(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    *,
    template: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Array:
    """`[sentences, layers, width]`: means over the tokens of a sentence, said alone, of what each layer leaves behind.

    The last is as the model hands it to its head (in most, behind the final norm).
    """
    spoken = [dialogue(tokenizer, [Turn(sentence)], template or {}) for sentence in sentences]
    bar = tqdm(spoken, disable=not progress, desc="sentences", unit="sentence")
    return np.stack([span_vector(model, one.ids, one.sentences[0]) for one in bar])


def span_vector(model: CausalLM, ids: Sequence[int], span: tuple[int, int]) -> Array:
    """`[layers, width]`: the mean over the tokens of the span, given all before it. Raises ValueError where the model
    has fewer positions."""
    start, stop = span
    check_length(model, stop)
    tokens = torch.tensor([list(ids[:stop])], device=model_device(model))
    with evaluating(model):
        # What stands before is only looked at: its hidden states (of thousands of tokens) are not kept.
        few = {"logits_to_keep": 1} if keeps_logits(model) else {}
        cache = model(input_ids=tokens[:, :start], use_cache=True, **few).past_key_values if start else None
        found = model(input_ids=tokens[:, start:], past_key_values=cache, output_hidden_states=True, **few)
    states = torch.stack([state[0].float().mean(0) for state in found.hidden_states[1:]])
    return states.double().cpu().numpy()


def check_length(model: CausalLM, tokens: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ValueError(f"a conversation has {tokens} tokens, and the model takes {limit}; give fewer examples")


def fit_axes(
    vectors: ArrayLike, labels: ArrayLike, layers: Sequence[int], names: Sequence[str], *, levels: int = 2
) -> dict[tuple[int, str], Axis]:
    """(layer, name) -> axis.

    Args:
        vectors: `[sentences, layers, width]`.
        labels: `[sentences]`, 0 or 1: what the sentences are about.
        names: "lr", the logistic regression (L2 penalty, C = 1) on `labels`; "pcK", the K-th principal component,
            turned so that its largest entry is positive.
        levels: how many labels scores are cut into: 2 at the median; more of them, an even number, at 0 and at
            quantiles of the scores on either side.

    Raises:
        ValueError: unknown names, components that so few sentences do not have, labels of one kind only.
    """
    values, kinds = np.asarray(vectors, dtype=np.float64), np.asarray(labels)
    if len(np.unique(kinds)) != 2:
        raise ValueError(f"axes need labels of two kinds, got {sorted(set(kinds.tolist()))}")
    made = {}
    for layer in layers:
        here = values[:, layer]
        mean = here.mean(0)
        _, sizes, components = np.linalg.svd(here - mean, full_matrices=False)
        rank = int((sizes > 1e-9 * sizes[0]).sum())
        for name in names:
            if name == CLASSIFIER:
                model = LogisticRegression(max_iter=10_000).fit(here, kinds)
                direction, offset = model.coef_[0], float(model.intercept_[0])
            elif name.startswith("pc") and name[2:].isdigit() and 1 <= int(name[2:]) <= rank:
                direction = components[int(name[2:]) - 1]
                direction = direction * np.sign(direction[np.abs(direction).argmax()])
                offset = float(-mean @ direction)
            else:
                raise ValueError(f"no axis {name!r}: known are {CLASSIFIER} and pc1 to pc{rank} (of these sentences)")
            raw = here @ direction + offset
            scale = float(raw.std())
            made[layer, name] = Axis(name, layer, direction, offset, scale, label_edges(raw / scale, levels))
    return made


def label_edges(scores: ArrayLike, levels: int) -> Array:
    """Where labels change: `[levels - 1]`, rising. ValueError for an odd number of levels or more than 10."""
    values = np.asarray(scores, dtype=np.float64)
    if levels % 2 or not 2 <= levels <= 10:
        raise ValueError(f"levels must be even, from 2 to 10 (a score is one digit), got {levels}")
    if levels == 2:
        return np.array([np.median(values)])
    shares = np.arange(1, levels // 2) / (levels // 2)
    below, above = values[values < 0], values[values >= 0]
    if not len(below) or not len(above):
        raise ValueError("all scores lie on one side of 0, so that more than two levels cannot be cut")
    return np.concatenate([np.quantile(below, shares), [0.0], np.quantile(above, shares)])
