"""AdamW on coefficients within the backward pass, block by block: each vector is read once a step (spec 5.3 B)."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.adamw import adamw

from .composer import Composer


class OnePassAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW` on `composer.coefficients`, followed by `composer.compose()`, to the same numbers; but as
    soon as the backward pass has a block's gradient, its coefficients move and its weights are composed anew, while
    the vectors are still at hand.

        optimizer = OnePassAdamW(composer, lr=0.1)
        for batch in batches:
            model(**batch).loss.backward()  # moves all blocks that got a gradient
            optimizer.step()  # and the others
            optimizer.zero_grad()

    One backward pass a step, in one process: nothing that needs the whole gradient (a global norm, a sum over
    micro-batches or processes) can come between.

    Args: as `torch.optim.AdamW`.
    """

    def __init__(
        self,
        composer: Composer,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__([composer.coefficients], {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.composer = composer
        composer.update_in_backward(self._move)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("a closure would repeat the backward pass, which moves the coefficients")
        if self.composer.coefficients.grad is None:
            return
        self.composer.finish_update()
        self._state()["step"] += 1

    def _state(self) -> dict[str, Any]:
        coefficients = self.composer.coefficients
        state = self.state[coefficients]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(coefficients), torch.zeros_like(coefficients)
        return state

    def _move(self, block: int) -> None:
        coefficients, group, state = self.composer.coefficients, self.param_groups[0], self._state()
        assert coefficients.grad is not None
        adamw(
            [coefficients.detach()[:, block]],
            [coefficients.grad[:, block]],
            [state["exp_avg"][:, block]],
            [state["exp_avg_sq"][:, block]],
            [],
            [state["step"].clone()],  # adamw adds one
            foreach=False,  # nor fused: on a CPU that takes strided columns for dense ones
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
