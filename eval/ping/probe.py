"""Whether hidden states tell harmful requests from harmless ones, where, and what pushing them does (spec 5).

Source: arXiv 2508.14031, sections on probing and steering.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from peft import PeftModel
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..choices import CausalLM, encode, evaluating, keeps_logits, model_device

Array = NDArray[np.float64]


@dataclass(frozen=True)
class States:
    """Of prompts, behind every layer: the mean over all tokens, and the last token's, whose logits begin the reply;
    both `[prompts, layers, width]`."""

    mean: Array
    last: Array


@dataclass(frozen=True)
class Probe:
    """A logistic regression on the states of one layer: above 0 says harmful."""

    layer: int
    direction: Array
    offset: float

    def logits(self, states: ArrayLike) -> Array:
        """Of states `[..., width]`."""
        found: Array = np.asarray(states, dtype=np.float64) @ self.direction + self.offset
        return found

    def auc(self, states: ArrayLike, harmful: ArrayLike) -> float:
        """Area under the ROC curve."""
        return float(roc_auc_score(np.asarray(harmful), self.logits(states)))


def prompt_states(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, progress: bool = False
) -> States:
    """One forward pass a prompt. The last layer's states are as the model hands them to its head."""
    means, lasts = [], []
    few = {"logits_to_keep": 1} if keeps_logits(model) else {}
    with evaluating(model):
        for ids in tqdm(encode(tokenizer, prompts), disable=not progress, desc="probe", unit="prompt"):
            batch = torch.tensor([ids], device=model_device(model))
            found = model(input_ids=batch, use_cache=False, output_hidden_states=True, **few).hidden_states[1:]
            stacked = torch.stack([state[0].float() for state in found])
            means.append(stacked.mean(1).double().cpu().numpy())
            lasts.append(stacked[:, -1].double().cpu().numpy())
    return States(np.stack(means), np.stack(lasts))


def fit_probe(states: ArrayLike, harmful: ArrayLike, layer: int) -> Probe:
    """On states `[prompts, layers, width]` with L2 penalty, C = 1. ValueError for prompts of one kind only."""
    values, kinds = np.asarray(states, dtype=np.float64)[:, layer], np.asarray(harmful, dtype=int)
    if len(np.unique(kinds)) < 2:
        raise ValueError("a probe needs harmful and harmless prompts")
    model = LogisticRegression(max_iter=1000).fit(values, kinds)
    return Probe(layer, model.coef_[0], float(model.intercept_[0]))


@contextmanager
def steered(model: CausalLM, layer: int, direction: ArrayLike, coefficient: float, rms: float) -> Iterator[None]:
    """Within the block `coefficient` times the unit `direction`, in units of `rms`, is added to what the layer leaves
    behind at the last token of a prompt. Tokens that are written one by one are left alone. For `replies` of an agent:
    its `first_replies` reads a prompt in pieces, each of which has a last token."""
    unit = torch.tensor(np.asarray(direction) / np.linalg.norm(direction), dtype=torch.float32)
    push = coefficient * rms * unit
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model

    def add(module: Any, inputs: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        if states.shape[1] == 1:
            return output
        states = states.clone()
        states[:, -1] += push.to(states.device, states.dtype)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handle = base.get_decoder().layers[layer].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def residual_rms(states: ArrayLike, layer: int) -> float:
    """Root mean square of the entries of states `[prompts, layers, width]` behind a layer."""
    return float(np.sqrt(np.mean(np.asarray(states, dtype=np.float64)[:, layer] ** 2)))


def random_direction(width: int, seed: int) -> Array:
    """The control: a push of the same size into nowhere in particular."""
    return np.random.default_rng(seed).normal(size=width)
