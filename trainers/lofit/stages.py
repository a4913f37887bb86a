"""Run one fit, or the two stages of LoFiT, so that an interrupted one continues and a finished one is not repeated."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ...files import write_json
from ..fingerprint import model_fingerprint
from ..fits import Fit, run_fit
from ..processes import of_main
from ..training import anew, bare, own_forward, save_tuned
from ..whole import to_train
from .config import LofitConfig
from .selection import HeadSelection, learned_scores, top_heads
from .trainer import LofitDPOConfig, LofitDPOTrainer, LofitSFTConfig, LofitSFTTrainer

FINISHED = "finished.json"


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    args: LofitSFTConfig | LofitDPOConfig,
    out_dir: str | Path,
    *,
    peft_config: PeftConfig | None = None,
    **changes: Any,
) -> Fit:
    """Train one adapter in `out_dir`; continue from the newest complete checkpoint there, or load a finished one.

    Args:
        model: the base model (it is wrapped in place; `Fit.model.unload()` gives it back), or a `PeftModel`.
        rows: prompt/completion rows for an SFT config, prompt/chosen/rejected rows for a DPO config.
        args: copied, never changed.
        changes: fields of `args` that differ for this fit (`learning_rate=...`, `l1_lambda=...`, `seed=...`).
    """
    out_dir = Path(out_dir)
    args = anew(args, output_dir=str(out_dir), **changes)
    if of_main((out_dir / FINISHED).exists) and peft_config is not None:
        done = json.loads((out_dir / FINISHED).read_text())
        tuned = PeftModel.from_pretrained(model, out_dir)
        return Fit(tuned, done["log"], done["seconds"], done["trained"])

    set_seed(args.seed)  # initial values are drawn before the Trainer seeds itself; no arm depends on those before it
    trained, whole = to_train(model, args)
    with own_forward(bare(trained)):
        trainer = make_trainer(trained, tokenizer, rows, args, peft_config)
        found = run_fit(trainer, out_dir, whole, peft_config)

    def save() -> None:
        save_tuned(found.model, tokenizer, out_dir)
        write_json(out_dir / FINISHED, {"log": found.log, "seconds": found.seconds, "trained": found.trained})

    if peft_config is not None:
        of_main(save)
    return found


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    args: LofitSFTConfig | LofitDPOConfig,
    peft_config: PeftConfig | None = None,
) -> LofitSFTTrainer | LofitDPOTrainer:
    """The trainer of the loss that `args` stands for, given only the columns it reads."""
    if isinstance(args, LofitDPOConfig):
        rows = rows.select_columns(["prompt", "chosen", "rejected"])
        return LofitDPOTrainer(
            model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config
        )
    rows = rows.select_columns(["prompt", "completion"])
    return LofitSFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config)


def other_config(args: LofitSFTConfig | LofitDPOConfig) -> LofitSFTConfig | LofitDPOConfig:
    """The trainer's arguments for the other loss: what was given and both losses know is kept, the penalty is not."""
    config = LofitSFTConfig if isinstance(args, LofitDPOConfig) else LofitDPOConfig
    usual = type(args)(output_dir=args.output_dir)
    both = {f.name for f in fields(config)} & {f.name for f in fields(args)} - {"l1_lambda", "loss_type"}
    given = {name: getattr(args, name) for name in both if getattr(args, name) != getattr(usual, name)}
    return config(**{"output_dir": args.output_dir, **given})


def fit_scales(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    args: LofitSFTConfig | LofitDPOConfig,
    out_dir: str | Path,
    *,
    k: int,
    data_fingerprint: str,
    init_std: float = 1e-3,
    **changes: Any,
) -> HeadSelection:
    """Stage 1 (paper, 3.1): fit a scale for every head under an L1 penalty, keep the `k` of largest 2-norm.

    Writes `heads.json`; when it is there already, it is read and checked instead.

    Returns:
        The selection; `model` is the bare base again.

    Raises:
        ValueError: the `heads.json` found was made on another base or other rows.
    """
    path = Path(out_dir) / "heads.json"
    if of_main(path.exists):
        found = HeadSelection.load(path)
        found.check_base(model)
        if found.data_fingerprint != data_fingerprint:
            raise ValueError(
                f"{path} was selected on other training rows ({found.data_fingerprint}, now {data_fingerprint}); "
                "use another output folder"
            )
        return replace(found, heads=top_heads(found.scores, k), k=k)
    base = model_fingerprint(model)
    config = LofitConfig(component="scale", init_std=init_std, task_type="CAUSAL_LM")
    stage = fit(model, tokenizer, rows, args, out_dir, peft_config=config, **changes)
    scores = learned_scores(stage.model, "scale")
    stage.model.unload()
    seed = changes["seed"] if "seed" in changes else args.seed
    selection = HeadSelection(top_heads(scores, k), scores, k, seed, "learned", base, data_fingerprint)
    of_main(lambda: selection.save(path))
    return selection
