"""Data for aTLAS: the embedded world `skills`, or tasks of your own from local files or the Hub.

`build(args)` is a pure function of its arguments. It returns these splits, disjoint by content:

- `train`: to fine-tune task vectors on, and the joint fine-tuning that is the ceiling;
- `fit`: what coefficients are fitted on, few rows;
- `dev`: every choice (alpha, learning rate, checkpoint);
- `test`: nothing but the final measurement;
- `control`: texts that have nothing to do with any task.

Rows of the first four have `id`, `group` (rows of one content), `task`, `role` ("known": a task that has a vector;
"new": one that is learned by composing the others', from `fit` alone), `prompt` and `completion`, either both texts or
both lists of messages. `control` has `id`, `group` and `text`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from datasets import DatasetDict

SPLITS = ("train", "fit", "dev", "test")


@dataclass
class AtlasDataArguments:
    """What to build. `build` is pure in these values: the same ones give the same rows, byte for byte."""

    tasks: list[str] | None = field(
        default=None,
        metadata={
            "help": "Tasks with a vector, as name=PATH (csv, json, jsonl, parquet, arrow, or a folder of splits) or "
            "name=HUB_ID (owner/name or owner/name:config). Unset: the embedded world."
        },
    )
    new_tasks: list[str] | None = field(
        default=None, metadata={"help": "Tasks to learn from a few rows by composing the vectors of --tasks."}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the Hub data sets among the tasks."}
    )
    rows_seed: int = field(default=42, metadata={"help": "Seed of the world, of sampling and of cutting splits."})
    max_train_rows: int | None = field(default=None, metadata={"help": "Sample this many train rows of each task."})
    max_fit_rows: int | None = field(default=None, metadata={"help": "Sample this many fit rows of each task."})
    max_eval_rows: int | None = field(
        default=None, metadata={"help": "Sample this many rows of each task for dev and for test."}
    )
    collateral_file: str | None = field(
        default=None,
        metadata={"help": "Unrelated texts (rows with a `text` column, or .txt paragraphs). Unset: built-in ones."},
    )
    world: Literal["default", "smoke"] = field(
        default="default", metadata={"help": "Size of the embedded world (only without --tasks)."}
    )

    def limits(self) -> dict[str, int | None]:
        """Split -> how many rows of a task it may have."""
        limits = (self.max_train_rows, self.max_fit_rows, self.max_eval_rows, self.max_eval_rows)
        return dict(zip(SPLITS, limits, strict=True))


def build(args: AtlasDataArguments) -> DatasetDict:
    """The data set that `args` describe, every row checked, no content in two of train, fit, dev and test.

    Raises ValueError (RowError for bad rows: file, split, row, column, found, expected), FileNotFoundError for a
    missing file, OSError for a Hub data set that cannot be reached.
    """
    from ..splits import check_disjoint
    from . import skills, tasks

    if args.tasks is None:
        for flag in ("new_tasks", "dataset_revision", "collateral_file"):
            if getattr(args, flag) is not None:
                raise ValueError(
                    f"--{flag} {getattr(args, flag)} has no meaning for the embedded world: name --tasks, or drop it"
                )
        data = skills.build(args)
    else:
        data = tasks.build(args)
    check_disjoint(data, combinations(SPLITS, 2), ("id", "group"))
    return data


def of_seed(args: AtlasDataArguments, seed: int) -> AtlasDataArguments:
    """The arguments for one seed of a run: each has an embedded world of its own, real data are the same for all."""
    return replace(args, rows_seed=seed) if args.tasks is None else args


def base_corpus(args: AtlasDataArguments, data: Mapping[str, Any]) -> list[str]:
    """What a tiny base is trained on: the world's corpus, or the texts of real tasks (a toy all the same).

    Raises ValueError for conversations, which a tiny base has no template for.
    """
    from . import skills

    if args.tasks is None:
        return skills.corpus(args.rows_seed, args.world)
    rows = [row for split in ("train", "fit") for row in data[split]]
    if not isinstance(rows[0]["prompt"], str):
        raise ValueError("tasks made of messages need a model with a chat template: give --model_name_or_path")
    return [row["prompt"] + row["completion"] for row in rows] + list(data["control"]["text"])
