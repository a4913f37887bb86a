"""Run a stage of training so that an interrupted one goes on, and a finished one is loaded instead of repeated."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..files import write_json
from .fits import Fit, run_fit
from .quantised import joined
from .training import own_forward
from .whole import whole_models

FINISHED = "finished.json"


def run_stage(
    trainer_class: Any,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: Any,
    folder: Path,
    *,
    seed: int,
    peft_config: PeftConfig | None = None,
    merged: bool = True,
    **data: Any,
) -> Fit:
    """Train the model in place, or an adapter that is then merged into it (`joined` with a quantised one); saved in
    `folder/model`, an adapter alone.

    Args:
        trainer_class: which is given the model, `args`, `data`, the tokenizer and `peft_config`.
        args: copied, never changed.
        merged: False leaves a new adapter beside the model, as whoever loads it has it.
        data: the trainer's data sets or stream.
    """
    args = copy.copy(args)
    args.output_dir, args.seed = str(folder), seed
    if (folder / FINISHED).exists():
        done = json.loads((folder / FINISHED).read_text())
        return Fit(_load(model, args, peft_config, merged), done["log"], done["seconds"], done["trained"])
    set_seed(seed)
    with own_forward(model):
        trainer = trainer_class(model, args, processing_class=tokenizer, peft_config=peft_config, **data)
        found = run_fit(trainer, folder)
        tuned = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    parts = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled  # of the weights, one in every process
    if parts:
        trainer.save_model(str(folder / "model"))
    elif trainer.is_world_process_zero():
        tuned.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    if trainer.is_world_process_zero():
        write_json(folder / FINISHED, {"log": found.log, "seconds": found.seconds, "trained": found.trained})
    if parts:
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.free_memory()
        return replace(found, model=_load(model, args, peft_config, merged))
    if not merged:
        return replace(found, model=tuned)
    return replace(found, model=joined(tuned) if isinstance(tuned, PeftModel) else tuned.requires_grad_(True))


def _load(model: PreTrainedModel, args: Any, peft_config: PeftConfig | None, merged: bool) -> Any:
    """What a stage has saved, whole."""
    folder, kind = Path(args.output_dir) / "model", type(model)
    options: dict[str, Any] = {"dtype": model.dtype}
    with whole_models(args):
        if peft_config is None:
            return kind.from_pretrained(folder, **options).to(args.device).eval()
        base: Any = model
        if _cut(model):
            options |= {"revision": getattr(model.config, "_commit_hash", None) or "main"}
            base = kind.from_pretrained(model.config._name_or_path, **options).to(args.device)
        tuned = PeftModel.from_pretrained(base, folder).eval()
    return joined(tuned) if merged else tuned


def _cut(model: PreTrainedModel) -> bool:
    """Whether ZeRO-3 has cut it over the processes."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
