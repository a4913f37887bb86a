"""Data for LoFiT: the embedded world `myths`, and TruthfulQA, MQuAKE and CLUTRR from local files or the Hub.

`build(args)` is a pure function of its arguments. It returns these splits (all text, every row has `id` and `group`):

- `train`, `dev`: prompt, chosen, rejected (loss `dpo`) or prompt, completion (loss `sft`);
- `dev_eval`, `test` and, for myths, further scorer splits: either multiple choice rows (prompt, best, true, false; the
  scored text is prompt + choice) or exact match rows (prompt, answers, stop, and MQuAKE's `shortcut`);
- `text`: unrelated texts, to measure what the tuning does to everything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from datasets import DatasetDict

DATASETS = ("myths", "truthfulqa", "mquake", "clutrr")


@dataclass
class LofitDataArguments:
    """What to build. `build` is pure in these values: the same ones give the same rows, byte for byte."""

    dataset: Literal["myths", "truthfulqa", "mquake", "clutrr"] = field(
        default="myths", metadata={"help": "Which data: the embedded world `myths`, or a real data set given below."}
    )
    data_files: list[str] | None = field(
        default=None,
        metadata={"help": "A folder with train/val/test files, one file, or entries train=PATH dev=PATH test=PATH."},
    )
    dataset_id: str | None = field(
        default=None, metadata={"help": "A Hub data set (owner/name or owner/name:config), or a local folder of one."}
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the Hub data set."})
    loss: Literal["auto", "dpo", "sft"] = field(
        default="auto", metadata={"help": "auto: dpo for truthfulqa, sft for the others."}
    )
    prompt_style: Literal["clean", "paper"] = field(
        default="clean",
        metadata={"help": "paper: the paper's texts to the character. clean: the same without its spacing quirks."},
    )
    pairs: Literal["first", "all"] = field(
        default="first", metadata={"help": "DPO pairs: best answer against the first, or against each, wrong answer."}
    )
    fold: Literal[0, 1] = field(
        default=0,
        metadata={"help": "Which half of TruthfulQA is the test half (the other is cut into train and dev)."},
    )
    rows_seed: int = field(default=42, metadata={"help": "Seed of the world, of sampling and of cutting a dev split."})
    max_train_rows: int | None = field(
        default=None, metadata={"help": "Sample this many training questions. Unset: 300 for clutrr, all otherwise."}
    )
    max_eval_rows: int | None = field(
        default=None, metadata={"help": "Sample at most this many questions of dev and of each test split."}
    )
    collateral_file: str | None = field(
        default=None,
        metadata={"help": "Unrelated texts (rows with a `text` column, or .txt paragraphs). Unset: built-in ones."},
    )
    world: Literal["default", "smoke"] = field(
        default="default", metadata={"help": "Size of the embedded world (myths only)."}
    )


def build(args: LofitDataArguments) -> DatasetDict:
    """The data set that `args` describe, every row checked, train and dev disjoint from all evaluation splits.

    Raises ValueError (RowError for bad rows: file, split, row, id, column, found, expected), FileNotFoundError for a
    missing file, OSError for a Hub data set that cannot be reached.
    """
    from . import clutrr, mquake, myths, truthfulqa
    from .splits import check_splits

    if args.dataset not in DATASETS:
        raise ValueError(f"unknown dataset {args.dataset!r}: choose one of {', '.join(DATASETS)}")
    if args.dataset == "myths":
        if args.data_files is not None or args.dataset_id is not None:
            raise ValueError(
                f"myths is built in and reads no files, but got {args.data_files or args.dataset_id}: "
                f"name the data set they hold with --dataset ({', '.join(DATASETS[1:])})"
            )
        data = myths.build(args)
    else:
        builder = {"truthfulqa": truthfulqa, "mquake": mquake, "clutrr": clutrr}[args.dataset]
        data = builder.build(args, resolved_loss(args))
    check_splits(data)
    return data


def resolved_loss(args: LofitDataArguments) -> Literal["dpo", "sft"]:
    """What `auto` means for this data set: the paper's choice; for myths SFT on the truth, the milder of the two."""
    if args.loss != "auto":
        return args.loss
    return "dpo" if args.dataset == "truthfulqa" else "sft"


def of_seed(args: LofitDataArguments, seed: int) -> LofitDataArguments:
    """The arguments for one seed of a run: each has an embedded world of its own, real data are the same for all."""
    return replace(args, rows_seed=seed) if args.dataset == "myths" else args


def base_corpus(args: LofitDataArguments, data: Mapping[str, Any]) -> list[str]:
    """What a tiny base is trained on: the world's corpus, or the texts of a real data set (a toy all the same)."""
    if args.dataset == "myths":
        from . import myths

        return myths.corpus(args.rows_seed, args.world)
    answer = "chosen" if "chosen" in data["train"].column_names else "completion"
    return [row["prompt"] + row[answer] for row in data["train"]] + list(data["text"]["text"])


def other_loss(args: LofitDataArguments) -> LofitDataArguments | None:
    """The same data for the other loss: SFT on the truth beside DPO, or the reverse; None without wrong answers."""
    if args.dataset in ("mquake", "clutrr"):
        return None
    return replace(args, loss="sft" if resolved_loss(args) == "dpo" else "dpo")
