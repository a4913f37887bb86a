"""A look at the model every so many steps of its training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class Watch(TrainerCallback):
    """Calls `look(model, step)` before the first step and after every `every` ones, with the model in evaluation
    mode."""

    def __init__(self, every: int, look: Callable[[Any, int], None]) -> None:
        self.every, self.look = every, look

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._look(kwargs["model"], 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self._look(kwargs["model"], state.global_step)

    def _look(self, model: Any, step: int) -> None:
        model.eval()
        self.look(model, step)
        model.train()
