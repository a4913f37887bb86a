"""Run a stage so that an interrupted one goes on, and a finished one is loaded instead of repeated."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ...files import write_json
from ..dry_run import show_dry_run
from ..fits import Fit, run_fit
from ..stream import Stream
from ..training import own_forward
from .trainer import PreferenceConfig, PreferenceTrainer, ReportConfig, ReportTrainer

FINISHED = "finished.json"


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
    """Train the model in place, or an adapter that is then merged into it; saved in `folder/model` (an adapter alone).

    Args:
        args: of the stage; copied, never changed.
        rows, stream: what to train on, one of them.
        chosen_by: rows whose loss chooses among the checkpoints of every epoch.
        template: arguments of the chat template, for rows of messages.
    """
    args = copy.copy(args)
    args.output_dir, args.seed = str(folder), seed
    if (folder / FINISHED).exists():
        done = json.loads((folder / FINISHED).read_text())
        return Fit(_load(model, folder / "model", peft_config), done["log"], done["seconds"], done["trained"])
    if chosen_by is not None:
        args.eval_strategy = args.save_strategy = "epoch"  # type: ignore[assignment]
        args.load_best_model_at_end, args.metric_for_best_model, args.greater_is_better = True, "loss", False
    if rows is not None:
        rows, chosen_by = (part and templated(part, template) for part in (rows, chosen_by))
    set_seed(seed)
    trainer_class: Any = PreferenceTrainer if isinstance(args, PreferenceConfig) else ReportTrainer
    with own_forward(model):
        trainer = trainer_class(model, args, rows, stream=stream, eval_dataset=chosen_by, processing_class=tokenizer,
                                peft_config=peft_config)  # fmt: skip
        found = run_fit(trainer, folder)
        tuned = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    if trainer.is_world_process_zero():
        tuned.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        write_json(folder / FINISHED, {"log": found.log, "seconds": found.seconds, "trained": found.trained})
    merged = tuned.merge_and_unload() if isinstance(tuned, PeftModel) else tuned
    return replace(found, model=merged.requires_grad_(True))


def show_stage(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: PreferenceConfig,
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
        show_dry_run(trainer, tokenizer)


def templated(rows: Dataset, template: Mapping[str, Any] | None) -> Dataset:
    """With the column that TRL hands to the chat template, for the prompt and for the whole conversation alike."""
    if not template:
        return rows
    return rows.add_column("chat_template_kwargs", [dict(template)] * len(rows))


def _load(model: PreTrainedModel, folder: Path, peft_config: PeftConfig | None) -> Any:
    if peft_config is not None:
        return PeftModel.from_pretrained(model, folder).merge_and_unload()
    return type(model).from_pretrained(folder).eval()
