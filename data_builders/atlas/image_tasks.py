"""Image classification tasks of one's own for aTLAS, from local files or the Hub, in `datasets`' image format.

A split that a source lacks is cut from its train images: a tenth each for fit, dev and test, with a seeded shuffle. An
image that stands in several splits, of whichever task, stays in the last of train, fit, dev and test alone.
"""

from __future__ import annotations

import hashlib
import io
import logging
import random
import re
import string
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..reading import show
from ..rows import Row, RowChecker, RowError
from ..splits import NAMES, sample
from . import SPLITS
from .tasks import CUT_SHARE, SPLIT_NAMES

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from .images import AtlasImageArguments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Picture:
    """One checked row: where it stands (`place` in its source split), the hash of its file, its class."""

    split: str
    source: str
    place: int
    group: str
    label: int


def build(args: AtlasImageArguments) -> DatasetDict:
    """All splits of `args.tasks`; pixels are not decoded here.

    Raises ValueError for bad arguments or a task without images in some split, RowError for bad rows.
    """
    from datasets import Dataset, DatasetDict, Features, Image, Value, concatenate_datasets

    from .images import class_rows

    sources = named_sources(args.tasks or [])
    texts = named_templates(args.templates, list(sources))
    if args.dataset_revision is not None and all(Path(source).exists() for source in sources.values()):
        raise ValueError(f"--dataset_revision {args.dataset_revision}: no task is a Hub data set")
    features = Features({
        "id": Value("string"), "group": Value("string"), "task": Value("string"), "image": Image(),
        "label": Value("int64"),
    })  # fmt: skip
    loaded, pictures, classes = {}, {}, []
    for task, source in sources.items():
        loaded[task] = load(source, args.dataset_revision)
        names, found = read_task(task, source, loaded[task], args.image_column, args.label_column)
        pictures[task] = cut(found, task, args.rows_seed)
        classes += class_rows(task, names, texts[task])
    last: dict[str, int] = {}
    for own in pictures.values():
        for one in own:
            last[one.group] = max(last.get(one.group, 0), SPLITS.index(one.split))
    rows: dict[str, list[Dataset]] = {split: [] for split in SPLITS}
    for task, own in pictures.items():
        kept = list({(p.group, p.split): p for p in reversed(own) if SPLITS.index(p.split) == last[p.group]}.values())
        if dropped := len(own) - len(kept):
            logger.warning("task %s: dropped %d images that are held out too, or there twice", task, dropped)
        for split, limit in args.limits().items():
            there = [one for one in reversed(kept) if one.split == split]
            if not there:
                raise ValueError(f"the task {task!r} ({sources[task]}) has no images left for {split}: give it more")
            picked = sample(there, limit, args.rows_seed)
            held = dict.fromkeys(one.source for one in picked)
            order = [one for name in held for one in picked if one.source == name]
            parts = [loaded[task][name].select([one.place for one in order if one.source == name]) for name in held]
            table = concatenate_datasets([part.select_columns([args.image_column]) for part in parts])
            if args.image_column != "image":
                table = table.rename_column(args.image_column, "image")
            for column, values in (
                ("id", [f"{task}-{one.group}" for one in order]),
                ("group", [one.group for one in order]),
                ("task", [task] * len(order)),
                ("label", [one.label for one in order]),
            ):
                table = table.add_column(column, values)
            rows[split].append(table.select_columns(list(features)).cast(features))
    data = {split: concatenate_datasets(parts) for split, parts in rows.items()}
    return DatasetDict(data | {"classes": Dataset.from_list(classes)})


def named_sources(entries: Sequence[str]) -> dict[str, str]:
    """Task name -> path or Hub id, in the order given."""
    sources: dict[str, str] = {}
    for entry in entries:
        name, equals, source = entry.partition("=")
        if not equals or not source or not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"--tasks: {entry!r} is not name=PATH_OR_HUB_ID (a name: letters, digits, - _ .)")
        if name in sources:
            raise ValueError(f"--tasks: the task name {name!r} is given twice")
        sources[name] = source
    if not sources:
        raise ValueError("--tasks is empty: name at least one task")
    return sources


def named_templates(entries: Sequence[str] | None, tasks: Sequence[str]) -> dict[str, list[str]]:
    """Task -> its prompt templates: its own (`name=TEXT`), else those of all tasks."""
    from .images import TEMPLATE

    shared: list[str] = []
    own: dict[str, list[str]] = {}
    for entry in entries or []:
        name, equals, text = entry.partition("=")
        known = bool(equals) and name in tasks
        text = text if known else entry
        fields = [part[1] for part in string.Formatter().parse(text) if part[1] is not None]
        if fields != [""]:
            raise ValueError(f"--templates: {entry!r} needs {{}} once, where the class name goes")
        (own.setdefault(name, []) if known else shared).append(text)
    return {task: own.get(task) or shared or [TEMPLATE] for task in tasks}


def load(source: str, revision: str | None) -> dict[str, Dataset]:
    """The source's splits by our names. Local files are read anew each time, downloads are kept by `datasets`.

    Raises ValueError for splits we do not know and for a set that cannot be read, OSError for one out of reach.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    path = Path(source)
    name, _, config = (source, "", "") if path.exists() else source.partition(":")
    if not path.exists() and (source.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"{source}: no such file or folder (a Hub id has the form owner/name)")
    message = f"the image data set {source!r} could not be loaded"
    try:
        if path.exists():
            with tempfile.TemporaryDirectory() as scratch:
                if path.is_file():
                    if path.suffix.lower() != ".parquet":
                        raise ValueError("a single file must be parquet; images go into a folder a class")
                    found = load_dataset("parquet", data_files=str(path), cache_dir=scratch, keep_in_memory=True)
                else:
                    found = load_dataset(str(path), cache_dir=scratch, keep_in_memory=True)
        else:
            found = load_dataset(name, config or None, revision=revision)
    except OSError as error:
        raise OSError(f"{message}: {error}") from error
    except (DatasetsError, ValueError) as error:
        raise ValueError(f"{message}: {error}") from error
    if len(found) == 1:
        return {"train": next(iter(found.values()))}
    known = {split: (SPLIT_NAMES | NAMES).get(split, split) for split in found}
    kept = {ours: found[split] for split, ours in known.items() if ours in SPLITS}
    if "train" not in kept or len(kept) < sum(ours in SPLITS for ours in known.values()):
        raise ValueError(f"{source!r} has the splits {list(found)}; expected train and any of fit, dev, test, once")
    if extra := sorted(split for split, ours in known.items() if ours not in SPLITS):
        logger.warning("%s: splits that are not used: %s", source, ", ".join(extra))
    return kept


def read_task(
    task: str, source: str, splits: dict[str, Dataset], image_column: str, label_column: str
) -> tuple[list[str], list[Picture]]:
    """Class names, and every row checked: an image file that opens, and a label that is one of the classes."""
    from datasets import ClassLabel, Image

    for split, table in splits.items():
        for column, flag in ((image_column, "image_column"), (label_column, "label_column")):
            if column not in table.column_names:
                raise RowError(
                    f"task {task}: {source}, split {split}: missing column {column!r}; there are "
                    f"{', '.join(map(repr, table.column_names))} (--{flag} names another)"
                )
        if not isinstance(table.features[image_column], Image):
            raise RowError(
                f"task {task}: {source}, split {split}, column {image_column!r}: found "
                f"{table.features[image_column]}, expected images (datasets.Image)"
            )
    kinds = [table.features[label_column] for table in splits.values()]
    if all(isinstance(kind, ClassLabel) for kind in kinds):
        names = list(kinds[0].names)
        if any(kind.names != names for kind in kinds):
            raise RowError(f"task {task}: {source}: the splits have different classes")
    elif all(getattr(kind, "dtype", None) in ("string", "large_string") for kind in kinds):
        named = {label for table in splits.values() for label in table[label_column][:] if label}
        names = sorted(named)
    else:
        raise RowError(
            f"task {task}: {source}, column {label_column!r}: found {kinds[0]}, expected class names or a ClassLabel, "
            "which has them (cast the column and save again)"
        )
    places = {name: number for number, name in enumerate(names)}
    rows, pictures, checks = [], [], []
    for split, table in splits.items():
        files = table.select_columns([image_column, label_column]).cast_column(image_column, Image(decode=False))
        for place, values in enumerate(files):
            row = Row({image_column: "an image", label_column: values[label_column]}, source, split, place + 1)
            rows.append(row)
            label = values[label_column]
            label = places.get(label) if isinstance(label, str) else label
            group, wrong = open_image(values[image_column])
            if wrong:
                checks.append((row, image_column, wrong, "an image file"))
            if label is None or not 0 <= label < len(names):
                checks.append((row, label_column, show(values[label_column]), f"one of {len(names)} classes"))
            else:
                pictures.append(Picture(split, split, place, group, label))
    checker = RowChecker(rows, {image_column: (image_column,), label_column: (label_column,)}, f"task {task}")
    for check in checks:
        checker.problem(*check)
    checker.finish()
    return names, pictures


def open_image(cell: dict[str, Any] | None) -> tuple[str, str]:
    """The hash of an image file, and what is wrong with it, if anything. Only its header is decoded."""
    from PIL import Image, UnidentifiedImageError

    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        return "", "nothing (None)"
    try:
        content = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
        Image.open(io.BytesIO(content))
    except (OSError, UnidentifiedImageError) as error:
        return "", f"a file that does not open ({type(error).__name__})"
    return hashlib.sha256(content).hexdigest()[:16], ""


def cut(pictures: Sequence[Picture], task: str, seed: int) -> list[Picture]:
    """The same with every split there is to be: what is missing is cut from train, equal images together; each gets a
    tenth of them, at least one."""
    missing = [split for split in SPLITS[1:] if all(one.split != split for one in pictures)]
    groups = list(dict.fromkeys(one.group for one in pictures if one.split == "train"))
    if len(groups) <= len(missing):
        raise ValueError(
            f"the task {task!r} has {len(groups)} different train images; {', '.join(missing) or 'train'} cannot be "
            "cut from so few"
        )
    random.Random(seed).shuffle(groups)
    size = max(1, int(len(groups) * CUT_SHARE))
    chosen = {group: missing[place // size] for place, group in enumerate(groups[: size * len(missing)])}
    if missing:
        logger.warning("task %s: %s cut from train (seed %d)", task, ", ".join(missing), seed)
    return [replace(one, split=chosen.get(one.group, "train")) if one.split == "train" else one for one in pictures]
