"""PING: an offline desk with tools, tasks on it, and the data that agents are trained and tested with.

`build(args)` gives conversations in TRL's messages + tools form (`train`, `dev`): harmless tasks done at the desk, or
a public set of agent trajectories.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from datasets import DatasetDict

SHOWN = 5


@dataclass
class PingDataArguments:
    """What to build. Everything is pure in these values: the same ones give the same rows, byte for byte."""

    dataset: Literal["desk", "agent_instruct", "code_act", "tool_ace", "xlam", "messages"] = field(
        default="desk",
        metadata={
            "help": "Tasks at the desk, or rows as a public set has them (`messages`: with messages and tools)."
        },
    )
    data_files: list[str] | None = field(
        default=None, metadata={"help": "Files of a public set (json, jsonl, parquet, arrow)."}
    )
    dataset_id: str | None = field(
        default=None,
        metadata={"help": "Instead: a Hub data set (owner/name or owner/name:config), or a local folder."},
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the Hub data set."})
    dataset_split: str = field(default="train", metadata={"help": "Which split of it."})
    tasks: int = field(default=400, metadata={"help": "Of the desk: harmless tasks to train on."})
    refusals: float = field(
        default=0.0, metadata={"help": "Of the desk: the share of rows that are harmful tasks, refused."}
    )
    dev: float = field(default=0.1, metadata={"help": "The share of rows that is held out (the paper's: 0.1)."})
    max_rows: int | None = field(default=None, metadata={"help": "Of a public set: sample this many rows."})
    rows_seed: int = field(default=42, metadata={"help": "Seed of tasks, sampling and of what is held out."})

    def __post_init__(self) -> None:
        public = {name: getattr(self, name) for name in ("data_files", "dataset_id", "max_rows", "dataset_revision")}
        given = [f"--{name}" for name, value in public.items() if value is not None]
        if self.dataset == "desk" and given:
            raise ValueError(f"{', '.join(given)}: of a public set; say which with --dataset")
        if self.dataset != "desk" and (self.data_files is None) == (self.dataset_id is None):
            raise ValueError(f"--dataset {self.dataset} needs --data_files or --dataset_id, one of them")
        if self.tasks < 10:
            raise ValueError(f"--tasks {self.tasks}: at least 10")
        if not 0 < self.dev < 1:
            raise ValueError(f"--dev {self.dev}: a share above 0 and below 1")
        if not 0 <= self.refusals < 1:
            raise ValueError(f"--refusals {self.refusals}: a share of at least 0 and below 1")


def build(args: PingDataArguments) -> DatasetDict:
    """`train` and `dev`, with the columns `id`, `messages`, `tools` and `loss`: of every turn of the assistant,
    whether it is trained on.

    Raises:
        ValueError: rows that cannot be used, the first five of them named.
    """
    from datasets import Dataset, DatasetDict, Features, Json, List, Value

    rng = Random(args.rows_seed)
    rows = _desk(args, rng) if args.dataset == "desk" else _public(args, rng)
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} rows are too few: one is needed to train on and one to hold out")
    train, dev = _parts(rows, args.dev)
    form = Features(
        {"id": Value("string"), "messages": List(Json()), "tools": List(Json()), "loss": List(Value("bool"))}
    )
    return DatasetDict(
        {name: Dataset.from_list(part, features=form) for name, part in (("train", train), ("dev", dev))}
    )


def _parts(rows: list[dict[str, Any]], share: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows to train on, and about `share` held out; rows that begin with the same request stay together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        asked = next((turn["content"] for turn in row["messages"] if turn["role"] == "user"), "")
        groups.setdefault(str(asked), []).append(row)
    if len(groups) < 2:
        raise ValueError(f"all {len(rows)} rows begin with the same request: nothing can be held out")
    dev: list[dict[str, Any]] = []
    order = list(groups.values())
    while len(order) > 1 and len(dev) < max(1, round(share * len(rows))):
        dev += order.pop(0)
    return [row for group in order for row in group], dev


def _desk(args: PingDataArguments, rng: Random) -> list[dict[str, Any]]:
    from .office import OFFICE
    from .splits import task_sets
    from .trajectories import rows_of

    tasks = task_sets(OFFICE, {"train": args.tasks}, args.rows_seed)["train"]
    rows = rows_of(tasks, rng, refused=args.refusals)
    return [{**row, "loss": [True for one in row["messages"] if one["role"] == "assistant"]} for row in rows]


def _public(args: PingDataArguments, rng: Random) -> list[dict[str, Any]]:
    from ..reading import RowError, read_hub, read_rows
    from .converters import CONVERTERS
    from .trajectories import check_messages

    if args.dataset_id is not None:
        splits = read_hub(args.dataset_id, args.dataset_revision)
        if args.dataset_split not in splits:
            raise ValueError(f"{args.dataset_id} has no split {args.dataset_split!r}, only {', '.join(splits)}")
        source = splits[args.dataset_split]
    else:
        source = [row for file in args.data_files or [] for row in read_rows(file)]
    if args.max_rows is not None and args.max_rows < len(source):
        source = [source[place] for place in sorted(rng.sample(range(len(source)), args.max_rows))]
    made: list[dict[str, Any]] = []
    problems: list[str] = []
    for row in source:
        try:
            found = CONVERTERS[args.dataset](row.values)
            check_messages(found["messages"], found["tools"])
        except ValueError as error:
            problems.append(f"{row.place()}, {error}")
            continue
        name = row.values.get("id", row.number)
        made.append({"id": str(name), **found})
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        listed = "\n  ".join(problems[:SHOWN] + more)
        raise RowError(f"{args.dataset}: {len(problems)} row(s) cannot be used\n  {listed}")
    rng.shuffle(made)
    return made
