"""Run one fit so that an interrupted one goes on where it was."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import PrinterCallback, Trainer

from .checkpoints import check_launch, newest_complete_checkpoint
from .processes import of_main
from .whole import engine, joined


@dataclass(frozen=True)
class Fit:
    """A trained model, its log, and seconds of training: 0 where they are not known, as of a fit that was resumed."""

    model: Any
    log: list[dict[str, float]]
    seconds: float
    trained: int


def run_fit(trainer: Trainer, folder: Path, whole: Any = None, peft_config: PeftConfig | None = None) -> Fit:
    """Train, from the newest complete checkpoint in `folder` on if there is one.

    Args:
        whole, peft_config: see `joined`.
    """
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    if trainer.args.disable_tqdm:  # else transformers prints every log line instead
        trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    checkpoint = of_main(lambda: newest_complete_checkpoint(folder))
    if checkpoint is not None:
        check_launch(checkpoint, trainer.args.world_size, engine(trainer.args))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds, log = time.perf_counter() - start, trainer.state.log_history
    if checkpoint is not None:  # they would be those of the last part alone
        seconds, log = 0.0, [{key: entry[key] for key in entry if key != "train_runtime"} for entry in log]
    return Fit(joined(trainer, whole, peft_config), log, seconds, trained)
