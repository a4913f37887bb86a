"""What a run compares, and how each of it is trained: compute-matched plain training, hints, controls, softmax."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import ModelConfig

from ..fits import Fit, run_fit
from ..processes import of_main
from ..quantised import is_quantised
from ..stream import Stream
from ..training import anew, save_tuned
from ..whole import to_train
from .softmax import LengthSoftmax, save, use_length_softmax
from .trainer import HintingConfig, HintingTrainer

ARMS = ("untouched", "standard", "standard_total", "hint", "control", "softmax", "hint_softmax")
MERGED = (
    "an adapter with a softmax of its own is merged, which a quantised base does not allow: drop the arms softmax and "
    "hint_softmax, or the quantisation"
)


@dataclass(frozen=True)
class Arm:
    """One model of the comparison.

    Attributes:
        key: its folder and its name in results.
        hints: what is trained beside the main task.
        extra: whether the main task has the hint's rows on top (equal rows in all, where `hints` is empty).
        softmax: whether attention has the length-aware softmax in training.
    """

    key: str
    hints: tuple[str, ...] = ()
    extra: bool = False
    softmax: bool = False

    def label(self, tasks: Sequence[Any]) -> str:
        """Its name in the table; `tasks` of a step, the main one first, with `name`, `rows` and `shared`."""
        if self.key == "untouched":
            return self.key
        kind = "control" if self.key.startswith("control") else "hint"
        words = [f"{kind} {task.name} ({'shared' if task.shared else 'own'} mark)" for task in tasks[1:]]
        words += ["softmax"] * self.softmax
        words = words or [f"standard (equal {'rows in all' if self.extra else 'main rows'})"]
        return f"{' + '.join(words)}, {' + '.join(str(task.rows) for task in tasks)} rows"


@dataclass
class ArmArguments:
    """What to compare; the hints themselves are the data's (--hints)."""

    arms: list[str] = field(
        default_factory=lambda: list(ARMS),
        metadata={"help": f"What to compare: {', '.join(ARMS)}; untouched: a pretrained model as it is."},
    )
    control_hint: str = field(
        default="copy", metadata={"help": "A hint that should not help, trained like the others."}
    )
    softmax_rule: Literal["log", "learn", "ssmax"] = field(
        default="log", metadata={"help": "Rule of the length-aware softmax in training."}
    )
    softmax_count: Literal["items", "keys"] = field(
        default="items", metadata={"help": "Its length: items of the problem, or keys that a query sees."}
    )
    softmax_n0: float | None = field(
        default=None, metadata={"help": "Length at which it is the usual one (default: the longest in training)."}
    )
    softmax_at_test: bool = field(
        default=True, metadata={"help": "Measure models trained without it also with it switched on (rule log)."}
    )

    def __post_init__(self) -> None:
        unknown = sorted(set(self.arms) - set(ARMS))
        if unknown:
            raise ValueError(f"unknown arm {unknown[0]!r} in --arms; known: {', '.join(ARMS)}")
        LengthSoftmax(self.softmax_rule, self.softmax_n0 or 2.0)

    def planned(self, hints: Collection[str], pretrained: bool = False) -> list[Arm]:
        """All models to measure, in the table's order; ValueError for a control among the hints, or none to train."""
        if set(self.arms) <= {"untouched"}:
            raise ValueError("--arms: nothing is trained; name another arm beside untouched")
        if "control" in self.arms and self.control_hint in hints:
            raise ValueError(f"--control_hint {self.control_hint} is one of --hints; name another, or drop the arm")
        made = {
            "untouched": [Arm("untouched")] * pretrained,
            "standard": [Arm("standard")],
            "standard_total": [Arm("standard_total", extra=True)],
            "hint": [Arm(f"hint_{hint}", (hint,)) for hint in hints],
            "control": [Arm(f"control_{self.control_hint}", (self.control_hint,))],
            "softmax": [Arm("softmax", softmax=True)],
            "hint_softmax": [Arm(f"hint_softmax_{hint}", (hint,), softmax=True) for hint in hints],
        }
        return [arm for name in ARMS if name in self.arms for arm in made[name]]

    def check_pretrained(self, hints: Collection[str], queries: int, model: ModelConfig) -> None:
        """ValueError for what only models from scratch can do."""
        if queries > 1:
            raise ValueError(f"--queries {queries}: a text asks one question")
        trained = any(arm.softmax for arm in self.planned(hints, pretrained=True))
        if self.softmax_count == "items" and (trained or self.softmax_at_test):
            raise ValueError("--softmax_count items: nothing tells generate the items of a text; use keys")
        if not (trained and model.use_peft):
            return
        if self.softmax_rule != "log":
            raise ValueError(
                f"--softmax_rule {self.softmax_rule} learns weights of the base, which an adapter leaves alone: use "
                "log, or train all weights"
            )
        if model.load_in_4bit or model.load_in_8bit:
            raise ValueError(MERGED)

    def softmax(self, longest: int, longest_row: int, at_test: bool = False) -> LengthSoftmax:
        """In training, or switched on for a test; `longest` items and `longest_row` tokens were trained on."""
        n0 = self.softmax_n0 or float(longest if self.softmax_count == "items" else longest_row)
        if at_test:
            return LengthSoftmax("log", n0, self.softmax_count, least=1.0)
        return LengthSoftmax(self.softmax_rule, n0, self.softmax_count)


def check_cut(rows: Mapping[str, int], args: HintingConfig) -> None:
    """ValueError for a number of rows a step (of each arm) that micro-batches and processes do not divide."""
    if args.per_device_train_batch_size != HintingConfig.per_device_train_batch_size:
        raise ValueError(
            f"--per_device_train_batch_size {args.per_device_train_batch_size} has no effect: a step has --main_rows "
            "and --hint_rows, which --gradient_accumulation_steps cuts"
        )
    cut = args.gradient_accumulation_steps * args.world_size
    for arm, count in rows.items():
        if count % cut:
            raise ValueError(
                f"{arm} has {count} rows a step, which --gradient_accumulation_steps "
                f"{args.gradient_accumulation_steps} x {args.world_size} processes do not divide"
            )


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stream: Stream,
    args: HintingConfig,
    folder: Path,
    *,
    seed: int,
    softmax: LengthSoftmax | None = None,
    peft_config: PeftConfig | None = None,
) -> Fit:
    """Train the model, or an adapter to it, on all rows of the stream's steps, in `folder`, going on from the newest
    complete checkpoint there; it is saved in `folder/model`, an adapter with a softmax of its own merged."""
    set_seed(seed)
    names = {task.name for task in stream.tasks}  # --weights may name hints of other arms
    args = anew(
        args, output_dir=str(folder), seed=seed,
        per_device_train_batch_size=stream.rows // (args.gradient_accumulation_steps * args.world_size),
        weights=[text for text in args.weights or [] if text.partition("=")[0] in names],
    )  # fmt: skip
    if softmax is not None:
        if peft_config is not None and is_quantised(model):  # as its checkpoint was
            raise ValueError(MERGED)
        use_length_softmax(model, softmax)
    trained, whole = to_train(model, args)
    trainer = HintingTrainer(trained, args, stream=stream, processing_class=tokenizer, peft_config=peft_config)
    found = run_fit(trainer, folder, whole, peft_config)
    tuned = found.model.eval()
    if isinstance(tuned, PeftModel) and softmax is not None:  # the softmax stands in the base's config
        tuned = tuned.merge_and_unload()
    of_main(lambda: save_tuned(tuned, tokenizer, folder / "model", save))
    return replace(found, model=tuned)
