"""aTLAS: learn one coefficient per parameter block and task vector (Zhang et al., 2024, arXiv 2407.02880).

    accelerate launch recipes/atlas.py                                   # embedded world, CPU, offline, three seeds
    accelerate launch recipes/atlas.py --preset smoke                    # the same in miniature, within a minute
    accelerate launch recipes/atlas.py --config recipes/configs/atlas/llama32_1b.yaml
    accelerate launch --num_processes 8 recipes/atlas.py --base BASE --task_vectors code=A maths=B chat=C \\
        --tasks code=code.jsonl maths=maths.jsonl chat=owner/name

Composes task vectors (differences of fine-tuned models, or LoRA adapters, to one base) into one model, and beside that
runs what one would try instead (--arms), on these questions (--sections): all tasks at once (addition), from few rows
(data), new tasks from few rows (fewshot) and with a few of the vectors (budget), forgetting a task (negation). Prints
a table for each with intervals, and the claims that hold or do not. Every flag of TRL's trainer and ModelConfig works,
--config FILE.yaml holds the same flags, --dry_run shows rows, masks and memory.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import set_seed
from trl import ModelConfig

from steerbook.arguments import RecipeArguments, RecipeParser, check_unused, flags_and_defaults, refuse
from steerbook.console import clear_errors, quiet_libraries, run_main
from steerbook.data_builders import atlas as atlas_data
from steerbook.data_builders.atlas import AtlasDataArguments, skills
from steerbook.data_builders.rows import fingerprint
from steerbook.eval.atlas import Completions, disentanglement, evaluate, predicted
from steerbook.eval.atlas.report import read_records, show, write_report
from steerbook.eval.environment import peak_memory
from steerbook.eval.report import RunFolder
from steerbook.trainers.atlas.arguments import ArmArguments, arm_key
from steerbook.trainers.atlas.arms import SECTIONS
from steerbook.trainers.atlas.bench import Arm, Bench
from steerbook.trainers.atlas.checks import check_flags, check_sections, check_vectors
from steerbook.trainers.atlas.dry_run import check_engine, dense_composing, low_rank_composing, show_composing
from steerbook.trainers.atlas.low_rank import LowRankComposer
from steerbook.trainers.atlas.stages import text_columns
from steerbook.trainers.atlas.trainer import AtlasConfig, AtlasTrainer
from steerbook.trainers.atlas.vectors import Making, competent_base, embedded_vectors, given_vectors
from steerbook.trainers.base_model import load_base
from steerbook.trainers.dry_run import launch_of, show_dry_run
from steerbook.trainers.multitask import MultiTaskConfig, MultiTaskTrainer, tokenised
from steerbook.trainers.processes import of_main
from steerbook.trainers.seeds import run_seeds
from steerbook.trainers.tiny_lm import TinyConfig, tiny_lm

# Chosen on dev rows of the worlds 10 to 13; the worlds reported are 0 to 2.
SKILLS = {
    "sections": ["addition", "data", "fewshot", "negation"], "exclude": [], "max_steps": 100,
    "per_device_train_batch_size": 128, "learning_rate": 0.2, "weight_decay": 0.01,
    "isotropic_learning_rate": 0.1, "adamerging_learning_rate": 1e-2, "joint_learning_rate": 1e-3, "other_steps": 50,
    "search_budget": 40, "data_steps": 40, "shot_steps": 40, "shot_learning_rate": 2e-4,
    "shot_coefficient_rate": 0.05, "shot_weight_decay": 0.5, "lora_learning_rate": 1e-3,
    "forget": ["max", "dup", "cnt"], "negation_learning_rate": 0.1, "negation_cap": 3.0, "negation_retain": 10.0,
    "negation_steps": 40, "max_length": 32, "train_eos": False, "save_strategy": "no", "logging_steps": 10,
    "eval_batch_size": 256}  # fmt: skip
PRESETS: dict[tuple[bool, str], dict[str, Any]] = {  # (embedded world?, preset)
    (True, "default"): SKILLS | {"seeds": [0, 1, 2]},
    (True, "smoke"): SKILLS | {
        "world": "smoke", "sections": ["addition"], "max_steps": 40,
        "arms": ["tuned", "alpha", "isotropic", "atlas", "joint"]},
    (False, "default"): {"save_strategy": "epoch", "save_total_limit": 2},
    (False, "smoke"): {"max_steps": 2, "max_fit_rows": 16, "max_eval_rows": 8, "save_strategy": "no"},
}  # fmt: skip
TINY = TinyConfig(
    hidden_size=96, intermediate_size=192, layers=2, heads=6, kv_heads=2, head_dim=20, steps=1600, batch_size=36,
    length=38, learning_rate=4e-3, unfocused_weight=0.02)  # fmt: skip
TINY_STEPS = {"default": 1600, "smoke": 400}
MAKING = {"vector": Making(1e-3), "LoRA": Making(1e-2, rank=8)}  # of 40 steps of 64 rows
PRELOAD = ["steerbook.trainers.atlas.arms", "steerbook.eval.atlas.report", "steerbook.trainers.tiny_lm"]


@dataclass
class VectorArguments:
    """Where base and task vectors come from. Without them: the embedded world, whose vectors are made here."""

    base: str | None = field(default=None, metadata={"help": "The base model; the same as --model_name_or_path."})
    task_vectors: list[str] | None = field(
        default=None,
        metadata={"help": "Fine-tuned models, LoRA adapters (folders, Hub ids), saved vectors, as PATH or name=PATH; "
                  "where the name is that of a task, the vector counts as that task's."},
    )  # fmt: skip
    vector_dtype: Literal["auto", "float32", "float16", "bfloat16"] = field(
        default="auto", metadata={"help": "Type that differences are kept in; auto: that of the checkpoint."}
    )


class Settings(NamedTuple):
    """The parsed command line."""

    recipe: RecipeArguments
    arms: ArmArguments
    data: AtlasDataArguments
    vectors: VectorArguments
    training: AtlasConfig
    model: ModelConfig


def parse(argv: list[str]) -> Settings:
    """Defaults, then the preset, then --config, then the command line."""
    first = RecipeParser((RecipeArguments, AtlasDataArguments), add_help=False)
    recipe, data, *_ = first.parse_args_and_config(argv, return_remaining_strings=True)
    parser = RecipeParser(
        (RecipeArguments, ArmArguments, AtlasDataArguments, VectorArguments, AtlasConfig, ModelConfig)
    )
    name = "atlas" + ("-skills" if data.tasks is None else "") + ("-smoke" if recipe.preset == "smoke" else "")
    parser.set_defaults_with_config(output_dir=f"runs/{name}", **PRESETS[data.tasks is None, recipe.preset])
    settings = Settings(*parser.parse_args_and_config(argv))
    vectors, model = settings.vectors, settings.model
    if vectors.base is not None:
        if model.model_name_or_path not in (None, vectors.base):
            raise ValueError(f"--base {vectors.base} and --model_name_or_path {model.model_name_or_path} differ")
        model.model_name_or_path = vectors.base
    given = [model.model_name_or_path, vectors.task_vectors, data.tasks]
    if any(value is None for value in given) and not all(value is None for value in given):
        raise ValueError("--base, --task_vectors and --tasks go together; without any it is the embedded world")
    if model.model_name_or_path is None:
        refuse(model, ("load_in_4bit", "load_in_8bit"), "is for a base of your own: give --base")
    check_unused(settings.training, model)
    check_flags(settings.training, toy=model.model_name_or_path is None)
    return settings


def check_run(settings: Settings, data: Any) -> str:
    """Before any time is spent: ValueError for what these tasks and vectors do not allow. A key of given vectors."""
    known = set(data["test"].filter(lambda role: role == "known", input_columns="role")["task"])
    sources = settings.vectors.task_vectors
    named = known if sources is None else {source.rpartition("=")[0] for source in sources} & known
    count = len(known if sources is None else sources)
    check_sections(settings.arms, Counter(data["fit"]["task"]), known, named, count, quantised(settings))
    if sources is None:
        return "embedded"
    vectors, _ = given_vectors(settings.model, sources, settings.vectors.vector_dtype)
    return check_vectors(settings.arms, vectors, quantised(settings))


def quantised(settings: Settings) -> bool:
    return settings.model.load_in_4bit or settings.model.load_in_8bit


def load(settings: Settings, args: AtlasDataArguments, data: Any, seed: int, keep_in: Path | None = None) -> Any:
    """Base model and tokenizer: a real one, or the tiny one of this seed."""

    def tiny() -> Path:
        config = TINY if args.tasks is None else replace(TINY, tokenizer="byte", length=256, batch_size=4)
        config = replace(config, steps=0 if settings.recipe.dry_run else TINY_STEPS[args.world])
        focus = skills.FOCUS if args.tasks is None else ()
        bar = len(settings.recipe.seeds) == 1  # several seeds train theirs side by side
        return tiny_lm(atlas_data.base_corpus(args, data), seed=seed, config=config, focus=focus, progress=bar)

    set_seed(seed)
    return load_base(settings.model, tiny, keep_in, settings.training.device)


def load_vectors(settings: Settings, data: Any, base: Any, tokenizer: Any, seed: int, report: Any) -> Any:
    """Name -> vector: dense ones, and LoRA ones; and a base to forget from, with the vectors to that."""
    if settings.vectors.task_vectors is not None:
        dense, lora = given_vectors(settings.model, settings.vectors.task_vectors, settings.vectors.vector_dtype)
        return dense, lora, base, dense
    dry = settings.recipe.dry_run  # one step, without warm-up: a vector of zeros would be refused
    args = MultiTaskConfig(
        settings.training.output_dir, max_steps=1 if dry else 40, per_device_train_batch_size=64, seed=seed,
        lr_scheduler_type="cosine", warmup_steps=0 if dry else 5, max_length=32, disable_tqdm=True, save_strategy="no",
        train_eos=False,
    )  # fmt: skip
    content, tasks = fingerprint(data["train"]), list(dict.fromkeys(data["train"]["task"]))
    rows = cache(partial(tokenised, base, tokenizer, data["train"], args))
    made = []
    for kind, making in MAKING.items():
        wanted = kind == "vector" or {"atlas_lora", "lorahub"} & set(settings.arms.arms)
        made.append(embedded_vectors(base, tokenizer, rows, tasks, content, args, making) if wanted else {})
        report(f"{len(made[-1])} task vectors ({kind})")
    if "negation" not in settings.arms.sections:
        return *made, base, made[0]
    joint = replace(args, max_steps=1 if dry else 20, per_device_train_batch_size=192)
    competent = competent_base(base, tokenizer, rows, content, joint, 4e-4)
    more = embedded_vectors(competent, tokenizer, rows, settings.arms.forget, content, args, MAKING["vector"])
    report(f"{len(more)} task vectors (to forget)")
    return *made, competent, more


def run_seed(argv: list[str], seed: int, report: Any) -> None:
    """Everything for one seed: base, vectors, arms, and what each scores, written as soon as it is there."""
    settings = parse(argv)
    training, toy = settings.training, settings.model.model_name_or_path is None
    training.seed = seed
    if toy:  # one bar stands for all arms and seeds
        quiet_libraries()
        training.disable_tqdm = True
    scoring = {"batch_size": settings.recipe.eval_batch_size, "progress": not toy}
    folder = Path(training.output_dir) / f"seed_{seed}"
    args = atlas_data.of_seed(settings.data, seed)
    data = atlas_data.build(args)
    base, tokenizer = load(settings, args, data, seed, folder)
    vectors, lora_vectors, competent, to_forget = load_vectors(settings, data, base, tokenizer, seed, report)
    known = list(dict.fromkeys(data["test"].filter(lambda role: role == "known", input_columns="role")["task"]))
    done = of_main(lambda: {file.parent.name for file in folder.glob("*/measured.json")})
    for key in sorted(done):
        report(f"{key} (measured before)")

    @lru_cache(maxsize=2)  # the arms look at the same rows many times
    def encoded(rows: Any) -> Completions:
        return Completions(tokenizer, rows.to_list())

    def score(model: Any, rows: Any) -> tuple[float, float]:
        return encoded(rows).means(model, **scoring)

    @cache
    def test(*tasks: str) -> Completions:
        return Completions(tokenizer, data["test"].filter(lambda task: task in tasks, input_columns="task").to_list())

    control = data["control"].to_list()

    tuning = MultiTaskConfig(
        training.output_dir, max_steps=training.max_steps, num_train_epochs=training.num_train_epochs, seed=seed,
        per_device_train_batch_size=training.per_device_train_batch_size, lr_scheduler_type="cosine",
        max_length=training.max_length, train_eos=training.train_eos, save_strategy="no",
        disable_tqdm=training.disable_tqdm,
    )  # fmt: skip
    # Once for all the short fits; on a quantised base TRL makes no trainer without an adapter, so there for each fit.
    fit, dev = data["fit"] if quantised(settings) else tokenised(base, tokenizer, data["fit"], tuning), data["dev"]
    bench = Bench(base, tokenizer, known, vectors, lora_vectors, fit, dev, training, tuning, settings.arms, folder,
                  score, done)  # fmt: skip
    for section in settings.arms.sections:
        forgetting = replace(bench, base=competent, vectors=to_forget, lora_vectors={})
        for arm in SECTIONS[section](forgetting if section == "negation" else bench):
            tasks = known if arm.task is None or section == "negation" else [arm.task]
            splits = {"test": test(*tasks).samples(arm.model, **scoring)}
            if section not in ("data", "budget") and arm.name != "tuned":
                splits["control"] = evaluate(arm.model, tokenizer, control, **scoring)["samples"]
            facts = {"peak_memory_bytes": peak_memory(), "splits": splits}
            if arm.key == arm_key("addition", "atlas") and 1 < len(known) and set(known) <= set(vectors):
                matrix = entangled(arm, known, data["dev"], tokenizer, scoring)
                facts |= {"disentanglement": matrix, "disentanglement_tasks": known}
            arm.record(folder, **facts)
            report(arm.key)


def entangled(arm: Arm, known: list[str], rows: Any, tokenizer: Any, scoring: Any) -> list[list[float]]:
    """Share of each task's (dev) rows whose label changes as another vector joins its own, at the learned values."""
    own = {task: Completions(tokenizer, [row for row in rows if row["task"] == task]) for task in known}
    pairs = arm.pairs(known, lambda model, task: predicted(own[task].samples(model, **scoring)))
    return disentanglement(pairs)["matrix"]


def main(argv: list[str]) -> None:
    with clear_errors(ValueError, OSError):
        settings = parse(argv)
        training, seeds = settings.training, settings.recipe.seeds
        toy = settings.model.model_name_or_path is None
        args = [atlas_data.of_seed(settings.data, seed) for seed in seeds]
        data = [atlas_data.build(one) for one in args]
        contents = check_run(settings, data[0])
        if settings.recipe.dry_run:
            quiet_libraries()
            model, tokenizer = load(settings, args[0], data[0], seeds[0])
            vectors, lora_vectors, *_ = load_vectors(settings, data[0], model, tokenizer, seeds[0], lambda text: None)
            given, rows, plan = list(vectors.values()), text_columns(data[0]["fit"]), settings.recipe.plan
            check_engine(launch_of(training, plan["engine"]).engine, low_rank=lora_vectors is vectors)
            with tempfile.TemporaryDirectory() as training.output_dir:  # the Trainer makes its folder at once
                if lora_vectors is vectors:
                    composer = LowRankComposer(model, given, settings.arms.low_rank_mode)
                    composing = low_rank_composing(composer)
                    trainer: Any = AtlasTrainer(composer, training, rows, tokenizer)
                else:
                    composing = dense_composing(model, given, settings.arms)
                    trainer = MultiTaskTrainer(model, training, rows, processing_class=tokenizer)
                show_dry_run(trainer, tokenizer, composition=composing.memory, **plan)
                return show_composing(composing)
        flags, defaults = flags_and_defaults(settings)
        run = RunFolder(training.output_dir, recipe="atlas", toy=toy, arguments=flags, defaults=defaults)
    with clear_errors(ValueError, OSError, FloatingPointError), run:
        counts = {split: len(rows) for split, rows in data[0].items()}
        run.data("-".join([*(fingerprint(rows)[:12] for rows in data), contents[:12]]), counts)
        if run.finished:
            print(f"{run.path} is finished; these are its results. Another --output_dir runs it again.")
        else:
            if toy:
                print("A toy: tiny models, trained here once and cached. It shows nothing about large models.")
            run_seeds(run_seed, argv, seeds, None, PRELOAD, parallel=toy and training.world_size == 1)
            base = {"name": "tiny_lm", "folder": f"seed_{seeds[0]}/base_model"} if toy else {
                "name": settings.model.model_name_or_path, "revision": settings.model.model_revision}  # fmt: skip
            write_report(run, read_records(run.path, seeds), base)
    show(run)


if __name__ == "__main__":
    run_main(main)
