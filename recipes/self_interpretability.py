"""Self-interpretability: instil preferences by choices, then ask the model to report them (arXiv 2505.17120).

    accelerate launch recipes/self_interpretability.py                  # the embedded world, three seeds, on a CPU
    accelerate launch recipes/self_interpretability.py --preset smoke   # the same in miniature, within a minute
    accelerate launch recipes/self_interpretability.py --levels L1 L2   # harder: names of two words
    accelerate launch recipes/self_interpretability.py --config recipes/configs/self_interpretability/qwen25_7b.yaml

A model learns preferences of many contexts from choices alone; the weights behind its choices are measured, and it
is asked to report them (experiment 1). It is trained to report those of half of the contexts and asked about the rest
(experiment 2), and about contexts it was never trained on (experiment 3). Beside it stand controls, and easier and
harder ways of instilling. The model is a tiny one that is made here, or with --model_name_or_path one that reads
instructions (LoRA with --use_peft, or all weights). Prints one table with every seed, intervals, and the claims that
hold or do not. Every flag of TRL's trainer works for the first stage, --config FILE.yaml holds the same flags.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoModelForCausalLM
from trl import ModelConfig, get_peft_config

from steerbook.arguments import RecipeArguments, RecipeParser, check_unused, flags_and_defaults, refuse
from steerbook.console import clear_errors, quiet_libraries, run_main
from steerbook.data_builders.self_interpretability import PreferenceDataArguments
from steerbook.data_builders.self_interpretability.text_experiment import TextExperiment
from steerbook.data_builders.self_interpretability.world_experiment import ROWS, WorldArguments, WorldExperiment
from steerbook.eval.environment import peak_memory
from steerbook.eval.report import RunFolder
from steerbook.eval.results import read_records
from steerbook.eval.self_interpretability.answers import check_prompts
from steerbook.eval.self_interpretability.comparisons import INSTILLED, TEST, took
from steerbook.eval.self_interpretability.measure import measure, readable
from steerbook.eval.self_interpretability.report import show, write_report
from steerbook.eval.self_interpretability.reports import NEW_TOKENS
from steerbook.files import write_json
from steerbook.trainers.base_model import load_base
from steerbook.trainers.fits import Fit
from steerbook.trainers.processes import of_main
from steerbook.trainers.quantised import check_joins
from steerbook.trainers.seeds import run_seeds
from steerbook.trainers.self_interpretability.arms import Arm, StageArguments, check, report_config
from steerbook.trainers.self_interpretability.base import answering_model
from steerbook.trainers.self_interpretability.stages import run_stage, show_stage
from steerbook.trainers.self_interpretability.trainer import PreferenceConfig, first_half
from steerbook.trainers.tiny_lm import TinyConfig, build_tokenizer

COMMON = {
    "learning_rate": 6e-3, "adam_beta2": 0.98, "weight_decay": 0.01, "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.05}, "save_strategy": "no", "logging_steps": 50,
    "report_learning_rate": 4e-3, "report_warmup_steps": 20, "eval_batch_size": 512}  # fmt: skip
PRESETS: dict[tuple[bool, str], dict[str, Any]] = {  # (embedded world?, preset)
    (True, "default"): COMMON | {"seeds": [0, 1, 2], "instilled": 80, "native": 20, "never": 16, "arm_trials": 50,
        "max_steps": 290, "warmup_steps": 40, "report_max_steps": 110, "reinstil_max_steps": 200},
    (True, "smoke"): COMMON | {
        "seeds": [0], "known": 24, "native": 4, "instilled": 24, "never": 4, "trials": 50, "base_steps": 400,
        "max_steps": 110, "warmup_steps": 20, "report_max_steps": 60, "report_warmup_steps": 10, "levels": ["L1"],
        "folds": [0], "controls": ["shuffled"], "gate": 0.0, "logging_steps": 10},
    (False, "default"): {"seeds": [0, 1, 2], "levels": ["L1"], "save_strategy": "epoch", "save_total_limit": 2},
    (False, "smoke"): {
        "seeds": [0], "levels": ["L1"], "folds": [0], "controls": ["shuffled"], "instilled": 8, "native": 2,
        "never": 2, "choices": 4, "trials": 12, "asked": 2, "max_steps": 2, "report_max_steps": 2, "gate": -1.0,
        "per_device_train_batch_size": 4, "report_per_device_train_batch_size": 4, "logging_steps": 1,
        "save_strategy": "no"}}  # fmt: skip
PRELOAD = ["steerbook.trainers.self_interpretability.stages", "steerbook.trainers.self_interpretability.base",
           "steerbook.eval.self_interpretability.report", "steerbook.eval.self_interpretability.measure"]  # fmt: skip


class Settings(NamedTuple):
    """The parsed command line."""

    recipe: RecipeArguments
    stage: StageArguments
    data: PreferenceDataArguments
    world: WorldArguments
    training: PreferenceConfig
    model: ModelConfig

    @property
    def toy(self) -> bool:
        return self.model.model_name_or_path is None


def parse(argv: list[str]) -> Settings:
    """Defaults, then the preset, then --config, then the command line."""
    first = RecipeParser((RecipeArguments, ModelConfig), add_help=False)
    recipe, model, *_ = first.parse_args_and_config(argv, return_remaining_strings=True)
    toy = model.model_name_or_path is None
    parser = RecipeParser(
        (RecipeArguments, StageArguments, PreferenceDataArguments, WorldArguments, PreferenceConfig, ModelConfig)
    )
    name = "self_interpretability" + ("" if recipe.preset == "default" else f"-{recipe.preset}")
    parser.set_defaults_with_config(output_dir=f"runs/{name}", **PRESETS[toy, recipe.preset])
    settings = Settings(*parser.parse_args_and_config(argv))
    check_unused(settings.training)
    check(settings.training, settings.stage, settings.model, ROWS)
    instead = "has no effect here: give --folds, --controls shuffled and --seeds"
    refuse(settings.data, ("fold", "shuffled", "rows_seed", "choices_dev"), instead)
    if toy:
        refuse(settings.data, ("scenarios", "choices", "reports_each"), "is for a pretrained model")
    else:
        refuse(settings.world, vars(settings.world), "is of the embedded world")
    return settings


class Tiny:
    """The embedded world, of one seed and difficulty, with the model that is made for it."""

    rows, template, new_tokens = "stream", None, 1

    def __init__(self, settings: Settings, seed: int, level: str) -> None:
        self.settings, sizes = settings, settings.data
        self.data = WorldExperiment(settings.world, seed, sizes.instilled, sizes.native, sizes.never, level,
                                    build_tokenizer)  # fmt: skip
        self.tokenizer = self.data.tokenizer

    def model(self) -> Any:
        config = TinyConfig(hidden_size=64, intermediate_size=128, layers=2, heads=4, kv_heads=4, head_dim=16,
                            tied=False, steps=self.settings.world.base_steps, learning_rate=4e-3)  # fmt: skip
        progress = len(self.settings.recipe.seeds) == 1  # several seeds train theirs side by side
        folder = answering_model(self.tokenizer, self.data.base(), seed=self.data.seed, config=config,
                                 progress=progress)  # fmt: skip
        return AutoModelForCausalLM.from_pretrained(folder)


class Pretrained:
    """Contexts in words, of one seed, with a pretrained model."""

    rows, new_tokens = "rows", NEW_TOKENS

    def __init__(self, settings: Settings, seed: int, level: str) -> None:
        self.settings, self.template = settings, settings.stage.chat_template_kwargs or {}
        self.data = TextExperiment(replace(settings.data, rows_seed=seed))

    def model(self) -> Any:
        model, self.tokenizer = load_base(self.settings.model, device=self.settings.training.device)
        return model

    def check(self) -> None:
        """ValueError for a model that cannot be trained on these texts and measured with them."""
        model = self.model()
        check_joins(model, get_peft_config(self.settings.model))
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        allowed = [one for one in (positions, self.settings.training.max_length) if one is not None]
        asked = [question.prompt for question in self.data.questions(1)]
        stage = self.settings.stage
        for fold in {
            arm.fold for arm in stage.planned() if arm.kind in ("reported", "all")
        }:  # more replay than there are choices, or rows that leak
            self.data.report(fold, self.data.weights, self.data.weights, stage.replay)
        check_prompts(self.tokenizer, self.data.choices(1)[0].prompt, asked, self.template,
                      reply_tokens=NEW_TOKENS, longest=min(allowed, default=None))  # fmt: skip


class Arms:
    """All models of one seed, made when they are first needed; what is trained already is loaded."""

    def __init__(self, settings: Settings, seed: int) -> None:
        self.settings, self.seed, self.first = settings, seed, settings.stage.levels[0]
        self.planned = {arm.key: arm for arm in settings.stage.planned()}
        self.folder = Path(settings.training.output_dir) / f"seed_{seed}"
        self.sides: dict[str, Tiny | Pretrained] = {}

    def side(self, arm: Arm) -> Any:
        if arm.world not in self.sides:
            self.sides[arm.world] = (Tiny if self.settings.toy else Pretrained)(self.settings, self.seed, arm.level)
        return self.sides[arm.world]

    def fit(self, key: str) -> Fit:
        """The arm's model, trained from what it starts from."""
        arm, stage, data = self.planned[key], self.settings.stage, self.side(self.planned[key]).data
        if arm.kind == "base":
            return Fit(self.side(arm).model(), [], 0.0, 0)
        start, fold = self.fit(arm.start).model, arm.fold
        steps = stage.reinstil_max_steps if arm.kind in ("other", "reinstil") else -1
        first = replace(self.settings.training, part=arm.part, **({"max_steps": steps} if steps > 0 else {}))
        if arm.kind == "instilled":
            return self.stage(arm, start, first, data.instil(data.instilled, data.weights))
        if arm.kind == "reinstil":
            return self.stage(arm, start, first, data.reinstil(fold, data.others))
        told = decided = data.weights
        if arm.kind == "other":  # both stages with other weights
            told = decided = data.others
            start = self.stage(arm, start, first, data.instil(data.instilled, told), "other/instilled").model
        if arm.kind == "shuffled":
            told = data.shuffled(fold)
        second = report_config(self.settings.training, stage)
        return self.stage(arm, start, second, data.report(fold, told, decided, stage.replay),
                          "other/reported" if arm.kind == "other" else "", data.choose_by(fold, told))  # fmt: skip

    def stage(self, arm: Arm, start: Any, args: Any, rows: Any, name: str = "", chosen_by: Any = None) -> Fit:
        options = self.options(arm, start, args, rows)
        return run_stage(start, self.side(arm).tokenizer, args, self.folder / (name or arm.key), seed=self.seed,
                         chosen_by=chosen_by, **options)  # fmt: skip

    def options(self, arm: Arm, start: Any, args: Any, rows: Any) -> dict[str, Any]:
        side, adapter = self.side(arm), get_peft_config(self.settings.model)
        if self.settings.toy:
            args.disable_tqdm = True  # one bar stands for all arms and seeds
            args.per_device_train_batch_size = rows.rows // (args.gradient_accumulation_steps * args.world_size)
        if self.settings.stage.first_half and isinstance(args, PreferenceConfig):
            adapter = first_half(adapter, start)
        return {side.rows: rows, "peft_config": adapter, "template": side.template}

    def record(self, key: str, file: Path) -> None:
        """Measure an arm's model, of every context its role, its weights and what was found; choices where a row of
        the table needs them."""
        arm, made, recipe = self.planned[key], self.fit(key), self.settings.recipe
        side = self.side(arm)
        data, roles = side.data, side.data.roles(arm.fold or 0)
        decided = {"all": INSTILLED, "other": INSTILLED, "reinstil": TEST, "instilled": (*INSTILLED, "native"),
                   "reported": TEST if arm.level == self.first else ()}.get(arm.kind, ())  # fmt: skip
        trials = self.settings.stage.trials if key == "instilled" else self.settings.stage.arm_trials
        chosen = [one for one in data.choices(trials) if roles[one.context] in decided]
        weights = data.others if arm.kind in ("other", "reinstil") else data.weights  # what the choices should follow
        found = measure(
            made.model, side.tokenizer, chosen,
            data.questions(self.settings.stage.asked), weights,
            template=side.template, batch_size=recipe.eval_batch_size, new_tokens=side.new_tokens,
            progress=not self.settings.toy,
        )  # fmt: skip
        contexts = {name: {"role": roles[name], "target": weights[name], **one} for name, one in found.items()}
        facts: dict[str, Any] = {
            "name": key, "kind": arm.kind, "level": arm.level, "fold": arm.fold, "order": [*self.planned].index(key),
            "trained": made.trained, "seconds": made.seconds, "log": made.log, "peak_memory_bytes": peak_memory(),
            "contexts": contexts,
        }  # fmt: skip
        if arm.kind == "instilled" and self.settings.toy:  # names are tokens of their own, which learn
            halves = ({one.name: data.weights[one.name] for one in part}
                      for part in (data.folds[0].report_train, data.folds[0].report_test))  # fmt: skip
            facts["readable"] = readable(made.model, side.tokenizer, *halves)
        write_json(file, facts)


def run_seed(argv: list[str], seed: int, report: Any) -> None:
    """Everything for one seed: each arm's model, and what was measured of it, written to its folder at once."""
    settings = parse(argv)
    if settings.toy:
        quiet_libraries()
    arms = Arms(settings, seed)
    stopped: set[str] = set()
    for key, arm in arms.planned.items():
        file = arms.folder / key / "measured.json"
        if arm.start in stopped:
            stopped.add(key)
            report(f"{key} (left out: the gate)")
            continue
        if not of_main(file.exists):
            arms.record(key, file)
        if key == "instilled" and not of_main(lambda: took(json.loads(file.read_text()), settings.stage.gate)):  # noqa: B023
            stopped.add(key)
        report(key)


def dry_run(settings: Settings) -> None:
    quiet_libraries()
    untrained = settings._replace(world=replace(settings.world, base_steps=0))
    arms = Arms(untrained, settings.recipe.seeds[0])
    arm = arms.planned["instilled"]
    side, args = arms.side(arm), replace(settings.training, part=arm.part)
    rows, model = side.data.instil(side.data.instilled, side.data.weights), side.model()
    show_stage(model, side.tokenizer, args, settings.recipe.plan, **arms.options(arm, model, args, rows))


def main(argv: list[str]) -> None:
    with clear_errors(ValueError, OSError):
        settings = parse(argv)
        training, seeds, toy = settings.training, settings.recipe.seeds, settings.toy
        for level in settings.stage.levels:  # too few contexts, or more than there are names
            side = (Tiny if toy else Pretrained)(settings, seeds[0], level)
        if isinstance(side, Pretrained):
            side.check()
        if settings.recipe.dry_run:
            return dry_run(settings)
        flags, defaults = flags_and_defaults(settings)
        run = RunFolder(
            training.output_dir, recipe="self_interpretability", toy=toy, arguments=flags, defaults=defaults
        )
    with clear_errors(ValueError, OSError, FloatingPointError), run:
        if run.finished:
            print(f"{run.path} is finished; these are its results. Another --output_dir runs it again.")
        else:
            if toy:
                print("A toy: tiny models, trained here from scratch. It shows nothing about large models.")
            sizes = {role: getattr(settings.data, role) for role in ("instilled", "native", "never")}
            run.data("made anew from the seeds", sizes | ({"known": settings.world.known} if toy else {}))
            parallel = toy and training.world_size == 1
            run_seeds(run_seed, argv, seeds, len(settings.stage.planned()), PRELOAD, parallel=parallel)
            base = {"name": "from scratch"} if toy else {
                "name": settings.model.model_name_or_path, "revision": settings.model.model_revision}  # fmt: skip
            write_report(run, read_records(run.path, seeds, lambda record: record["order"]), base)
    show(run)


if __name__ == "__main__":
    run_main(main)
