"""What a run compares: stages, controls and difficulties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from trl import ModelConfig

from ...arguments import json_object, refuse
from ..base_model import check_quantised
from ..whole import check_engine
from .trainer import Part, PreferenceConfig, ReportConfig

LEVELS = {"L0": "embeddings", "L1": "all", "L2": "all", "L3": "last_layer", "L4": "all"}
CONTROLS = ("shuffled", "other", "reinstil")


@dataclass(frozen=True)
class Arm:
    """One measured model.

    Attributes:
        key: its folder and its name in results.
        kind: "base", "instilled", "reported", "all" (of all instilled contexts); or one of `CONTROLS`.
        level: of the difficulty ladder.
        start: key of the arm whose model it starts from; empty for a base.
        fold: which half of the instilled contexts reports were trained on, where any were.
    """

    key: str
    kind: str
    level: str = "L1"
    start: str = ""
    fold: int | None = None

    @property
    def world(self) -> str:
        """What distinguishes agents: levels that differ only in where preferences are instilled share them."""
        return self.level if self.level in ("L2", "L4") else ""

    @property
    def part(self) -> Part:
        """The weights that instilling trains."""
        return LEVELS[self.level]  # type: ignore[return-value]


@dataclass
class StageArguments:
    """What to compare, and the second stage where it differs from the first (whose flags are the trainer's)."""

    levels: list[str] = field(
        default_factory=lambda: ["L1", "L0", "L3"],
        metadata={
            "help": "Difficulties, the first one with all folds and controls. L0: preferences are instilled into the "
            "embeddings alone; L1: into all weights (or the adapter's); L2: names of two words; L3: into the last "
            "layer alone; L4: agents with attributes of their own."
        },
    )
    controls: list[str] = field(
        default_factory=lambda: list(CONTROLS),
        metadata={
            "help": "shuffled: trained on reports of other contexts' weights; other: a model with other preferences; "
            "reinstil: new preferences by choices alone, after reports were trained."
        },
    )
    folds: list[int] = field(
        default_factory=lambda: [0, 1], metadata={"help": "Halves of the contexts to train reports on, one at a time."}
    )
    replay: float = field(default=0.4, metadata={"help": "Share of decisions among the rows of report training."})
    report_learning_rate: float = field(default=2e-5, metadata={"help": "Learning rate of report training."})
    report_max_steps: int = field(default=-1, metadata={"help": "Steps of report training."})
    report_warmup_steps: int = field(default=0, metadata={"help": "Warm-up of report training."})
    report_num_train_epochs: float = field(default=5.0, metadata={"help": "Epochs of report training."})
    report_per_device_train_batch_size: int = field(default=8, metadata={"help": "Batch size of report training."})
    reinstil_max_steps: int = field(
        default=-1, metadata={"help": "Steps of instilling other weights, as two controls do (default: as many)."}
    )
    gate: float = field(
        default=0.8,
        metadata={
            "help": "Learned against target weights must reach this r, and choices agree with the target's in this "
            "share, or reports are not trained (spec 4.6)."
        },
    )
    first_half: bool = field(
        default=False,
        metadata={"help": "Instil with an adapter on the first half of the layers: what is stored early is reported."},
    )
    trials: int = field(
        default=100, metadata={"help": "Fresh choices of each context, in both orders, for its weights."}
    )
    arm_trials: int = field(
        default=-1, metadata={"help": "The same of the arms beside the first instilled one (default: as many)."}
    )
    asked: int = field(default=10, metadata={"help": "Reports asked of each context, about fresh trials."})
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of the chat template, as JSON: '{\"enable_thinking\": false}' for Qwen3."},
    )

    def __post_init__(self) -> None:
        for name, known in (("levels", LEVELS), ("controls", CONTROLS), ("folds", (0, 1))):
            given = getattr(self, name)
            unknown = [value for value in given if value not in known]
            if unknown or len(set(given)) < len(given) or (not given and name != "controls"):
                raise ValueError(f"--{name} {given}: any of {', '.join(map(str, known))}, each once")
        self.chat_template_kwargs = json_object("chat_template_kwargs", self.chat_template_kwargs)
        self.arm_trials = self.trials if self.arm_trials == -1 else self.arm_trials
        for name in ("trials", "arm_trials"):
            if getattr(self, name) < 12:
                given = f"--{name} {getattr(self, name)}"
                raise ValueError(f"{given}: at least 12, to fit weights and an intercept to each half")
        if self.asked < 1:
            raise ValueError(f"--asked {self.asked}: at least 1")
        if not 0 <= self.replay < 1:
            raise ValueError(f"--replay {self.replay}: a share of all rows, from 0 to below 1")

    def planned(self) -> list[Arm]:
        """All models to measure, in the order in which they are made."""
        first, *others = self.levels
        arms = [Arm("base", "base", first), Arm("instilled", "instilled", first, "base")]
        arms += [Arm(f"reported_{fold}", "reported", first, "instilled", fold) for fold in self.folds]
        if len(self.folds) > 1:  # experiment 3's: it holds out native contexts alone
            arms.append(Arm("reported_all", "all", first, "instilled"))
        starts = {"shuffled": "instilled", "other": "base", "reinstil": f"reported_{self.folds[0]}"}
        arms += [Arm(control, control, first, starts[control], self.folds[0]) for control in CONTROLS if control in
                 self.controls]  # fmt: skip
        for level in others:
            base = Arm(f"base_{level}", "base", level)
            own = base.world != arms[0].world
            arms += [base] * own
            arms += [Arm(f"instilled_{level}", "instilled", level, base.key if own else "base"),
                     Arm(f"reported_{level}", "reported", level, f"instilled_{level}", self.folds[0])]  # fmt: skip
        return arms


PRETRAINED_ONLY = (
    "report_num_train_epochs", "report_per_device_train_batch_size", "first_half", "asked", "chat_template_kwargs"
)  # fmt: skip


def check(args: PreferenceConfig, stage: StageArguments, model: ModelConfig, rows: Sequence[int]) -> None:
    """ValueError for what a run cannot be trained with; `rows` of a step of each stage in the embedded world."""
    if args.packing:
        raise ValueError("--packing puts several choices into one sequence, where they tell of each other")
    if args.part != "all":
        raise ValueError(f"--part {args.part} has no effect here: --levels says what is instilled where")
    check_engine(args, toy=model.model_name_or_path is None)
    if model.model_name_or_path is not None:
        _check_pretrained(stage, model)
        check_quantised(model, args)
        return
    why = "is for a pretrained model: name it with --model_name_or_path"
    refuse(stage, PRETRAINED_ONLY, why)
    refuse(model, vars(model), why)
    _check_streams(args, stage, rows)


def _check_pretrained(stage: StageArguments, model: ModelConfig) -> None:
    """ValueError for what a pretrained model cannot be trained with."""
    if own := sorted({"L2", "L4"} & set(stage.levels)):
        raise ValueError(f"--levels {' '.join(own)}: of the embedded world; a pretrained model has L0, L1 and L3")
    if model.use_peft and stage.levels != ["L1"]:
        raise ValueError("--levels: an adapter has weights of its own; L0 and L3 are for training all weights")
    if stage.first_half and not model.use_peft:
        raise ValueError("--first_half is for adapters: give --use_peft")


def _check_streams(args: PreferenceConfig, stage: StageArguments, rows: Sequence[int]) -> None:
    """ValueError for what streams of so many rows a step (of each stage) cannot be trained with."""
    if args.per_device_train_batch_size != PreferenceConfig.per_device_train_batch_size:
        raise ValueError(
            f"--per_device_train_batch_size {args.per_device_train_batch_size} has no effect here: a step has "
            f"{rows[0]} rows, which --gradient_accumulation_steps cuts"
        )
    cut = args.gradient_accumulation_steps * args.world_size
    if any(count % cut for count in rows):
        raise ValueError(
            f"a step has {' or '.join(map(str, rows))} rows, which --gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps} x {args.world_size} processes do not divide"
        )
    for name, steps in (("max_steps", args.max_steps), ("report_max_steps", stage.report_max_steps)):
        if steps < 1:
            raise ValueError(f"--{name} {steps}: fresh choices have no end, so say how many steps")


def report_config(args: PreferenceConfig, stage: StageArguments) -> ReportConfig:
    """The second stage's arguments: those of the first, with what `stage` says of its own."""
    usual = PreferenceConfig(output_dir=args.output_dir)
    shared = {one.name for one in fields(ReportConfig)} & {one.name for one in fields(PreferenceConfig)}
    given: dict[str, Any] = {
        name: getattr(args, name) for name in shared if getattr(args, name) != getattr(usual, name)
    }
    given |= {"learning_rate": stage.report_learning_rate, "max_steps": stage.report_max_steps,
              "warmup_steps": stage.report_warmup_steps, "num_train_epochs": stage.report_num_train_epochs,
              "per_device_train_batch_size": stage.report_per_device_train_batch_size}  # fmt: skip
    return ReportConfig(**{"output_dir": args.output_dir, **given})
