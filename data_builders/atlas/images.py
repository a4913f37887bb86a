"""Images for aTLAS: the embedded tasks on scikit-learn's real digits, or image classification tasks of your own.

`build(args)` is a pure function of its arguments. It returns the splits `train`, `fit`, `dev` and `test` (what each is
for: see the package) with rows of `id`, `group` (rows made from one image, in all tasks), `task`, `image` and `label`,
and one more, `classes`: for each task and `label` its `name` and `prompts`, the texts of the zero-shot head.

No image is in two of the four splits, of whichever tasks.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

from . import SPLITS

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

TEMPLATE = "a photo of a {}."


@dataclass
class AtlasImageArguments:
    """What to build. `build` is pure in these values: the same ones give the same rows."""

    tasks: list[str] | None = field(
        default=None,
        metadata={
            "help": "Image classification tasks as name=PATH (a folder of images in folders of classes, a parquet "
            "file or folder) or name=HUB_ID (owner/name or owner/name:config). Unset: the embedded digits."
        },
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the Hub data sets among the tasks."}
    )
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels: ClassLabel, or class names."})
    templates: list[str] | None = field(
        default=None,
        metadata={"help": f"Prompt texts with {{}} for the class name, of all tasks, or of one as name=TEXT. Unset: "
                  f"{TEMPLATE!r}."},
    )  # fmt: skip
    rows_seed: int = field(default=42, metadata={"help": "Seed of sampling and of cutting splits."})
    max_train_rows: int | None = field(default=None, metadata={"help": "Sample this many train images of each task."})
    max_fit_rows: int | None = field(default=None, metadata={"help": "Sample this many fit images of each task."})
    max_eval_rows: int | None = field(
        default=None, metadata={"help": "Sample this many images of each task for dev and for test."}
    )
    world: Literal["default", "smoke"] = field(
        default="default", metadata={"help": "Size of the embedded suite (only without --tasks)."}
    )

    def limits(self) -> dict[str, int | None]:
        """Split -> how many images of a task it may have."""
        limits = (self.max_train_rows, self.max_fit_rows, self.max_eval_rows, self.max_eval_rows)
        return dict(zip(SPLITS, limits, strict=True))


def build(args: AtlasImageArguments) -> DatasetDict:
    """The data set that `args` describe, every row checked.

    Raises ValueError (RowError for bad rows: file, split, row, column, found, expected), FileNotFoundError for a
    missing file, OSError for a Hub data set that cannot be reached.
    """
    from ..splits import check_disjoint
    from . import digits, image_tasks

    if args.tasks is None:
        usual = AtlasImageArguments()
        for flag in ("dataset_revision", "image_column", "label_column", "templates"):
            if getattr(args, flag) != getattr(usual, flag):
                raise ValueError(
                    f"--{flag} {getattr(args, flag)} has no meaning for the embedded digits: name --tasks, or drop it"
                )
        data = digits.build(args)
    else:
        data = image_tasks.build(args)
    check_disjoint(without_images(data), combinations(SPLITS, 2), ("id", "group"))
    return data


def of_seed(args: AtlasImageArguments, seed: int) -> AtlasImageArguments:
    """The arguments for one seed of a run: the digits are cut anew for each, real data are the same for all."""
    return replace(args, rows_seed=seed) if args.tasks is None else args


def without_images(data: DatasetDict) -> DatasetDict:
    """The same without pixels, which stand for themselves in the ids: for fingerprints and scores."""
    from datasets import DatasetDict

    return DatasetDict({
        split: rows.remove_columns("image") if "image" in rows.column_names else rows for split, rows in data.items()
    })  # fmt: skip


def prompts(classes: Dataset) -> dict[str, list[list[str]]]:
    """Task -> for each class, in the order of the labels, its prompt texts."""
    found: dict[str, list[list[str]]] = defaultdict(list)
    for row in classes:
        if row["label"] != len(found[row["task"]]):
            raise ValueError(f"classes of {row['task']} are not in the order of their labels: {row['label']}")
        found[row["task"]].append(list(row["prompts"]))
    return dict(found)


def class_rows(task: str, names: Sequence[str], templates: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the split `classes` of one task."""
    return [
        {"id": f"{task}-{label}", "task": task, "label": label, "name": name,
         "prompts": [template.format(name) for template in templates]}
        for label, name in enumerate(names)
    ]  # fmt: skip


def few_shot(labels: Sequence[int], shots: int, seed: int = 0) -> list[int]:
    """Places of `shots` rows of each class (of all, where it has fewer), drawn at random.

    Fewer shots are part of more; the result is sorted.
    """
    if shots < 1:
        raise ValueError(f"{shots} shots leave nothing; take at least 1")
    places: dict[int, list[int]] = defaultdict(list)
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    for place in order:
        places[labels[place]].append(place)
    return sorted(place for own in places.values() for place in own[:shots])
