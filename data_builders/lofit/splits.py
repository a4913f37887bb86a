"""From the files of a real data set to its train, dev and test questions, and from rows to a checked DatasetDict."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..reading import ENDINGS, folder_contents
from ..rows import Row, read_hub, read_rows
from ..splits import NAMES, check_disjoint, sample, text_rows

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from . import LofitDataArguments

logger = logging.getLogger(__name__)

DEV_SHARE = 0.2  # the paper's 80/20


@dataclass(frozen=True)
class Question:
    """What every data set's questions have. `content` identifies a question across splits; questions of one `unit`
    stay together when a dev split is cut off."""

    id: str
    split: str
    content: str
    unit: str


Q = TypeVar("Q", bound=Question)


def load(args: LofitDataArguments) -> list[Row]:
    """The source rows; `row.split` is "train", "dev" or "test", or "all" where one file holds everything."""
    if (args.data_files is None) == (args.dataset_id is None):
        raise ValueError(
            f"--dataset {args.dataset} needs either --data_files (a folder, a file, or train=PATH test=PATH) or "
            f"--dataset_id (a Hub data set); got {args.data_files} and {args.dataset_id}"
        )
    if args.dataset_id is not None:
        splits = read_hub(args.dataset_id, args.dataset_revision)
        if len(splits) == 1:
            return [Row(r.values, r.file, "all", r.number) for rows in splits.values() for r in rows]
        if unknown := [name for name in splits if name not in NAMES]:
            raise ValueError(
                f"{args.dataset_id!r} has the splits {list(splits)}; {unknown} is neither train, dev nor test"
            )
        return [Row(r.values, r.file, NAMES[name], r.number) for name, rows in splits.items() for r in rows]
    if args.dataset_revision is not None:
        raise ValueError(f"--dataset_revision {args.dataset_revision} belongs to --dataset_id; --data_files has none")
    entries = args.data_files or []
    if len(entries) == 1 and "=" not in entries[0] and not Path(entries[0]).is_dir():
        return read_rows(entries[0])
    if len(entries) == 1 and Path(entries[0]).is_dir():
        paths = _folder_files(Path(entries[0]), args.fold)
    else:
        paths = _named_files(entries, args.fold)
    return [row for split in ("train", "dev", "test") if split in paths for row in read_rows(paths[split], split)]


def _folder_files(folder: Path, fold: int) -> dict[str, Path]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in ENDINGS)
    # Both folds may lie in one folder; their files are told apart by name, as the authors' are.
    folds = [path for path in files if re.search(r"fold_\d", path.name)]
    if folds or fold:
        files = [path for path in folds if f"fold_{fold}" in path.name]
        if not files:
            raise ValueError(f"no file of fold {fold} (fold_{fold}_train.csv ...): {folder_contents(folder)}")
    paths: dict[str, Path] = {}
    for path in files:
        words = re.findall(r"[a-z]+", path.stem.lower())  # whole words: "latest" is no test file
        for split in {NAMES[word] for word in words if word in NAMES}:
            if split in paths:
                raise ValueError(f"{paths[split]} and {path.name} are both {split}; say train=PATH dev=PATH test=PATH")
            paths[split] = path
    if "train" not in paths or len(paths) < 2:
        raise ValueError(
            f"expected files named train, val (or dev), test; at least train and one more: {folder_contents(folder)}"
        )
    return paths


def _named_files(entries: Sequence[str], fold: int) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not equals or name not in NAMES or NAMES[name] in paths:
            raise ValueError(
                f"--data_files {' '.join(entries)}: {entry!r} is not one of train=PATH dev=PATH test=PATH, each once"
            )
        paths[NAMES[name]] = Path(path)
    if "train" not in paths or len(paths) < 2:
        raise ValueError(
            f"--data_files {' '.join(entries)}: train=PATH and test=PATH are needed (dev=PATH is optional)"
        )
    if fold:
        raise ValueError(f"--fold {fold}: the files given are the splits; name those of fold {fold} and drop --fold")
    return paths


def cut(questions: Sequence[Q], args: LofitDataArguments, folds: bool = False) -> dict[str, list[Q]]:
    """{"train", "dev", "test"}: as given where there are three; otherwise dev is 20 % of train (drawn with
    `rows_seed`, whole units) and test is the given val split or, with `folds`, one half of a single file."""
    parts: dict[str, list[Q]] = {}
    for question in questions:
        parts.setdefault(question.split, []).append(question)
    if "all" in parts:
        if not folds:
            raise ValueError(f"{args.dataset} in one file has no test split: give a folder, or train=PATH test=PATH")
        half = (len(questions) + 1) // 2  # 817 -> 409 and 408, in file order
        halves = [list(questions[:half]), list(questions[half:])]
        parts = {"test": halves[args.fold], "train": halves[1 - args.fold]}
    elif args.fold and args.dataset_id is not None:
        raise ValueError(
            f"--fold {args.fold}: {args.dataset_id!r} has its own splits, so there are no folds to choose"
        )
    elif "test" not in parts:
        logger.warning("%s: no test file; the %d val questions are the test split", args.dataset, len(parts["dev"]))
        parts["test"] = parts.pop("dev")
    if "dev" not in parts:
        parts["train"], parts["dev"] = _carve(parts["train"], args.rows_seed)
        logger.warning(
            "%s: dev is %d questions cut from train (seed %d)", args.dataset, len(parts["dev"]), args.rows_seed
        )
    limits = {"train": args.max_train_rows, "dev": args.max_eval_rows, "test": args.max_eval_rows}
    parts = {split: sample(parts[split], limit, args.rows_seed) for split, limit in limits.items()}
    if empty := [split for split, part in parts.items() if not part]:
        raise ValueError(f"{args.dataset}: no questions left for {empty}; {len(questions)} were read")
    return parts


def _carve(questions: Sequence[Q], seed: int) -> tuple[list[Q], list[Q]]:
    units = list(dict.fromkeys(question.unit for question in questions))
    random.Random(seed).shuffle(units)
    size = len(questions) - int(len(questions) * (1 - DEV_SHARE))  # the authors round the train part down
    members: dict[str, int] = {}
    for question in questions:
        members[question.unit] = members.get(question.unit, 0) + 1
    dev: set[str] = set()
    count = 0
    for unit in units:
        if count >= size:
            break
        dev.add(unit)
        count += members[unit]
    return [q for q in questions if q.unit not in dev], [q for q in questions if q.unit in dev]


def assemble(rows: Mapping[str, list[dict[str, Any]]], args: LofitDataArguments) -> DatasetDict:
    """The splits plus `text`, as one DatasetDict."""
    from datasets import Dataset, DatasetDict

    splits = {**rows, "text": text_rows(args.collateral_file)}
    return DatasetDict({split: Dataset.from_list(content) for split, content in splits.items()})


def check_splits(data: Mapping[str, Dataset]) -> None:
    """Raises ValueError unless ids are unique in each split, and train and dev share no id, group or prompt with each
    other or with an evaluation split. dev and dev_eval hold the same questions; evaluation splits may share theirs."""
    others = [split for split in data if split not in ("train", "dev", "text")]
    pairs = [("train", "dev")] + [("train", split) for split in others]
    pairs += [("dev", split) for split in others if split != "dev_eval"]
    check_disjoint(data, pairs)
