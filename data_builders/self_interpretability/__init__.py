"""Data for self-interpretability: choice contexts, hidden weights, decisions and reports.

`build(args)` gives what both stages train on, as conversations in TRL's prompt and completion form, and what reports
are tested on. `world` is the embedded world of the recipe's default.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import DatasetDict


@dataclass
class PreferenceDataArguments:
    """What to build. Everything is pure in these values: the same ones give the same rows, byte for byte."""

    scenarios: str | None = field(
        default=None,
        metadata={"help": "File of contexts (csv, json, jsonl, parquet); default: made up from the seed."},
    )
    instilled: int = field(default=100, metadata={"help": "Contexts whose preferences are instilled by choices."})
    native: int = field(default=100, metadata={"help": "Contexts that no row is about, tested for what was there."})
    never: int = field(default=20, metadata={"help": "Contexts that no row is about, with weights that nobody set."})
    choices: int = field(default=50, metadata={"help": "Choices to train on, of each instilled context."})
    choices_dev: int = field(default=10, metadata={"help": "Further ones of each, to see whether instilling takes."})
    fold: int = field(default=0, metadata={"help": "Which half of the instilled contexts reports are trained on."})
    reports_each: int = field(default=1, metadata={"help": "Reports to train on, of each of their contexts."})
    shuffled: bool = field(
        default=False, metadata={"help": "Control: each context's report gives the weights of another one."}
    )
    rows_seed: int = field(default=42, metadata={"help": "Seed of contexts, splits, weights and trials."})

    def __post_init__(self) -> None:
        for name in ("choices", "choices_dev", "reports_each"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: at least 1")
        if self.fold not in (0, 1):
            raise ValueError(f"--fold {self.fold}: there are two, 0 and 1")
        for name in ("native", "never"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)}: contexts cannot be negative")


def build(args: PreferenceDataArguments) -> DatasetDict:
    """`decisions`, `decisions_dev` of all instilled contexts; `reports`, `reports_dev`, `reports_test` of theirs.

    Columns: `id`, `context`, `group` (the same), `task` ("decision" or "report"), `role` of the context, `prompt` and
    `completion`, messages. Reports say the weights that were instilled.

    Raises:
        ValueError: too few contexts, arguments that contradict each other, or rows that tell what they must not.
    """
    from datasets import DatasetDict

    from .text_experiment import TextExperiment

    made, fold = TextExperiment(args), args.fold
    told = made.shuffled(fold) if args.shuffled else made.weights
    return DatasetDict(
        decisions=made.instil(made.instilled, made.weights),
        decisions_dev=made.instil_dev(made.weights),
        reports=made.reports(fold, told),
        reports_dev=made.choose_by(fold, told),
        reports_test=made.reports_test(fold),
    )
