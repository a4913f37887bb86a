"""Task hinting: train a simpler task beside the main one, so that it works on longer inputs (arXiv 2310.00726).

    accelerate launch recipes/task_hinting.py                           # sorting from scratch on a CPU, three seeds
    accelerate launch recipes/task_hinting.py --preset smoke            # the same in miniature, within a minute
    accelerate launch recipes/task_hinting.py --preset paper --dry_run  # the paper's size: what it would cost
    accelerate launch recipes/task_hinting.py --main increment --hints carry digit --control_hint copy

Trains models from scratch on short inputs, plainly and with each of --hints beside the main task, with a control hint,
with a softmax that grows sharper with the length, and with both; as many main rows, and as many rows in all, are
separate arms (--arms). Tests them on longer inputs and prints one table with every seed, intervals, and the claims
that hold or do not. Every flag of TRL's trainer works, --config FILE.yaml holds the same flags, --dry_run shows rows
and cost.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from steerbook.arguments import RecipeArguments, RecipeParser, check_unused, flags_and_defaults
from steerbook.console import clear_errors, quiet_libraries
from steerbook.data_builders import task_hinting as hinting_data
from steerbook.data_builders.task_hinting import HintingDataArguments
from steerbook.eval.environment import peak_memory
from steerbook.eval.report import RunFolder
from steerbook.eval.task_hinting import teacher_forced
from steerbook.eval.task_hinting.attention import attention_masses
from steerbook.eval.task_hinting.figures import AT_TEST
from steerbook.eval.task_hinting.report import read_records, show, write_report
from steerbook.files import write_json
from steerbook.trainers.dry_run import show_dry_run
from steerbook.trainers.seeds import run_seeds
from steerbook.trainers.task_hinting import ScratchConfig, length_softmax, named_tokenizer, scratch_model
from steerbook.trainers.task_hinting.arms import Arm, ArmArguments, fit
from steerbook.trainers.task_hinting.arrays import TorchArrays
from steerbook.trainers.task_hinting.schedules import parse_weights
from steerbook.trainers.task_hinting.softmax import items
from steerbook.trainers.task_hinting.trainer import HintingConfig, HintingTrainer

COMMON = {  # spec 3.1
    "learning_rate": 3e-3,
    "adam_beta2": 0.98,
    "weight_decay": 0.0,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.02},
    "save_strategy": "no",
    "eval_batch_size": 500,
    "logging_steps": 100,
}
PRESETS: dict[str, dict[str, Any]] = {
    "default": COMMON | {"seeds": [0, 1, 2], "max_steps": 2000, "warmup_steps": 120, "test_rows": 500},
    "smoke": COMMON | {
        "seeds": [0], "max_steps": 500, "warmup_steps": 40, "arms": ["standard", "hint"], "test_rows": 200,
        "logging_steps": 50},
    "paper": COMMON | {  # spec 3.5; what is not known of the paper is spec 1.6's default
        "seeds": [0, 1, 2], "repetitions": True, "values": 100, "longest": 20, "hints": ["successor", "run"],
        "test_lengths": [20, 30, 40, 50, 75, 100], "main_rows": 1024, "hint_rows": 512, "hidden_size": 256,
        "heads": 4, "intermediate_size": 1024, "max_steps": 100_000, "warmup_steps": 2000, "learning_rate": 3e-4,
        "save_strategy": "steps", "save_steps": 10_000, "save_total_limit": 1, "logging_steps": 500},
}  # fmt: skip
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


def parse(argv: list[str]) -> Settings:
    """Defaults, then the preset, then --config, then the command line."""
    recipe, *_ = RecipeParser(HintingArguments, add_help=False).parse_args_and_config(
        argv, return_remaining_strings=True
    )
    parser = RecipeParser((HintingArguments, ArmArguments, HintingDataArguments, ScratchConfig, HintingConfig))
    name = "task_hinting" + ("" if recipe.preset == "default" else f"-{recipe.preset}")
    parser.set_defaults_with_config(output_dir=f"runs/{name}", **PRESETS[recipe.preset])
    return Settings(*parser.parse_args_and_config(argv))


def arrays_on(device: Any) -> Callable[[Sequence[int]], Any] | None:
    """Rows are made by NumPy, or on the accelerator that trains on them."""
    return None if device.type == "cpu" else partial(TorchArrays, device=device)


def label(settings: Settings, arm: Arm) -> str:
    """The arm's name in the table, with the rows that a step has of the main task and of hints."""
    data = settings.data
    rows = str(data.main_rows + data.hint_rows * arm.extra) + "".join(f" + {data.hint_rows}" for _ in arm.hints)
    tasks = hinting_data.tasks(data, arm.hints)
    hints = [f"{task.name}{' (shared mark)' if task.shared else ' (own mark)'}" for task in tasks[1:]]
    kind = "control" if arm.key.startswith("control") else "hint"
    words = [f"{kind} {hint}" for hint in hints] + ["softmax"] * arm.softmax
    return " + ".join(words or ["standard"]) + f", {rows} rows"


def first(rows: Any, count: int = 100) -> Any:
    """The first of the test rows: enough to see what attention does."""
    return type(rows)(*(part[:count] for part in rows))


def run_seed(argv: list[str], seed: int, report: Any) -> None:
    """Everything for one seed: each arm's model, and what it scores, written to its folder as soon as it is there."""
    settings = parse(argv)
    training, recipe = settings.training, settings.recipe
    quiet_libraries()  # one bar stands for all arms and seeds
    training.disable_tqdm = True
    data = replace(settings.data, rows_seed=seed)
    folder = Path(training.output_dir) / f"seed_{seed}"
    vocabulary = hinting_data.make_family(data).vocabulary
    tests = hinting_data.test_sets(data)
    longest_test_row = max(rows.ids.shape[1] for rows in tests.values())
    done = {file.parent.name for file in folder.glob("*/measured.json")}
    planned = settings.arms.planned(data.hints)
    for order, arm in enumerate(planned):
        if arm.key in done:
            report(f"{arm.key} (measured before)")
            continue
        stream = hinting_data.make_stream(data, arm.hints, data.hint_rows * arm.extra, arrays_on(training.device))
        row = stream.step(0).ids.shape[1]
        softmax = settings.arms.softmax(data.longest, row) if arm.softmax else None
        fitted = fit(
            stream, vocabulary, settings.scratch, training, folder / arm.key, seed=seed,
            longest_row=longest_test_row, softmax=softmax,
        )  # fmt: skip
        for at_test in (False, True) if settings.arms.softmax_at_test and softmax is None else (False,):
            switched = (
                length_softmax(fitted.model, settings.arms.softmax(data.longest, row, at_test=True))
                if at_test
                else nullcontext()
            )
            with switched:
                splits = {
                    f"test_{n}": teacher_forced(fitted.model, rows, recipe.eval_batch_size, items)
                    for n, rows in tests.items()
                }
                looks = {n: attention_masses(fitted.model, first(rows), telling=items) for n, rows in tests.items()
                         if data.main == "sort" and n > 1}  # fmt: skip
            key = f"{arm.key}_at_test" if at_test else arm.key
            facts = {
                "name": arm.key, "at_test": at_test, "order": [order, at_test], "longest": data.longest,
                "label": label(settings, arm) + (AT_TEST if at_test else ""), "trained": fitted.trained,
                "seconds": 0.0 if at_test else fitted.seconds, "log": [] if at_test else fitted.log,
                "peak_memory_bytes": peak_memory(), "splits": splits, "attention": looks,
            }  # fmt: skip
            (folder / key).mkdir(parents=True, exist_ok=True)
            write_json(folder / key / "measured.json", facts)
        report(arm.key)


def check(settings: Settings) -> dict[int, Any]:
    """Before any time is spent: ValueError for what cannot be trained or tested. The first seed's test sets."""
    data, training = settings.data, settings.training
    arms = settings.arms.planned(data.hints)
    used = dict.fromkeys(hint for arm in arms for hint in arm.hints)
    tests = hinting_data.test_sets(replace(data, hints=list(used), rows_seed=settings.recipe.seeds[0]))
    parse_weights(training.weights, [data.main, *used])
    cut = training.gradient_accumulation_steps * training.world_size
    for arm in arms:
        rows = sum(task.rows for task in hinting_data.tasks(data, arm.hints, data.hint_rows * arm.extra))
        if rows % cut:
            raise ValueError(
                f"{arm.key} has {rows} rows a step, which --gradient_accumulation_steps "
                f"{training.gradient_accumulation_steps} x {training.world_size} processes do not divide"
            )
    scratch_model(2, settings.scratch, 0, max(rows.ids.shape[1] for rows in tests.values()))
    return tests


def dry_run(settings: Settings) -> None:
    """Rows with their loss tokens, parameters, memory, and how much training the whole run is."""
    quiet_libraries()
    data, training, arms = settings.data, settings.training, settings.arms.planned(settings.data.hints)
    vocabulary = hinting_data.make_family(data).vocabulary
    widest = max(rows.ids.shape[1] for rows in hinting_data.test_sets(replace(data, test_rows=1)).values())
    shown = next((arm for arm in arms if arm.hints), arms[0])
    stream = hinting_data.make_stream(data, shown.hints, data.hint_rows * shown.extra)
    training.per_device_train_batch_size = stream.rows // (training.gradient_accumulation_steps * training.world_size)
    with tempfile.TemporaryDirectory() as training.output_dir:  # the Trainer makes its folder at once
        model = scratch_model(len(vocabulary), settings.scratch, 0, widest)
        tokenizer = named_tokenizer(vocabulary)
        trainer = HintingTrainer(model, training, stream=stream, processing_class=tokenizer)
        show_dry_run(trainer, tokenizer, between=" ")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    total = 0
    print(f"{'arm':<60}{'rows a step':>12}{'tokens a step':>15}{'TFLOP':>10}")
    for arm in arms:
        step = hinting_data.make_stream(data, arm.hints, data.hint_rows * arm.extra).step(0)
        flop = 6 * parameters * step.ids.size * training.max_steps
        total += flop * len(settings.recipe.seeds)
        print(f"{label(settings, arm):<60}{len(step.ids):>12,}{step.ids.size:>15,}{flop / 1e12:>10,.1f}")
    print(f"{len(arms)} models x {len(settings.recipe.seeds)} seeds, {training.max_steps:,} steps each: "
          f"{total / 1e12:,.1f} TFLOP of training (6 per parameter and token, attention not counted)")  # fmt: skip


def main(argv: list[str]) -> None:
    with clear_errors(ValueError, OSError):
        settings = parse(argv)
        training, seeds = settings.training, settings.recipe.seeds
        check_unused(training)
        tests = check(settings)
        if settings.recipe.dry_run:
            return dry_run(settings)
        flags, defaults = flags_and_defaults(settings)
        run = RunFolder(training.output_dir, recipe="task_hinting", toy=True, arguments=flags, defaults=defaults)
    with clear_errors(ValueError, OSError, FloatingPointError), run:
        if run.finished:
            print(f"{run.path} is finished; these are its results. Another --output_dir runs it again.")
        else:
            print("A toy: small models, trained here from scratch. It shows nothing about large models.")
            run.data("made anew from the seeds", {f"test_{n}": len(rows.ids) for n, rows in tests.items()})
            count = len(settings.arms.planned(settings.data.hints))
            parallel = training.device.type == "cpu" and training.world_size == 1
            run_seeds(run_seed, argv, seeds, count, PRELOAD, parallel=parallel)
            base = {"name": "from scratch"}
            write_report(run, read_records(run.path, seeds), base)
    show(run)


if __name__ == "__main__":
    main(sys.argv[1:])
