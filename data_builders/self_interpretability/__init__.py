"""Data for self-interpretability: choice contexts, hidden weights, decisions and reports.

`build(args)` gives what both stages train on, as conversations in TRL's prompt and completion form, and what reports
are tested on. `world` is the embedded world of the recipe's default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import DatasetDict

    from .contexts import Context
    from .splits import Split


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
        for name in ("native", "never"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)}: contexts cannot be negative")


def make_split(args: PreferenceDataArguments) -> Split:
    """Contexts by their role. Raises ValueError for too few, RowError for a bad file."""
    from .contexts import read_contexts
    from .generated import generated_contexts
    from .splits import split_contexts

    count = args.instilled + args.native + args.never
    given = read_contexts(args.scenarios) if args.scenarios else generated_contexts(count, args.rows_seed)
    return split_contexts(given, args.rows_seed, args.fold, args.instilled, args.native, args.never)


def make_weights(args: PreferenceDataArguments, split: Split) -> dict[str, tuple[int, ...]]:
    """Context -> its hidden weights; those of native and never set contexts are instilled nowhere."""
    from .trials import draw_weights

    contexts = (*split.instilled, *split.native, *split.never)
    return {one.name: draw_weights(Random(f"weights {args.rows_seed} {one.name}"), len(one.attributes))
            for one in contexts}  # fmt: skip


def build(args: PreferenceDataArguments) -> DatasetDict:
    """`decisions`, `decisions_dev` of all instilled contexts; `reports`, `reports_dev`, `reports_test` of theirs.

    Columns: `id`, `context`, `group` (the same), `task` ("decision" or "report"), `role` of the context, `prompt` and
    `completion`, messages. Reports say the weights that were instilled.

    Raises:
        ValueError: too few contexts, arguments that contradict each other, or rows that tell what they must not.
    """
    from datasets import Dataset, DatasetDict

    from .splits import check_leaks

    split = make_split(args)
    weights = make_weights(args, split)
    told = dict(weights)
    if args.shuffled:
        names = [one.name for one in split.report_train]
        mixed = Random(f"shuffled {args.rows_seed}").sample(names, len(names))
        told |= {one: weights[other] for one, other in zip(names, mixed, strict=True)}
    roles = split.roles()
    rows = {
        "decisions": decisions(split.instilled, args.choices, weights, Random(f"decisions {args.rows_seed}")),
        "decisions_dev": decisions(split.instilled, args.choices_dev, weights, Random(f"dev {args.rows_seed}")),
        "reports": reports(split.report_train, args.reports_each, told, Random(f"reports {args.rows_seed}")),
        "reports_dev": reports(split.report_dev, 1, weights, Random(f"reports dev {args.rows_seed}")),
        "reports_test": reports(split.report_test, 1, weights, Random(f"reports test {args.rows_seed}")),
    }
    check_leaks({name: rows[name] for name in ("decisions", "decisions_dev", "reports", "reports_dev")}, split)
    for name, part in rows.items():
        for number, row in enumerate(part):
            row |= {"id": f"{name}-{number}", "group": row["context"], "role": roles[row["context"]]}
    return DatasetDict({name: Dataset.from_list(part) for name, part in rows.items()})


def decisions(
    contexts: Sequence[Context], each: int, weights: Mapping[str, Sequence[float]], rng: Random
) -> list[dict[str, Any]]:
    """`each` fresh choices of every context, as its weights imply them, in a random order."""
    from .texts import decision_prompt
    from .trials import draw_trial, label

    rows = []
    for context in contexts:
        for _ in range(each):
            trial = draw_trial(rng, context)
            answer = [{"role": "assistant", "content": label(context, trial, weights[context.name])}]
            rows.append({"task": "decision", "context": context.name, "prompt": decision_prompt(context, trial),
                         "completion": answer})  # fmt: skip
    rng.shuffle(rows)
    return rows


def reports(
    contexts: Sequence[Context], each: int, weights: Mapping[str, Sequence[float]], rng: Random
) -> list[dict[str, Any]]:
    """`each` reports of every context, about fresh trials."""
    from .texts import report_prompt, report_text
    from .trials import draw_trial

    rows = []
    for context in contexts:
        for _ in range(each):
            said = [{"role": "assistant", "content": report_text(context, weights[context.name])}]
            rows.append({"task": "report", "context": context.name, "completion": said,
                         "prompt": report_prompt(context, draw_trial(rng, context))})  # fmt: skip
    return rows
