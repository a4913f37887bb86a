"""A look at the model every so many steps of its training, kept in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ...files import write_json

FILE = "trajectory.json"


class Watch(TrainerCallback):
    """Before the first step and after every `every` ones adds `{"step": ..., "rows": look(model)}` to a file in
    `folder`, with the model in evaluation mode."""

    def __init__(self, every: int, folder: Path, look: Callable[[Any], Any]) -> None:
        self.every, self.folder, self.look = every, folder, look

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._add(kwargs["model"], 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self._add(kwargs["model"], state.global_step)

    def _add(self, model: Any, step: int) -> None:
        model.eval()
        rows = self.look(model)
        model.train()
        earlier = [one for one in watched(self.folder) if one["step"] < step]  # of a run that was interrupted
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / FILE, [*earlier, {"step": step, "rows": rows}])


def watched(folder: Path) -> list[dict[str, Any]]:
    """What a `Watch` has written; nothing where there was none."""
    file = folder / FILE
    return list(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else []
