"""Fits that continue when interrupted and are not repeated when finished: of coefficients, of weights, of adapters."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback, set_seed

from ...files import write_json
from ..checkpoints import newest_complete_checkpoint
from ..multitask import MultiTaskConfig, MultiTaskTrainer
from ..processes import of_main
from ..training import anew, bare, own_forward
from .composer import Composer
from .low_rank import LowRankComposer
from .trainer import AtlasConfig, AtlasTrainer

FINISHED = "finished.json"


@dataclass(frozen=True)
class Fit:
    """What a fit cost, and its log."""

    log: list[dict[str, float]]
    seconds: float
    trained: int


class KeepBest(TrainerCallback):
    """Judges the composed model every few steps and leaves the best coefficients in place at the end.

    Args:
        judge: lower is better; None for a model that breaks the rules. At the start (where nothing is changed) the
            coefficients are those to fall back on.
    """

    def __init__(self, composer: Composer | LowRankComposer, judge: Callable[[Any], float | None], every: int) -> None:
        self.composer, self.judge, self.every = composer, judge, every
        self.best, self.kept = judge(composer.model), composer.coefficients.detach().clone()
        self.step = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        value = self.judge(self.composer.model)
        if value is not None and (self.best is None or value < self.best):
            self.best, self.kept = value, self.composer.coefficients.detach().clone()
            self.step = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with torch.no_grad():
            self.composer.coefficients.copy_(self.kept)
        self.composer.compose()


def fit_coefficients(
    composer: Composer | LowRankComposer,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    args: AtlasConfig,
    out_dir: Path,
    keep: KeepBest | None = None,
    **changes: Any,
) -> Fit:
    """Learn the coefficients in `out_dir`; continue from its newest checkpoint, or load them if finished.

    Args:
        args: copied, never changed.
        keep: chooses among the steps; without it the last one counts. Its fit starts anew when interrupted.
        changes: fields of `args` that differ for this fit.
    """
    args = anew(args, output_dir=str(out_dir), **changes)
    set_seed(args.seed)
    if keep is not None:
        args.save_strategy = "no"
    with own_forward(bare(composer.model)):
        trainer = AtlasTrainer(composer, args, text_columns(rows), tokenizer, None if keep is None else [keep])
        if of_main((out_dir / FINISHED).exists):
            trainer._load_from_checkpoint(str(out_dir))
            return Fit(**json.loads((out_dir / FINISHED).read_text()))
        return _run(trainer, out_dir, composer.coefficients.numel())


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    args: MultiTaskConfig,
    out_dir: Path,
    peft_config: PeftConfig | None = None,
    **changes: Any,
) -> tuple[PreTrainedModel, Fit]:
    """Fine-tune a copy of the model, all weights or an adapter; the model itself stays as it is.

    Returns:
        The tuned copy (a `PeftModel` for an adapter) and its fit.
    """
    args = anew(args, output_dir=str(out_dir), **changes)
    set_seed(args.seed)
    tuned: Any = copy.deepcopy(model).requires_grad_(peft_config is None)  # a quantised one takes an adapter alone
    if peft_config is not None:
        tuned = get_peft_model(tuned, peft_config)
    with own_forward(bare(tuned)):
        trainer = MultiTaskTrainer(tuned, args, text_columns(rows), processing_class=tokenizer)
        trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
        fit = _run(trainer, out_dir, trained, save=args.save_strategy != "no")
    return tuned.eval(), fit


def text_columns(rows: Dataset) -> Dataset:
    """Only what the trainer reads."""
    names = ("task", "prompt", "completion", "input_ids", "labels")
    return rows.select_columns([name for name in names if name in rows.column_names])


def _run(trainer: Trainer, out_dir: Path, trained: int, save: bool = True) -> Fit:
    if trainer.args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    if isinstance(trainer.train_dataset, Dataset) and not trainer.train_dataset.cache_files:
        trainer.train_dataset = (
            trainer.train_dataset.to_list()
        )  # as they are a step costs 8 % less than read from arrow
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=of_main(lambda: newest_complete_checkpoint(out_dir)))
    fit = Fit(trainer.state.log_history, time.perf_counter() - start, trained)
    trainer.model.eval()
    if save:
        trainer.save_model(str(out_dir))
        if trainer.is_world_process_zero():
            write_json(out_dir / FINISHED, vars(fit))
    return fit
