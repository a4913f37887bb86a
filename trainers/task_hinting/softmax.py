"""A softmax of attention that grows sharper with the length of the input (spec 1.7).

    attention = softmax(tau(n) * q.k / sqrt(head_dim))

The more keys there are, the less of the softmax's mass is left for the right one: with a lead of D it gets
1 / (1 + (n - 1) exp(-tau D)), so a constant tau must fail as n grows, and tau ~ log n does not. Rules:

- `log`: tau(n) = log n / log n0. No parameters.
- `learn`: tau(n) = 1 + softplus(a) * max(0, log(n / n0)), one `a` a head, -2 at the start.
- `ssmax`: tau(n) = s * log n, one `s` a head, 1 / log n0 at the start (Scalable-Softmax, arXiv 2501.19399).

It works on every transformers model that takes its attention from `AttentionInterface`: in training, in evaluation of
a model that was trained without, and in `generate`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

NAME = "length_softmax"  # as attn_implementation, and of the settings in config.json
WEIGHT = "length_weight"  # of an attention module: `a` or `s` of its heads
_ITEMS: ContextVar[Tensor | None] = ContextVar("items", default=None)


@dataclass(frozen=True)
class LengthSoftmax:
    """What tau is.

    Attributes:
        rule: see the module's text.
        n0: the length at which tau is 1, like the longest in training; over 1.
        count: n is the number of "keys" that a query sees, or of "items" of the problem, which `items` tells.
        least: tau is at least this; 1 for a model that was trained without, and knows how to do short inputs.
    """

    rule: Literal["log", "learn", "ssmax"] = "log"
    n0: float = 10.0
    count: Literal["keys", "items"] = "keys"
    least: float = 0.0

    def __post_init__(self) -> None:
        if self.rule not in ("log", "learn", "ssmax"):
            raise ValueError(f"unknown rule {self.rule!r}; known: log, learn, ssmax")
        if self.count not in ("keys", "items"):
            raise ValueError(f"unknown count {self.count!r}; known: keys, items")
        if not 1 < self.n0 < math.inf:
            raise ValueError(f"n0={self.n0}: tau is 1 at this length, whose logarithm must be positive")

    def tau(self, n: Tensor, weight: Tensor | None = None) -> Tensor:
        """Of lengths n (broadcasting with `weight`, the heads' `a` or `s`): what queries are multiplied with."""
        if self.rule == "log":
            tau = n.log() / math.log(self.n0)
        elif self.rule == "learn":
            assert weight is not None
            tau = 1 + softplus(weight) * (n / self.n0).log().clamp(min=0)
        else:
            assert weight is not None
            tau = weight * n.log()
        return tau.clamp(min=self.least) if self.least else tau


def use_length_softmax(model: PreTrainedModel, settings: LengthSoftmax | None) -> None:
    """Switch it on, with new weights for rules that learn some, or (None) off again, in place.

    Raises:
        ValueError: a model that does not take its attention from transformers' interface.
    """
    config = model.config.get_text_config()
    for module in _attentions(model):
        if hasattr(module, WEIGHT):
            delattr(module, WEIGHT)
    if settings is None:
        if hasattr(config, NAME):
            delattr(config, NAME)
        model.set_attn_implementation("sdpa")
        return
    before = config._attn_implementation
    model.set_attn_implementation(NAME)
    if config._attn_implementation != NAME:
        model.set_attn_implementation(before)
        raise ValueError(
            f"{type(model).__name__} does not take its attention from transformers' interface, so its softmax cannot "
            "be changed from outside"
        )
    setattr(config, NAME, asdict(settings))
    if settings.rule != "log":
        start = -2.0 if settings.rule == "learn" else 1 / math.log(settings.n0)
        device = next(model.parameters()).device
        for module in _attentions(model):
            heads = torch.full((config.num_attention_heads,), start, device=device)
            module.register_parameter(WEIGHT, nn.Parameter(heads))


@contextmanager
def length_softmax(model: PreTrainedModel, settings: LengthSoftmax) -> Iterator[None]:
    """Within the block the model, trained without, has this softmax (rule `log`)."""
    if settings.rule != "log":
        raise ValueError(f"rule {settings.rule} learns weights; to switch on for an evaluation there is only log")
    if hasattr(model.config.get_text_config(), NAME):
        raise ValueError("this model was trained with a softmax of its own")
    before = model.config.get_text_config()._attn_implementation
    use_length_softmax(model, settings)
    try:
        yield
    finally:
        use_length_softmax(model, None)
        model.set_attn_implementation(before)


@contextmanager
def items(lengths: Tensor) -> Iterator[None]:
    """Within the block the rows of a batch have problems of so many items, int [rows]."""
    token = _ITEMS.set(lengths)
    try:
        yield
    finally:
        _ITEMS.reset(token)


def save(model: PreTrainedModel, folder: str | Path) -> None:
    """`save_pretrained`, with the heads' weights in config.json: `load` brings the softmax back."""
    config = model.config.get_text_config()
    weights = [getattr(module, WEIGHT) for module in _attentions(model) if hasattr(module, WEIGHT)]
    if weights:
        setattr(config, NAME, getattr(config, NAME) | {"weights": [weight.tolist() for weight in weights]})
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(WEIGHT)}
    model.save_pretrained(folder, state_dict=state)


def load(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """A model that `save` wrote (or any other); plain `from_pretrained` would leave the softmax as it was.

    The heads' weights are constants of the config then, and not trained on.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    if hasattr(model.config.get_text_config(), NAME):
        model.set_attn_implementation(NAME)
    return model


def _attentions(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "is_causal")]


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As transformers' `sdpa_attention_forward`; `query`: [rows, heads, queries, head_dim]."""
    tau = _tau(module, query, key, attention_mask)
    return sdpa_attention_forward(module, query * tau, key, value, attention_mask, **kwargs)


def _eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """The same, with the attention weights [rows, heads, queries, keys], for looking at them."""
    tau = _tau(module, query, key, attention_mask)
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    weights = ((query * tau) @ key.transpose(2, 3) * scaling + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _tau(module: nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Broadcasts with queries [rows, heads, queries, head_dim]."""
    stored = dict(getattr(module.config, NAME))
    weights = stored.pop("weights", None)
    settings = LengthSoftmax(**stored)
    if settings.count == "items":
        lengths = _ITEMS.get()
        if lengths is None:
            raise ValueError(
                "this softmax hangs on the items of each row's problem: call the model within `items(...)`"
            )
        n = lengths.to(query.device, torch.float32)[:, None, None, None]
    elif attention_mask is None:
        queries, keys = query.shape[2], key.shape[2]
        n = torch.arange(keys - queries + 1, keys + 1, device=query.device, dtype=torch.float32)[None, None, :, None]
    else:
        seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
        n = seen.sum(-1, keepdim=True).float().clamp(min=1)  # a query of padding sees nothing
    weight = getattr(module, WEIGHT, None)
    if weight is None and weights is not None:
        weight = torch.tensor(weights[module.layer_idx], device=query.device)  # type: ignore[index]
    return settings.tau(n, None if weight is None else weight[None, :, None, None]).to(query.dtype)


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
AttentionInterface.register(f"{NAME}_eager", _eager)
AttentionMaskInterface.register(f"{NAME}_eager", eager_mask)
