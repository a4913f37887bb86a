"""Tasks of one's own for aTLAS: any prompt/completion or messages data set, from local files or the Hub.

Texts stay as they stand, with the spaces between prompt and completion that they have. Of messages, the last one (by
the assistant) is the completion and those before it are the prompt.

A split that a source lacks is cut from its train rows: a tenth each for fit, dev and test, with a seeded shuffle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..reading import ENDINGS, show
from ..rows import Row, RowChecker, RowError, read_hub, read_rows
from ..splits import NAMES, sample, text_rows
from . import SPLITS

if TYPE_CHECKING:
    from datasets import DatasetDict

    from . import AtlasDataArguments

logger = logging.getLogger(__name__)

CUT_SHARE = 0.1  # of each split that is cut from train; aTLAS fits on a tenth of the training data, too (section 4.1)
SPLIT_NAMES = NAMES | {"fit": "fit"}
ROLES = ("system", "user", "assistant")

Content: TypeAlias = str | list[dict[str, str]]


@dataclass(frozen=True)
class Example:
    """One checked row. `group` is a hash of the prompt without regard to case and spacing, alike in all tasks."""

    task: str
    role: str
    split: str
    group: str
    prompt: Content
    completion: Content

    def row(self) -> dict[str, Any]:
        return {
            "id": f"{self.task}-{_digest([self.prompt, self.completion])}",
            "group": self.group,
            "task": self.task,
            "role": self.role,
            "prompt": self.prompt,
            "completion": self.completion,
        }


def build(args: AtlasDataArguments) -> DatasetDict:
    """All splits of `args.tasks` and `args.new_tasks`.

    A prompt that stands in several splits, of whichever task, stays in the last of train, fit, dev and test alone, and
    a row that a task has twice is taken once; both with a warning. New tasks have no train rows.

    Raises ValueError for bad arguments or a task without rows in some split, RowError for bad rows.
    """
    from datasets import Dataset, DatasetDict

    sources = named_sources(args)
    hub = [source for _, source in sources.values() if not _is_local(source)]
    if args.dataset_revision is not None and not hub:
        raise ValueError(f"--dataset_revision {args.dataset_revision}: no task is a Hub data set")
    examples: list[Example] = []
    for name, (role, source) in sources.items():
        parts = cut(read_task(name, role, load(source, args.dataset_revision)), name, args.rows_seed)
        examples += [example for part in parts.values() for example in part]
    check_kind(examples)
    examples = drop_held_out(examples)
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for name, (role, source) in sources.items():
        for split, limit in args.limits().items():
            if role == "new" and split == "train":
                continue
            own = [example for example in examples if (example.task, example.split) == (name, split)]
            if not own:
                raise ValueError(f"the task {name!r} ({source}) has no rows left for {split}: give it more rows")
            rows[split] += [example.row() for example in sample(own, limit, args.rows_seed)]
    rows["control"] = text_rows(args.collateral_file)
    return DatasetDict({split: Dataset.from_list(content) for split, content in rows.items()})


def named_sources(args: AtlasDataArguments) -> dict[str, tuple[str, str]]:
    """Task name -> (role, path or Hub id), in the order given."""
    sources: dict[str, tuple[str, str]] = {}
    for flag, role, entries in (("tasks", "known", args.tasks), ("new_tasks", "new", args.new_tasks)):
        for entry in entries or []:
            name, equals, source = entry.partition("=")
            if not equals or not source or not re.fullmatch(r"\w[\w.-]*", name):
                raise ValueError(f"--{flag}: {entry!r} is not name=PATH_OR_HUB_ID (a name: letters, digits, - _ .)")
            if name in sources:
                raise ValueError(f"--{flag}: the task name {name!r} is given twice")
            sources[name] = (role, source)
    if not args.tasks:
        raise ValueError("--tasks is empty: name at least one task with a vector")
    return sources


def _is_local(source: str) -> bool:
    return Path(source).exists() or Path(source).suffix.lower() in ENDINGS


def load(source: str, revision: str | None) -> list[Row]:
    """The rows of one task; `row.split` is our name of the split, "train" where there is only one."""
    if _is_local(source) and not Path(source).is_dir():
        return read_rows(source, "train")
    splits = read_hub(source, None if _is_local(source) else revision)
    if len(splits) == 1:
        splits = {"train": next(iter(splits.values()))}
    named = [SPLIT_NAMES.get(split, split) for split in splits]
    if "train" not in named or set(named) - set(SPLITS) or len(set(named)) < len(named):
        raise ValueError(f"{source!r} has the splits {list(splits)}; expected train and any of fit, dev, test, once")
    return [
        Row(r.values, r.file, name, r.number) for name, rows in zip(named, splits.values(), strict=True) for r in rows
    ]


def read_task(name: str, role: str, rows: Sequence[Row]) -> list[Example]:
    """Checked rows of one task: columns prompt and completion (texts, or both lists of messages), or messages."""
    if not rows:
        raise RowError(f"task {name}: there are no rows")
    conversations = "messages" in rows[0].values
    columns = ("messages",) if conversations else ("prompt", "completion")
    checker = RowChecker(rows, {column: (column,) for column in columns}, f"task {name}")
    examples = []
    for row in rows:
        if conversations:
            turns = messages(checker, row, "messages")
            if turns and (len(turns) < 2 or turns[-1]["role"] != "assistant"):
                found = f"{len(turns)} messages, the last by {turns[-1]['role']!r}"
                checker.problem(row, "messages", found, "a prompt, then an answer by 'assistant'")
            prompt: Content = turns[:-1]
            completion: Content = turns[-1:]
        elif isinstance(checker.value(row, "prompt"), list):
            prompt, completion = (messages(checker, row, column) for column in columns)
            if completion and [turn["role"] for turn in completion] != ["assistant"]:
                checker.problem(row, "completion", show(completion), "one message by 'assistant'")
        else:
            prompt, completion = (checker.text(row, column) for column in columns)
        if prompt and completion:
            examples.append(Example(name, role, row.split, _group(prompt), prompt, completion))
    checker.finish()
    return examples


def messages(checker: RowChecker, row: Row, column: str) -> list[dict[str, str]]:
    """A conversation as a list of {"role", "content"}; [] and a problem if it is none."""
    value = checker.value(row, column)
    turns = value if isinstance(value, list) else [None]
    for turn in turns or [None]:  # an empty list is bad, too
        filled = {key: item for key, item in turn.items() if item is not None} if isinstance(turn, dict) else {}
        plain = filled.keys() == {"role", "content"} and filled["role"] in ROLES
        if not plain or not isinstance(filled["content"], str) or not filled["content"].strip():
            expected = f"messages of role ({', '.join(ROLES)}) and content (a non-empty text), nothing else"
            checker.problem(row, column, show(turn if isinstance(value, list) else value), expected)
            return []
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns if turn]


def check_kind(examples: Sequence[Example]) -> None:
    """ValueError if some tasks are texts and others messages: one model is trained on them all alike."""
    kinds = {example.task: "texts" if isinstance(example.prompt, str) else "messages" for example in examples}
    mixed = {(example.task, isinstance(example.prompt, str)) for example in examples}
    if len(mixed) > len(kinds) or len(set(kinds.values())) > 1:
        raise ValueError(f"tasks must be all texts or all messages, but there are both: {kinds}")


def cut(examples: Sequence[Example], name: str, seed: int) -> dict[str, list[Example]]:
    """The task's rows by split. Whatever split it lacks is cut from train by prompts, so that rows of one prompt stay
    together; each gets a tenth of the prompts, at least one."""
    parts: dict[str, list[Example]] = {split: [e for e in examples if e.split == split] for split in SPLITS}
    missing = [split for split in SPLITS[1:] if not parts[split]]
    groups = list(dict.fromkeys(example.group for example in parts["train"]))
    if len(groups) <= len(missing):
        raise ValueError(
            f"the task {name!r} has {len(groups)} different train prompts; {', '.join(missing) or 'train'} cannot be "
            "cut from so few"
        )
    random.Random(seed).shuffle(groups)
    size = max(1, int(len(groups) * CUT_SHARE))
    chosen = {group: missing[i // size] for i, group in enumerate(groups[: size * len(missing)])}
    for split in missing:
        parts[split] = [_moved(e, split) for e in parts["train"] if chosen.get(e.group) == split]
    parts["train"] = [e for e in parts["train"] if e.group not in chosen]
    if missing:
        counts = ", ".join(f"{split} {len(parts[split])}" for split in missing)
        logger.warning("task %s: %s rows cut from train (seed %d)", name, counts, seed)
    return parts


def drop_held_out(examples: Sequence[Example]) -> list[Example]:
    """Every prompt in one split only, the last that has it, and every row of a task once."""
    last: dict[str, int] = {}
    for example in examples:
        last[example.group] = max(last.get(example.group, 0), SPLITS.index(example.split))
    kept = [example for example in examples if SPLITS.index(example.split) == last[example.group]]
    if dropped := len(examples) - len(kept):
        logger.warning("dropped %d rows whose prompt is held out too, in this or another task", dropped)
    once = list({(e.task, e.split, e.group, _digest(e.completion)): e for e in reversed(kept)}.values())[::-1]
    if repeated := len(kept) - len(once):
        logger.warning("dropped %d rows that their task has twice", repeated)
    return once


def _moved(example: Example, split: str) -> Example:
    return Example(example.task, example.role, split, example.group, example.prompt, example.completion)


def _group(prompt: Content) -> str:
    texts = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
    return _digest([" ".join(text.casefold().split()) for text in texts])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]
