"""The linearised variant (paper, section 3.3; spec 1.5): the model's first-order expansion at the base weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, jvp

from .composer import Composer


def linearized_step(
    composer: Composer, inputs: Mapping[str, Any], output: str, loss: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Loss of `f(x; base) + J (composed - base)`, with the exact gradient added to `composer.coefficients.grad`.

    The output is affine in the coefficients, so their gradient is one ordinary backward pass of the model at its base
    weights with the cotangent `d loss / d output`, contracted block by block; nothing is differentiated twice.

    Args:
        composer: never composed (its model holds the base weights).
        inputs: keyword arguments of the model. Attention needs an implementation with forward-mode derivatives
            (`attn_implementation="eager"`).
        output: the field of the model's output, such as "logits".
        loss: a scalar from that output.

    Returns:
        (loss, output), both without graph.
    """
    values, directions = composer.expansion()

    def forward(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(composer.model, weights, (), dict(inputs), tie_weights=True)[output]

    with torch.no_grad():
        at_base, change = jvp(forward, (values,), (directions,))  # type: ignore[misc]
    linear = (at_base + change).detach().requires_grad_()
    value = loss(linear)
    (cotangent,) = torch.autograd.grad(value, linear)
    composer.model(**inputs)[output].backward(cotangent)
    return value.detach(), linear.detach()
