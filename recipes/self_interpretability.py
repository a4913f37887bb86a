"""Self-interpretability: instil preferences by choices, then ask the model to report them (arXiv 2505.17120).

    accelerate launch recipes/self_interpretability.py                  # the embedded world, three seeds, on a CPU
    accelerate launch recipes/self_interpretability.py --preset smoke   # the same in miniature, within a minute
    accelerate launch recipes/self_interpretability.py --levels L1 L2   # harder: names of two words

A tiny model is made that chooses for some agents and reports their preferences. Then it learns others' preferences
from choices alone; the weights behind its choices are measured exactly, and it is asked to report them (experiment 1).
It is trained to report those of one half of the agents and asked about the other half (experiment 2), and about agents
whose preferences were there before (experiment 3). Beside it stand controls, and easier and harder ways of instilling.
Prints one table with every seed, intervals, and the claims that hold or do not. Every flag of TRL's trainer works for
the first stage, --config FILE.yaml holds the same flags, --dry_run shows rows and memory.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from transformers import AutoModelForCausalLM

from steerbook.arguments import RecipeArguments, RecipeParser, check_unused, flags_and_defaults
from steerbook.console import clear_errors, quiet_libraries
from steerbook.data_builders.self_interpretability.asking import world_choices, world_questions
from steerbook.data_builders.self_interpretability.contexts import Context
from steerbook.data_builders.self_interpretability.splits import split_contexts
from steerbook.data_builders.self_interpretability.trials import draw_weights
from steerbook.data_builders.self_interpretability.world import (
    Part,
    World,
    WorldStream,
    make_world,
    vocabulary_text,
)  # fmt: skip
from steerbook.eval.environment import peak_memory
from steerbook.eval.report import RunFolder
from steerbook.eval.results import read_records
from steerbook.eval.self_interpretability.measure import measure, readable
from steerbook.eval.self_interpretability.report import show, write_report
from steerbook.eval.self_interpretability.summary import instilled_r
from steerbook.files import write_json
from steerbook.trainers.dry_run import show_dry_run
from steerbook.trainers.fits import Fit
from steerbook.trainers.seeds import run_seeds
from steerbook.trainers.self_interpretability.arms import Arm, StageArguments, check, report_config
from steerbook.trainers.self_interpretability.base import answering_model
from steerbook.trainers.self_interpretability.stages import run_stage
from steerbook.trainers.self_interpretability.trainer import PreferenceConfig, PreferenceTrainer
from steerbook.trainers.tiny_lm import TinyConfig, build_tokenizer

COMMON = {
    "learning_rate": 6e-3, "adam_beta2": 0.98, "weight_decay": 0.01, "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.05}, "save_strategy": "no", "logging_steps": 50,
    "report_learning_rate": 4e-3, "report_warmup_steps": 20, "eval_batch_size": 512}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "default": COMMON | {"seeds": [0, 1, 2], "max_steps": 290, "warmup_steps": 40,
        "report_max_steps": 110, "reinstil_max_steps": 200},
    "smoke": COMMON | {
        "seeds": [0], "known": 24, "native": 4, "instilled": 24, "never": 4, "trials": 50, "base_steps": 450,
        "max_steps": 110, "warmup_steps": 20, "report_max_steps": 60, "report_warmup_steps": 10, "levels": ["L1"],
        "folds": [0], "controls": ["shuffled"], "gate": 0.0, "logging_steps": 10}}  # fmt: skip
BASE, INSTIL, REPORT = (192, 64), (230, 26), 256  # rows of a step: decisions and reports; or both together
PRELOAD = ["steerbook.trainers.self_interpretability.stages", "steerbook.trainers.self_interpretability.base",
           "steerbook.eval.self_interpretability.report", "steerbook.eval.self_interpretability.measure"]  # fmt: skip


@dataclass
class WorldArguments:
    """The embedded world: agents, and what is measured of each."""

    known: int = field(default=80, metadata={"help": "Agents that the base model chooses and reports for."})
    native: int = field(default=20, metadata={"help": "Agents that the base model chooses for."})
    instilled: int = field(default=80, metadata={"help": "Agents whose preferences are instilled by choices."})
    never: int = field(default=16, metadata={"help": "Agents of which no row ever speaks."})
    trials: int = field(
        default=100, metadata={"help": "Fresh choices of each agent, in both orders, for its weights."}
    )
    base_steps: int = field(default=1000, metadata={"help": "Training steps of the base model."})

    def __post_init__(self) -> None:
        for name, least in (("known", 1), ("native", 0), ("never", 0), ("trials", 12), ("base_steps", 0)):
            if getattr(self, name) < least:
                why = ", to fit five weights and an intercept to each half" if name == "trials" else ""
                raise ValueError(f"--{name} {getattr(self, name)}: at least {least}{why}")


class Settings(NamedTuple):
    """The parsed command line."""

    recipe: RecipeArguments
    stage: StageArguments
    world: WorldArguments
    training: PreferenceConfig


def parse(argv: list[str]) -> Settings:
    """Defaults, then the preset, then --config, then the command line."""
    recipe, *_ = RecipeParser((RecipeArguments,), add_help=False).parse_args_and_config(
        argv, return_remaining_strings=True
    )
    parser = RecipeParser((RecipeArguments, StageArguments, WorldArguments, PreferenceConfig))
    name = "self_interpretability" + ("" if recipe.preset == "default" else f"-{recipe.preset}")
    parser.set_defaults_with_config(output_dir=f"runs/{name}", **PRESETS[recipe.preset])
    settings = Settings(*parser.parse_args_and_config(argv))
    check_unused(settings.training)
    check(settings.training, settings.stage, (sum(INSTIL), REPORT))
    if settings.training.part != "all":
        raise ValueError(f"--part {settings.training.part} has no effect here: --levels says what is instilled where")
    return settings


class Side:
    """The embedded world of one seed and difficulty: agents, what each stage reads, and what is asked."""

    def __init__(self, settings: Settings, seed: int, level: str) -> None:
        self.settings, self.seed, self.first, sizes = settings, seed, settings.stage.levels[0], settings.world
        self.world: World = make_world(
            seed, sizes.known, sizes.native, sizes.instilled, sizes.never,
            "two" if level == "L2" else "one", "own" if level == "L4" else "common",
        )  # fmt: skip
        self.tokenizer: Any = build_tokenizer(vocabulary_text(self.world))
        rng = Random(f"new weights {seed}")
        self.others = {one.name: draw_weights(rng, len(one.attributes)) for one in self.world.instilled}
        asked = (*self.world.instilled, *self.world.native)
        self.trials = world_choices(self.world, asked, sizes.trials, Random(f"trials {seed}"))
        everyone = (*self.world.known, *self.world.native, *self.world.instilled, *self.world.never)
        self.questions = world_questions(everyone)

    def halves(self, fold: int) -> tuple[tuple[Context, ...], tuple[Context, ...], tuple[Context, ...]]:
        """Agents whose reports are trained, those to choose by, and those tested."""
        split = split_contexts(self.world.instilled, self.seed, fold, len(self.world.instilled), 0, 0)
        return split.report_train, split.report_dev, split.report_test

    def stream(self, *parts: Part) -> WorldStream:
        def token(text: str) -> int:
            return int(self.tokenizer(text, add_special_tokens=False)["input_ids"][0])

        return WorldStream(self.world, parts, self.seed, token, [self.tokenizer.bos_token_id])

    def base(self, progress: bool) -> Any:
        decisions, reports = BASE
        parts = (Part("decision", decisions, self.world.known + self.world.native, few=8,
                      until=self.settings.world.base_steps // 6),
                 Part("report", reports, self.world.known))  # fmt: skip
        config = TinyConfig(hidden_size=64, intermediate_size=128, layers=2, heads=4, kv_heads=4, head_dim=16,
                            tied=False, steps=self.settings.world.base_steps, learning_rate=4e-3)  # fmt: skip
        folder = answering_model(self.tokenizer, self.stream(*parts), seed=self.seed, config=config, progress=progress)
        return AutoModelForCausalLM.from_pretrained(folder)

    def instil(self, agents: tuple[Context, ...], weights: Any = None) -> WorldStream:
        """Decisions of these agents, and reports of known ones, lest their language is lost."""
        decisions, reports = INSTIL
        return self.stream(Part("decision", decisions, agents, weights), Part("report", reports, self.world.known))

    def report(self, fold: int, weights: Any = None, decided: Any = None) -> WorldStream:
        """Reports of the agents to train on, and replayed decisions of all instilled ones."""
        replayed = round(REPORT * self.settings.stage.replay)
        return self.stream(Part("report", REPORT - replayed, self.halves(fold)[0], weights),
                           Part("decision", replayed, self.world.instilled, decided))  # fmt: skip

    def shuffled(self, fold: int) -> dict[str, Any]:
        """The weights of the agents to train on, handed around among them."""
        names = [one.name for one in self.halves(fold)[0]]
        mixed = Random(f"shuffled {self.seed}").sample(names, len(names))
        return {
            **self.world.weights,
            **{one: self.world.weights[other] for one, other in zip(names, mixed, strict=True)},
        }

    def contexts(self, model: Any, arm: Arm) -> dict[str, Any]:
        """Of every agent its set, its weights, and what was found; choices where a row of the table needs them."""
        chosen = arm.kind in ("instilled", "reinstil") or (arm.kind == "reported" and arm.level == self.first)
        found = measure(model, self.tokenizer, self.trials if chosen else [], self.questions,
                        batch_size=self.settings.recipe.eval_batch_size)  # fmt: skip
        trained, dev, tested = self.halves(arm.fold or 0)
        sets = {"known": self.world.known, "native": self.world.native, "never": self.world.never,
                "report_train": trained, "report_dev": dev, "report_test": tested}  # fmt: skip
        roles = {one.name: role for role, agents in sets.items() for one in agents}
        return {name: {"role": roles[name], "target": self.world.weights[name], **one} for name, one in found.items()}


def run_seed(argv: list[str], seed: int, report: Any) -> None:
    """Everything for one seed: each arm's model, and what was measured of it, written to its folder at once."""
    settings = parse(argv)
    stage, training = settings.stage, settings.training
    quiet_libraries()
    training.disable_tqdm = True
    folder = Path(training.output_dir) / f"seed_{seed}"
    sides: dict[str, Side] = {}
    models: dict[str, Any] = {}

    for number, arm in enumerate(stage.planned()):
        side = sides.get(arm.world) or sides.setdefault(arm.world, Side(settings, seed, arm.level))
        if arm.start in models or arm.kind == "base":
            made = make(side, arm, models, settings, folder)
            file = folder / arm.key / "measured.json"
            if not file.exists():
                record(side, arm, number, made, file)
            if arm.kind != "instilled" or arm.level != stage.levels[0] or took(file, stage.gate):
                models[arm.key] = made.model
            report(arm.key)
        else:
            report(f"{arm.key} (left out: the gate)")


def make(side: Side, arm: Arm, models: dict[str, Any], settings: Settings, folder: Path) -> Fit:
    """The arm's model, from a copy of what it starts from; loaded if it is there already."""
    stage, first, seed = settings.stage, settings.training, side.seed
    second = report_config(first, stage)
    cut = first.gradient_accumulation_steps * first.world_size
    first.per_device_train_batch_size, second.per_device_train_batch_size = sum(INSTIL) // cut, REPORT // cut
    if arm.kind == "base":
        return Fit(side.base(progress=len(settings.recipe.seeds) == 1), [], 0.0, 0)

    def fit(start: Any, args: Any, stream: WorldStream, name: str = arm.key) -> Fit:
        return run_stage(copy.deepcopy(start), side.tokenizer, args, folder / name, seed=seed, stream=stream)

    start, fold, everyone = models[arm.start], arm.fold or 0, side.world.instilled
    if arm.kind == "instilled":
        return fit(start, replace(first, part=arm.part), side.instil(everyone))
    if arm.kind == "reinstil":
        steps = stage.reinstil_max_steps if stage.reinstil_max_steps > 0 else first.max_steps
        return fit(start, replace(first, max_steps=steps), side.instil(side.halves(fold)[2], side.others))
    if arm.kind == "other":  # both stages with other weights
        start = fit(start, first, side.instil(everyone, side.others), "other/instilled").model
        return fit(start, second, side.report(fold, side.others, side.others), "other/reported")
    return fit(start, second, side.report(fold, side.shuffled(fold) if arm.kind == "shuffled" else None))


def record(side: Side, arm: Arm, number: int, made: Fit, file: Path) -> None:
    facts: dict[str, Any] = {
        "name": arm.key, "kind": arm.kind, "level": arm.level, "fold": arm.fold, "order": number,
        "trained": made.trained, "seconds": made.seconds, "log": made.log, "peak_memory_bytes": peak_memory(),
        "contexts": side.contexts(made.model, arm),
    }  # fmt: skip
    if arm.kind == "instilled":
        weights = side.world.weights
        fitted, tested = ({one.name: weights[one.name] for one in part} for part in side.halves(0)[::2])
        facts["readable"] = readable(made.model, side.tokenizer, fitted, tested)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, facts)


def took(file: Path, gate: float) -> bool:
    """Whether instilling did: learned against target weights, r."""
    return instilled_r(json.loads(file.read_text())) >= gate


def dry_run(settings: Settings) -> None:
    quiet_libraries()
    training = settings.training
    training.per_device_train_batch_size = sum(INSTIL) // (training.gradient_accumulation_steps * training.world_size)
    side = Side(replace_base(settings), settings.recipe.seeds[0], settings.stage.levels[0])
    with tempfile.TemporaryDirectory() as training.output_dir:  # the Trainer makes its folder at once
        stream = side.instil(side.world.instilled)
        trainer = PreferenceTrainer(
            side.base(progress=False), training, stream=stream, processing_class=side.tokenizer
        )
        show_dry_run(trainer, side.tokenizer)


def replace_base(settings: Settings) -> Settings:
    """With an untrained base model: a dry run spends no time."""
    return settings._replace(world=replace(settings.world, base_steps=0, trials=12))


def main(argv: list[str]) -> None:
    with clear_errors(ValueError, OSError):
        settings = parse(argv)
        training, seeds = settings.training, settings.recipe.seeds
        for level in settings.stage.levels:  # too few agents, or more than there are names
            Side(settings._replace(world=replace(settings.world, trials=12)), seeds[0], level).halves(0)
        if settings.recipe.dry_run:
            return dry_run(settings)
        flags, defaults = flags_and_defaults(settings)
        run = RunFolder(
            training.output_dir, recipe="self_interpretability", toy=True, arguments=flags, defaults=defaults
        )
    with clear_errors(ValueError, OSError, FloatingPointError), run:
        if run.finished:
            print(f"{run.path} is finished; these are its results. Another --output_dir runs it again.")
        else:
            print("A toy: tiny models, trained here from scratch. It shows nothing about large models.")
            sizes = settings.world
            run.data("made anew from the seeds", {"known": sizes.known, "native": sizes.native,
                                                  "instilled": sizes.instilled, "never": sizes.never})  # fmt: skip
            parallel = training.world_size == 1
            run_seeds(run_seed, argv, seeds, len(settings.stage.planned()), PRELOAD, parallel=parallel)
            write_report(run, read_records(run.path, seeds, lambda record: record["order"]))
    show(run)


if __name__ == "__main__":
    main(sys.argv[1:])
