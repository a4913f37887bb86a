"""CLUTRR (Sinha et al. 2019), two-hop kinship stories: name the relation (LoFiT, section 4.1).

`paper` style is the authors' prompt with its quirks: two spaces before a name, "Herman 's", and the relation on a new
line. `clean` style has none of them: it ends in "Rosalee is Herman's" and the completion is " daughter-in-law".
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..reading import show
from ..rows import Row, RowChecker
from .splits import Question, assemble, cut, load

if TYPE_CHECKING:
    from datasets import DatasetDict

    from . import LofitDataArguments

logger = logging.getLogger(__name__)

TRAIN_ROWS = 300  # the paper samples this many of 3,151
COLUMNS = {name: (name,) for name in ("id", "clean_story", "query", "target_text")}
TEMPLATE = (
    'Read the following story about a family. "{story}" Assume the relations described in the story are all true. '
    "Based on relations between the fictional characters in the story (assume the relations are all true) and your "
    "commonsense knowledge about family relationship, how is {second} related to {first}? "
    "Answer: {second} is {first}{end}"
)


@dataclass(frozen=True)
class KinshipQuestion(Question):
    story: str
    first: str
    second: str
    relation: str


def build(args: LofitDataArguments, loss: str) -> DatasetDict:
    """Splits train (300 sampled unless `max_train_rows` says otherwise), dev, dev_eval, test, text."""
    if loss != "sft" or args.pairs == "all":
        raise ValueError("clutrr has no wrong answers to make pairs of: use --loss sft and drop --pairs")
    limit = TRAIN_ROWS if args.max_train_rows is None else args.max_train_rows
    parts = cut(without_repeats(read(load(args))), replace(args, max_train_rows=limit))
    rows: dict[str, list[dict[str, Any]]] = {}
    lead = "" if args.prompt_style == "paper" else " "
    for split in ("train", "dev"):
        rows[split] = [
            {"id": q.id, "group": q.id, "prompt": prompt(q, args.prompt_style), "completion": lead + q.relation}
            for q in parts[split]
        ]
    for split, source in (("dev_eval", "dev"), ("test", "test")):
        rows[split] = [
            {
                "id": q.id,
                "group": q.id,
                "prompt": prompt(q, args.prompt_style),
                "answers": [q.relation],
                "stop": ".",
            }
            for q in parts[source]
        ]
    return assemble(rows, args)


def prompt(q: KinshipQuestion, style: str) -> str:
    if style == "paper":  # the authors cut the query at its comma and kept the space behind it
        return TEMPLATE.format(story=q.story, first=q.first, second=" " + q.second, end=" 's\n")
    return TEMPLATE.format(story=q.story, first=q.first, second=q.second, end="'s")


def read(rows: Sequence[Row]) -> list[KinshipQuestion]:
    """Checked questions. Content is story and query; the same one may stand in a file several times (41 do)."""
    checker = RowChecker(rows, COLUMNS, "clutrr")
    questions = []
    for row in rows:
        identity = checker.identifier(row)
        story, relation = checker.text(row, "clean_story").strip(), checker.text(row, "target_text").strip()
        names = _names(row, checker)
        if story and relation and names:
            content = " ".join(story.casefold().split()) + f" | {names[0]} | {names[1]}"
            story = story.replace("[", "").replace("]", "")
            questions.append(KinshipQuestion(identity, row.split, content, content, story, *names, relation))
    checker.finish()
    return questions


def _names(row: Row, checker: RowChecker) -> tuple[str, str] | None:
    value = checker.value(row, "query")
    try:
        names = ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        names = None
    if isinstance(names, (tuple, list)) and len(names) == 2 and all(isinstance(n, str) and n.strip() for n in names):
        return names[0].strip(), names[1].strip()
    checker.problem(row, "query", show(value), """two names, as in "('Ann', 'Bob')" """.strip())
    return None


def without_repeats(questions: Sequence[KinshipQuestion]) -> list[KinshipQuestion]:
    """Drop train questions that are also in val or test, and val questions that are in test; the published files have
    such (10 of train are in val, 4 in test)."""
    held = {split: {q.content for q in questions if q.split == split} for split in ("dev", "test")}
    taboo = {"train": held["dev"] | held["test"], "dev": held["test"]}
    kept = [q for q in questions if q.content not in taboo.get(q.split, ())]
    if dropped := len(questions) - len(kept):
        logger.warning("clutrr: dropped %d training questions whose story and query are held out too", dropped)
    return kept
