"""LoFiT: choose a few attention heads, learn one offset vector for each (Yin, Ye and Durrett, 2024, arXiv 2406.01563).

    accelerate launch recipes/lofit.py                                   # embedded world, CPU, offline, three seeds
    accelerate launch recipes/lofit.py --preset smoke                    # the same in miniature, within a minute
    accelerate launch recipes/lofit.py --config recipes/configs/lofit/llama2_7b_truthfulqa.yaml
    accelerate launch --num_processes 8 recipes/lofit.py --config recipes/configs/lofit/llama3_8b_truthfulqa.yaml \\
        --per_device_train_batch_size 1                                  # the paper's batch of 8 over 8 GPUs
    accelerate launch recipes/lofit.py --dataset mquake --data_files DIR --model_name_or_path MODEL

Tunes LoFiT and, on the same base, rows and loss, what one would try instead (--arms), and prints one table of all of
them on held-out questions, with intervals and the claims that hold or do not. Every flag of TRL's trainer and
ModelConfig works, --config FILE.yaml holds the same flags, --dry_run shows rows, masks, parameters and memory.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import set_seed
from trl import ModelConfig

from steerbook.arguments import RecipeArguments, RecipeParser, check_unused, flags_and_defaults
from steerbook.console import clear_errors, quiet_libraries, run_main
from steerbook.data_builders import lofit as lofit_data
from steerbook.data_builders.lofit import LofitDataArguments, myths
from steerbook.data_builders.rows import fingerprint
from steerbook.eval.environment import peak_memory
from steerbook.eval.lofit import evaluate, measure
from steerbook.eval.lofit.report import read_records, show, write_report
from steerbook.eval.report import RunFolder
from steerbook.files import write_json
from steerbook.trainers.base_model import check_quantised, load_base
from steerbook.trainers.dry_run import show_dry_run
from steerbook.trainers.fingerprint import model_fingerprint
from steerbook.trainers.lofit import LofitConfig, LofitDPOConfig, LofitSFTConfig
from steerbook.trainers.lofit.arguments import ArmArguments, arm_key
from steerbook.trainers.lofit.arms import train_arms
from steerbook.trainers.lofit.selection import grid
from steerbook.trainers.lofit.stages import make_trainer, other_config
from steerbook.trainers.processes import of_main
from steerbook.trainers.seeds import run_seeds
from steerbook.trainers.tiny_lm import TinyConfig, tiny_lm
from steerbook.trainers.whole import check_engine

PAPER = {"l1_lambda": 5e-4, "selection_learning_rate": 5e-3, "learning_rate": 1e-2}  # spec: Llama-2-7B, TruthfulQA
# Chosen on dev questions of worlds 10-14 and 20-24 (RED's on all of 20-22); the worlds reported are 0-2.
MYTHS = {
    "l1_lambda": 1e-3, "selection_learning_rate": 5e-2, "learning_rate": 0.3, "num_train_epochs": 15,
    "all_heads_learning_rate": 0.1, "lora_learning_rate": 5e-4, "red_learning_rate": 3e-2,
    "iti_alphas": [5.0, 15.0, 50.0, 150.0, 500.0], "save_strategy": "no", "eval_batch_size": 256,
    "repeat_selection": True}  # fmt: skip
PRESETS: dict[tuple[bool, str], dict[str, Any]] = {  # (embedded world?, preset)
    (True, "default"): MYTHS | {"seeds": [0, 1, 2]},
    (True, "smoke"): MYTHS | {
        "world": "smoke", "draws": 1, "lora_learning_rate": 2e-3, "heads_percent": [12.5],
        "arms": ["lofit", "random", "lora"]},
    (False, "default"): PAPER | {"save_strategy": "epoch", "save_total_limit": 2},
    (False, "smoke"): PAPER | {
        "max_steps": 2, "max_train_rows": 16, "max_eval_rows": 8, "draws": 1, "save_strategy": "no"},
}  # fmt: skip
TINY = {  # the bases of the two worlds
    "default": TinyConfig(),
    "smoke": TinyConfig(hidden_size=64, intermediate_size=128, layers=3, heads=8, kv_heads=4, steps=200,
                        warmup_steps=20)}  # fmt: skip
TINY_BYTES = replace(TINY["smoke"], tokenizer="byte", layers=2, steps=100, length=256, batch_size=4)
PRELOAD = ["steerbook.trainers.lofit.arms", "steerbook.eval.lofit.report", "steerbook.trainers.tiny_lm"]


class Settings(NamedTuple):
    """The parsed command line."""

    recipe: RecipeArguments
    arms: ArmArguments
    data: LofitDataArguments
    training: LofitSFTConfig | LofitDPOConfig
    model: ModelConfig


def parse(argv: list[str]) -> Settings:
    """Defaults, then the preset, then --config, then the command line. The loss decides whose trainer flags exist."""
    first = RecipeParser((RecipeArguments, LofitDataArguments), add_help=False)
    recipe, data, *_ = first.parse_args_and_config(argv, return_remaining_strings=True)
    config = LofitDPOConfig if lofit_data.resolved_loss(data) == "dpo" else LofitSFTConfig
    parser = RecipeParser((RecipeArguments, ArmArguments, LofitDataArguments, config, ModelConfig))
    name = f"lofit-{data.dataset}" + ("-smoke" if recipe.preset == "smoke" else "")
    parser.set_defaults_with_config(output_dir=f"runs/{name}", **PRESETS[data.dataset == "myths", recipe.preset])
    settings = Settings(*parser.parse_args_and_config(argv))
    check_unused(settings.training, settings.model)
    check_quantised(settings.model, settings.training, adapter=True)
    check_engine(settings.training, toy=settings.model.model_name_or_path is None)
    return settings


def load(settings: Settings, data: Any, args: LofitDataArguments, seed: int, keep_in: Path | None = None) -> Any:
    """Base model and tokenizer: a real one, or the tiny one of this seed."""

    def tiny() -> Path:
        config = TINY[args.world] if args.dataset == "myths" else TINY_BYTES
        config = replace(config, steps=0) if settings.recipe.dry_run else config
        focus = myths.FOCUS if args.dataset == "myths" else ()
        bar = len(settings.recipe.seeds) == 1  # several seeds train theirs side by side
        return tiny_lm(lofit_data.base_corpus(args, data), seed=seed, config=config, focus=focus, progress=bar)

    set_seed(seed)
    model, tokenizer = load_base(settings.model, tiny, keep_in, settings.training.device)
    settings.arms.check(model, sum(grid(model).values()))
    return model, tokenizer


def run_seed(argv: list[str], seed: int, report: Any) -> None:
    """Everything for one seed: base, arms, and what each scores, written to its folder as soon as it is there."""
    settings = parse(argv)
    training, toy = settings.training, settings.model.model_name_or_path is None
    training.seed = seed
    if toy:  # one bar stands for all arms and seeds
        quiet_libraries()
        training.disable_tqdm = True
    scoring = {"batch_size": settings.recipe.eval_batch_size, "progress": not toy}
    folder = Path(training.output_dir) / f"seed_{seed}"
    args = lofit_data.of_seed(settings.data, seed)
    data = lofit_data.build(args)
    base, tokenizer = load(settings, data, args, seed, folder)
    done = of_main(lambda: {file.parent.name for file in folder.glob("*/measured.json")})
    for key in sorted(done):
        report(f"{key} (measured before)")

    def record(name: str, splits: dict[str, Any], k: int | None = None, draw: int = 0, **facts: Any) -> None:
        key = arm_key(name, k, draw)
        facts["peak_memory_bytes"] = peak_memory()
        write_json(folder / key / "measured.json", {"name": name, "k": k, "draw": draw, **facts, "splits": splits})
        report(key)

    def dev_score(model: Any) -> float:
        """MC1 + MC2: MC1 alone is 0 for many settings that MC2 tells apart."""
        metrics = evaluate(model, tokenizer, data["dev_eval"], **scoring)["metrics"]
        return metrics["mc1"]["value"] + metrics["mc2"]["value"]

    if "base" not in done:
        heads = sum(grid(base).values())
        facts = {"trained": 0, "seconds": 0.0, "total_heads": heads, "ks": settings.arms.ks(heads),
                 "loss": lofit_data.resolved_loss(args), "base_fingerprint": model_fingerprint(base)}  # fmt: skip
        record("base", measure(base, tokenizer, data, **scoring), **facts)
    if "marker_prompt" in data["test"].column_names and "marker" not in done:
        record("marker", measure(base, tokenizer, data, prompt="marker_prompt", **scoring), trained=0, seconds=0.0)
    other = lofit_data.other_loss(args)
    for arm in train_arms(
        base, tokenizer, data["train"], training, settings.arms, folder, done=done, score=dev_score,
        data_fingerprint=fingerprint(data["train"]),
        other=None if other is None else (lofit_data.build(other)["train"], other_config(training)),
    ):  # fmt: skip
        names = ("k", "draw", "trained", "seconds", "heads", "heads_again", "log")
        facts = {name: getattr(arm, name) for name in names}
        record(arm.name, measure(arm.model, tokenizer, data, **scoring), **facts)


def main(argv: list[str]) -> None:
    with clear_errors(ValueError, OSError):
        settings = parse(argv)
        training, seeds = settings.training, settings.recipe.seeds
        toy = settings.model.model_name_or_path is None
        args = [lofit_data.of_seed(settings.data, seed) for seed in seeds]
        data = [lofit_data.build(one) for one in args]
        if settings.recipe.dry_run:
            quiet_libraries()
            model, tokenizer = load(settings, data[0], args[0], seeds[0])
            with tempfile.TemporaryDirectory() as training.output_dir:  # the Trainer makes its folder at once
                trainer = make_trainer(model, tokenizer, data[0]["train"], training, LofitConfig(component="scale"))
                return show_dry_run(trainer, tokenizer, **settings.recipe.plan)
        flags, defaults = flags_and_defaults(settings)
        run = RunFolder(training.output_dir, recipe="lofit", toy=toy, arguments=flags, defaults=defaults)
    with clear_errors(ValueError, OSError, FloatingPointError), run:
        counts = {split: len(rows) for split, rows in data[0].items()}
        run.data("-".join(fingerprint(rows)[:12] for rows in data), counts)
        if run.finished:
            print(f"{run.path} is finished; these are its results. Another --output_dir runs it again.")
        else:
            if toy:
                print("A toy: tiny models, trained here once and cached. It shows nothing about large models.")
            arms = settings.arms.keys(wrong_answers=lofit_data.other_loss(args[0]) is not None)
            steps = len(arms) + 1 + ("marker_prompt" in data[0]["test"].column_names)
            run_seeds(run_seed, argv, seeds, steps, PRELOAD, parallel=toy and training.world_size == 1)
            base = {"name": "tiny_lm", "folder": f"seed_{seeds[0]}/base_model"} if toy else {
                "name": settings.model.model_name_or_path, "revision": settings.model.model_revision}  # fmt: skip
            write_report(run, read_records(run.path, seeds), base)
    show(run)


if __name__ == "__main__":
    run_main(main)
