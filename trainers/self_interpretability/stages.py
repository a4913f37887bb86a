"""The stages of preferences and of reports, and what is shown of the first before any time is spent."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import stages
from ..dry_run import show_dry_run
from ..fits import Fit
from ..stream import Stream
from ..training import anew
from .trainer import PreferenceConfig, PreferenceTrainer, ReportConfig, ReportTrainer


def run_stage(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: PreferenceConfig | ReportConfig,
    folder: Path,
    *,
    seed: int,
    rows: Dataset | None = None,
    stream: Stream | None = None,
    chosen_by: Dataset | None = None,
    peft_config: PeftConfig | None = None,
    template: Mapping[str, Any] | None = None,
) -> Fit:
    """`stages.run_stage` of preferences or reports.

    Args:
        rows, stream: what to train on, one of them.
        chosen_by: rows whose loss chooses among the checkpoints of every epoch.
        template: arguments of the chat template, for rows of messages.
    """
    if chosen_by is not None:
        args = anew(args, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
                       metric_for_best_model="loss", greater_is_better=False)  # fmt: skip
    if rows is not None:
        rows, chosen_by = (part and templated(part, template) for part in (rows, chosen_by))
    trainer_class: Any = PreferenceTrainer if isinstance(args, PreferenceConfig) else ReportTrainer
    return stages.run_stage(trainer_class, model, tokenizer, args, folder, seed=seed, peft_config=peft_config,
                            train_dataset=rows, stream=stream, eval_dataset=chosen_by)  # fmt: skip


def show_stage(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: PreferenceConfig,
    plan: Mapping[str, Any],
    *,
    rows: Dataset | None = None,
    stream: Stream | None = None,
    peft_config: PeftConfig | None = None,
    template: Mapping[str, Any] | None = None,
) -> None:
    """Rows with their loss tokens, parameters and memory of the first stage; nothing is trained."""
    args = copy.copy(args)
    with tempfile.TemporaryDirectory() as args.output_dir:  # the Trainer makes its folder at once
        trainer = PreferenceTrainer(model, args, rows and templated(rows, template), stream=stream,
                                    processing_class=tokenizer, peft_config=peft_config)  # fmt: skip
        show_dry_run(trainer, tokenizer, **plan)


def templated(rows: Dataset, template: Mapping[str, Any] | None) -> Dataset:
    """With the column that TRL hands to the chat template, for the prompt and for the whole conversation alike."""
    if not template:
        return rows
    return rows.add_column("chat_template_kwargs", [dict(template)] * len(rows))
