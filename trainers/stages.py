"""Run a stage of training so that an interrupted one goes on, and a finished one is loaded instead of repeated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..files import write_json
from .fits import Fit, run_fit
from .processes import of_main
from .quantised import absorbed
from .training import anew, own_forward, save_tuned
from .whole import to_train, whole_models

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
    """Train the model in place, or an adapter that is then merged into it (`absorbed` by a quantised one); saved in
    `folder/model`, an adapter alone.

    Args:
        trainer_class: which is given the model, `args`, `data`, the tokenizer and `peft_config`.
        args: copied, never changed.
        merged: False leaves a new adapter beside the model, as whoever loads it has it.
        data: the trainer's data sets or stream.
    """
    args = anew(args, output_dir=str(folder), seed=seed)
    if of_main((folder / FINISHED).exists):
        done = json.loads((folder / FINISHED).read_text())
        return Fit(_load(model, args, peft_config, merged), done["log"], done["seconds"], done["trained"])
    set_seed(seed)
    trained, whole = to_train(model, args)
    with own_forward(trained):
        trainer = trainer_class(trained, args, processing_class=tokenizer, peft_config=peft_config, **data)
        found = run_fit(trainer, folder, whole, peft_config)
        tuned = found.model.eval()

    def save() -> None:
        save_tuned(tuned, tokenizer, folder / "model")
        write_json(folder / FINISHED, {"log": found.log, "seconds": found.seconds, "trained": found.trained})

    of_main(save)
    if not merged:
        return replace(found, model=tuned)
    return replace(found, model=absorbed(tuned) if isinstance(tuned, PeftModel) else tuned.requires_grad_(True))


def _load(model: PreTrainedModel, args: Any, peft_config: PeftConfig | None, merged: bool) -> Any:
    """What a stage has saved."""
    folder = Path(args.output_dir) / "model"
    if peft_config is None:
        with whole_models():
            return type(model).from_pretrained(folder, dtype=model.dtype).to(args.device).eval()
    tuned = PeftModel.from_pretrained(model, folder).eval()
    return absorbed(tuned) if merged else tuned
