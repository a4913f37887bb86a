"""Task hinting: train a simpler task beside the main one, so that it works on longer inputs (arXiv 2310.00726).

    accelerate launch recipes/task_hinting.py                           # sorting from scratch on a CPU, three seeds
    accelerate launch recipes/task_hinting.py --preset smoke            # the same in miniature, within a minute
    accelerate launch recipes/task_hinting.py --preset paper --dry_run  # the paper's size: what it would cost
    accelerate launch recipes/task_hinting.py --main increment --hints carry digit --control_hint copy
    accelerate launch recipes/task_hinting.py --config recipes/configs/task_hinting/qwen3_06b_addition.yaml

Trains models on short inputs, plainly and with each of --hints beside the main task, with a control hint, with a
softmax that grows sharper with the length, and with both; as many main rows, and as many rows in all, are separate
arms (--arms). Models are made from scratch, on rows of tokens; --model_name_or_path trains a pretrained one (all
weights, or LoRA with --use_peft) on the same tasks as text, and measures it untouched as well. Tests them on longer
inputs and prints one table with every seed, intervals, and the claims that hold or do not. Every flag of TRL's trainer
works, --config FILE.yaml holds the same flags, --dry_run shows rows and cost.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trl import ModelConfig, get_peft_config

from steerbook.arguments import RecipeArguments, RecipeParser, check_unused, flags_and_defaults, refuse
from steerbook.console import clear_errors, quiet_libraries, run_main
from steerbook.data_builders import task_hinting as hinting_data
from steerbook.data_builders.splits import text_rows
from steerbook.data_builders.task_hinting import HintingDataArguments
from steerbook.eval.environment import peak_memory
from steerbook.eval.report import RunFolder
from steerbook.eval.task_hinting.figures import AT_TEST
from steerbook.eval.task_hinting.measure import measure_texts, measure_tokens
from steerbook.eval.task_hinting.report import read_records, show, write_report
from steerbook.files import write_json
from steerbook.trainers.base_model import check_quantised, load_base
from steerbook.trainers.dry_run import show_dry_run
from steerbook.trainers.processes import of_main
from steerbook.trainers.seeds import run_seeds
from steerbook.trainers.task_hinting import ScratchConfig, length_softmax, named_tokenizer, scratch_model
from steerbook.trainers.task_hinting.arms import Arm, ArmArguments, Fit, check_cut, fit
from steerbook.trainers.task_hinting.arrays import TorchArrays
from steerbook.trainers.task_hinting.dry_run import show_cost
from steerbook.trainers.task_hinting.schedules import parse_weights
from steerbook.trainers.task_hinting.softmax import LengthSoftmax, items
from steerbook.trainers.task_hinting.text_stream import TextStream, check_positions
from steerbook.trainers.task_hinting.trainer import HintingConfig, HintingTrainer
from steerbook.trainers.training import bare
from steerbook.trainers.whole import check_engine

COMMON = {  # spec 3.1
    "learning_rate": 3e-3, "adam_beta2": 0.98, "weight_decay": 0.0, "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.02}, "save_strategy": "no", "eval_batch_size": 500,
    "logging_steps": 100}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "default": COMMON | {"seeds": [0, 1, 2], "max_steps": 1600, "warmup_steps": 110, "test_rows": 500},
    "smoke": COMMON | {
        "seeds": [0], "max_steps": 600, "warmup_steps": 50, "arms": ["standard", "hint"],
        "hints": ["successor", "predecessor"], "test_rows": 100, "logging_steps": 50},
    "paper": COMMON | {  # spec 3.5; what is not known of the paper is spec 1.6's default
        "seeds": [0, 1, 2], "repetitions": True, "values": 100, "longest": 20, "hints": ["successor", "run"],
        "test_lengths": [20, 30, 40, 50, 75, 100], "main_rows": 1024, "hint_rows": 512, "hidden_size": 256,
        "heads": 4, "intermediate_size": 1024, "max_steps": 100_000, "warmup_steps": 2000, "learning_rate": 3e-4,
        "save_strategy": "steps", "save_steps": 10_000, "save_total_limit": 1, "logging_steps": 500},
}  # fmt: skip
PRETRAINED: dict[str, dict[str, Any]] = {  # spec 2.6
    "default": {
        "seeds": [0, 1, 2], "arms": ["untouched", "standard", "standard_total", "hint", "control"], "queries": 1,
        "softmax_count": "keys", "max_steps": 2000, "warmup_steps": 100, "learning_rate": 1e-5, "weight_decay": 0.0,
        "lr_scheduler_type": "cosine", "test_rows": 200, "save_strategy": "steps", "save_steps": 500,
        "save_total_limit": 1, "logging_steps": 50}}  # fmt: skip
PRETRAINED["smoke"] = PRETRAINED["default"] | {
    "seeds": [0], "arms": ["untouched", "standard", "hint"], "max_steps": 2, "warmup_steps": 0, "main_rows": 8,
    "hint_rows": 4, "test_lengths": [6, 12], "test_rows": 8, "save_strategy": "no", "logging_steps": 1}  # fmt: skip
PROBED = 1 << 20  # added to the seed: of the rows that linear probes are fitted on
PRELOAD = ["steerbook.trainers.task_hinting.arms", "steerbook.eval.task_hinting.report"]


@dataclass
class HintingArguments(RecipeArguments):
    """The flags of every recipe, with one preset more."""

    preset: Literal["default", "smoke", "paper"] = field(  # type: ignore[assignment]
        default="default", metadata={"help": "Sizes; other flags override. paper: for one GPU."}
    )


class Settings(NamedTuple):
    """The parsed command line."""

    recipe: HintingArguments
    arms: ArmArguments
    data: HintingDataArguments
    scratch: ScratchConfig
    training: HintingConfig
    model: ModelConfig

    @property
    def pretrained(self) -> bool:
        return self.model.model_name_or_path is not None

    @property
    def planned(self) -> list[Arm]:
        return self.arms.planned(self.data.hints, self.pretrained)


def parse(argv: list[str]) -> Settings:
    """Defaults, then the preset, then --config, then the command line."""
    first = RecipeParser((HintingArguments, ModelConfig), add_help=False)
    recipe, model, *_ = first.parse_args_and_config(argv, return_remaining_strings=True)
    if model.model_name_or_path is not None and recipe.preset == "paper":
        raise ValueError("--preset paper trains models from scratch: drop it, or --model_name_or_path")
    parser = RecipeParser(
        (HintingArguments, ArmArguments, HintingDataArguments, ScratchConfig, HintingConfig, ModelConfig)
    )
    name = "task_hinting" + ("" if recipe.preset == "default" else f"-{recipe.preset}")
    presets = PRESETS if model.model_name_or_path is None else PRETRAINED
    parser.set_defaults_with_config(output_dir=f"runs/{name}", **presets[recipe.preset])
    settings = Settings(*parser.parse_args_and_config(argv))
    check_unused(settings.training)
    check_engine(settings.training, toy=settings.model.model_name_or_path is None)
    if settings.training.gradient_cosine and settings.data.mix == "alternate":
        raise ValueError("--gradient_cosine compares tasks of one step, and --mix alternate has one task a step")
    unused, why = (settings.scratch, "is for models from scratch") if settings.pretrained else (
        settings.model, "is for a pretrained model: name it with --model_name_or_path")  # fmt: skip
    refuse(unused, vars(unused), why)
    return settings


def tasks_of(data: HintingDataArguments, arm: Arm) -> list[Any]:
    """What a step of an arm consists of, the main task first."""
    return hinting_data.tasks(data, arm.hints, data.hint_rows * arm.extra)


class Scratch:
    """Models from scratch on rows of tokens."""

    def __init__(self, settings: Settings, data: HintingDataArguments) -> None:
        self.settings, self.data = settings, data
        self.tests = hinting_data.test_sets(data)
        probed = replace(data, test_lengths=[data.longest], rows_seed=data.rows_seed + PROBED)
        self.probed = hinting_data.test_sets(probed)[data.longest] if data.longest > 1 else None
        self.vocabulary = hinting_data.make_family(data).vocabulary
        self.size = settings.recipe.eval_batch_size

    def model(self, seed: int) -> tuple[Any, Any]:
        """The same seed: the same initial weights in every arm."""
        widest = max(rows.ids.shape[1] for rows in self.tests.values())
        model = scratch_model(len(self.vocabulary), self.settings.scratch, seed, widest)
        return model, named_tokenizer(self.vocabulary)

    def stream(self, arm: Arm, tokenizer: Any) -> Any:
        device = self.settings.training.device
        arrays = None if device.type == "cpu" else partial(TorchArrays, device=device)  # made where they are read
        return hinting_data.make_stream(self.data, arm.hints, self.data.hint_rows * arm.extra, arrays)

    def measure(self, model: Any, tokenizer: Any, hints: Sequence[str], probes: bool) -> dict[str, Any]:
        own = {hint: hinting_data.test_sets(self.data, hint) for hint in hints}
        probed = self.probed if probes else None
        return measure_tokens(model, self.tests, self.size, hints=own, sorts=self.data.main == "sort", probed=probed,
                              telling=items)  # fmt: skip


class Pretrained:
    """A pretrained model on the same tasks as text."""

    def __init__(self, settings: Settings, data: HintingDataArguments) -> None:
        self.settings, self.data = settings, data
        self.tests = hinting_data.text_tests(data)
        self.unrelated = text_rows(data.collateral_file)

    def model(self, seed: int) -> tuple[Any, Any]:
        """ValueError for one with fewer positions than the longest test needs."""
        model, tokenizer = load_base(self.settings.model, device=self.settings.training.device)
        check_positions(model, tokenizer, [row for rows in self.tests.values() for row in rows])
        return model, tokenizer

    def stream(self, arm: Arm, tokenizer: Any) -> Any:
        return TextStream(hinting_data.make_stream(self.data, arm.hints, self.data.hint_rows * arm.extra), tokenizer)

    def measure(self, model: Any, tokenizer: Any, hints: Sequence[str], probes: bool) -> dict[str, Any]:
        own = {hint: hinting_data.text_tests(self.data, hint) for hint in hints}
        size = self.settings.recipe.eval_batch_size
        return measure_texts(model, tokenizer, self.tests, self.unrelated, size, hints=own, progress=True)


def side_of(settings: Settings, **changes: Any) -> Scratch | Pretrained:
    """What differs between the two kinds of models, with some of the data's arguments changed."""
    return (Pretrained if settings.pretrained else Scratch)(settings, replace(settings.data, **changes))


def run_seed(argv: list[str], seed: int, report: Any) -> None:
    """Everything for one seed: each arm's model, and what it scores, written to its folder as soon as it is there."""
    settings = parse(argv)
    training, longest = settings.training, settings.data.longest
    if not settings.pretrained:  # one bar stands for all arms and seeds
        quiet_libraries()
        training.disable_tqdm = True
    side = side_of(settings, rows_seed=seed)
    folder = Path(training.output_dir) / f"seed_{seed}"
    done = of_main(lambda: {file.parent.name for file in folder.glob("*/measured.json")})

    def record(arm: Arm, fitted: Fit, tokenizer: Any, at_test: LengthSoftmax | None = None) -> None:
        plain = at_test is None and not (arm.softmax or arm.extra or arm.key.startswith("control"))
        measured = side.measure(fitted.model, tokenizer, () if at_test else arm.hints, probes=plain)
        facts = {
            "name": arm.key, "at_test": at_test is not None, "longest": longest, "trained": fitted.trained,
            "order": [settings.planned.index(arm), at_test is not None],
            "label": arm.label(tasks_of(settings.data, arm)) + (AT_TEST if at_test else ""),
            "seconds": 0.0 if at_test else fitted.seconds, "log": [] if at_test else fitted.log,
            "peak_memory_bytes": peak_memory(), **measured,
        }  # fmt: skip
        key = f"{arm.key}_at_test" if at_test else arm.key
        write_json(folder / key / "measured.json", facts)

    for arm in settings.planned:
        if arm.key in done:
            report(f"{arm.key} (measured before)")
            continue
        model, tokenizer = side.model(seed)
        if arm.key == "untouched":
            record(arm, Fit(model, [], 0.0, 0), tokenizer)
            report(arm.key)
            continue
        stream = side.stream(arm, tokenizer)
        row = stream.step(0).ids.shape[1]
        softmax = settings.arms.softmax(longest, row) if arm.softmax else None
        adapter = get_peft_config(settings.model)
        fitted = fit(model, tokenizer, stream, training, folder / arm.key, seed=seed, softmax=softmax,
                     peft_config=adapter)  # fmt: skip
        if settings.arms.softmax_at_test and not arm.softmax:
            at_test = settings.arms.softmax(longest, row, at_test=True)
            with length_softmax(bare(fitted.model), at_test):
                record(arm, fitted, tokenizer, at_test)
        record(arm, fitted, tokenizer)  # last: from then on the arm is done
        report(arm.key)


def check(settings: Settings) -> None:
    """Before any time is spent: ValueError for what cannot be trained or tested."""
    data, training = settings.data, settings.training
    used = dict.fromkeys(hint for arm in settings.planned for hint in arm.hints)
    side = side_of(settings, hints=list(used), rows_seed=settings.recipe.seeds[0])
    parse_weights(training.weights, [data.main, *used], training.max_steps)
    trained = [arm for arm in settings.planned if arm.key != "untouched"]
    check_cut({arm.key: sum(task.rows for task in tasks_of(data, arm)) for arm in trained}, training)
    if settings.pretrained:
        check_quantised(settings.model, training)
        settings.arms.check_pretrained(data.hints, data.queries, settings.model)
    else:
        side.model(0)


def dry_run(settings: Settings) -> None:
    """Rows with their loss tokens, parameters, memory, and how much training the whole run is."""
    quiet_libraries()
    training, arms = settings.training, [arm for arm in settings.planned if arm.key != "untouched"]
    side = side_of(settings, test_rows=1)
    model, tokenizer = side.model(0)
    stream = side.stream(next((arm for arm in arms if arm.hints), arms[0]), tokenizer)
    training.per_device_train_batch_size = stream.rows // (training.gradient_accumulation_steps * training.world_size)
    with tempfile.TemporaryDirectory() as training.output_dir:  # the Trainer makes its folder at once
        adapter = get_peft_config(settings.model)
        trainer = HintingTrainer(model, training, stream=stream, processing_class=tokenizer, peft_config=adapter)
        show_dry_run(trainer, tokenizer, between="" if settings.pretrained else " ", **settings.recipe.plan)
    each = {arm.label(tasks_of(settings.data, arm)): side.stream(arm, tokenizer).step(0).ids.shape for arm in arms}
    show_cost(each, model.num_parameters(), training.max_steps, len(settings.recipe.seeds), adapter is not None)


def main(argv: list[str]) -> None:
    with clear_errors(ValueError, OSError):
        settings = parse(argv)
        training, seeds, toy = settings.training, settings.recipe.seeds, not settings.pretrained
        check(settings)
        if settings.recipe.dry_run:
            return dry_run(settings)
        flags, defaults = flags_and_defaults(settings)
        run = RunFolder(training.output_dir, recipe="task_hinting", toy=toy, arguments=flags, defaults=defaults)
    with clear_errors(ValueError, OSError, FloatingPointError), run:
        if run.finished:
            print(f"{run.path} is finished; these are its results. Another --output_dir runs it again.")
        else:
            if toy:
                print("A toy: small models, trained here from scratch. It shows nothing about large models.")
            counts = {f"test_{n}": settings.data.test_rows for n in settings.data.test_lengths}
            run.data("made anew from the seeds", counts)
            parallel = toy and training.device.type == "cpu" and training.world_size == 1
            run_seeds(run_seed, argv, seeds, len(settings.planned), PRELOAD, parallel=parallel)
            base = {"name": "from scratch"} if toy else {
                "name": settings.model.model_name_or_path, "revision": settings.model.model_revision}  # fmt: skip
            write_report(run, read_records(run.path, seeds), base)
    show(run)


if __name__ == "__main__":
    run_main(main)
