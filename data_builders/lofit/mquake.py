"""MQuAKE (Zhong et al. 2023), single-edit items: answer a multi-hop question under one counterfactual (LoFiT, 4.1).

`paper` style: `Q: Imagine that {edit}. {question} A:` with the answer glued on. `clean` style: a space before the
answer, and an initial "The" of the edit in lower case ("Imagine that the capital of ..."). The end-of-sequence token
is the trainer's to add. Of the three paraphrases of a question the first is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..reading import show
from ..rows import Row, RowChecker
from .splits import Question, assemble, cut, load

if TYPE_CHECKING:
    from datasets import DatasetDict

    from . import LofitDataArguments

COLUMNS = {
    "id": ("case_id", "id"),
    "requested_rewrite": ("requested_rewrite",),
    "questions": ("questions",),
    "new_answer": ("new_answer",),
    "new_answer_alias": ("new_answer_alias",),
}


@dataclass(frozen=True)
class EditQuestion(Question):
    edit: str
    target: str
    question: str
    answers: tuple[str, ...]


def build(args: LofitDataArguments, loss: str) -> DatasetDict:
    """Splits train, dev, dev_eval, test, text. Raises RowError for bad rows, an item with several edits among them."""
    if loss != "sft" or args.pairs == "all":
        raise ValueError("mquake has no wrong answers to make pairs of: use --loss sft and drop --pairs")
    parts = cut(read(load(args)), args)
    rows: dict[str, list[dict[str, Any]]] = {}
    for split in ("train", "dev"):
        rows[split] = [
            {
                "id": q.id,
                "group": q.id,
                "prompt": prompt(q, args.prompt_style),
                "completion": q.answers[0] if args.prompt_style == "paper" else " " + q.answers[0],
            }
            for q in parts[split]
        ]
    for split, source in (("dev_eval", "dev"), ("test", "test")):
        rows[split] = [
            {
                "id": q.id,
                "group": q.id,
                "prompt": prompt(q, args.prompt_style),
                "answers": list(q.answers),
                "stop": "\n",
                "shortcut": q.target,  # a baseline: repeating the edit is right for more than a third of the items
            }
            for q in parts[source]
        ]
    return assemble(rows, args)


def prompt(q: EditQuestion, style: str) -> str:
    edit, question = q.edit, q.question
    if style == "clean":
        question = question.strip()  # some published questions end in a space
        if edit.startswith("The "):
            edit = "the " + edit.removeprefix("The ")
    return f"Q: Imagine that {edit}. {question} A:"


def read(rows: Sequence[Row]) -> list[EditQuestion]:
    """Checked questions; those on one (subject, relation) are one unit, so dev never asks about a trained edit."""
    checker = RowChecker(rows, COLUMNS, "mquake")
    questions = []
    for row in rows:
        identity = checker.identifier(row)
        asked = checker.texts(row, "questions")
        answer = checker.text(row, "new_answer")
        aliases = checker.texts(row, "new_answer_alias", may_be_empty=True)
        template, subject, target = _edit(row, checker)
        if not (asked and answer and template):
            continue
        edit = f"{template.replace('{}', subject)} {target}"
        content = f"{edit} | {asked[0]}".casefold()
        checker.unique(row, "questions", content, across_splits_only=True)
        questions.append(
            EditQuestion(
                identity, row.split, content, f"{template}|{subject}", edit, target, asked[0], (answer, *aliases)
            )
        )
    checker.finish()
    return questions


def _edit(row: Row, checker: RowChecker) -> tuple[str, str, str]:
    """Cloze template with one {}, subject, new object; three times "" and a problem where the edit is not that."""
    edits = checker.value(row, "requested_rewrite")
    if isinstance(edits, list) and len(edits) == 1 and isinstance(edits[0], dict):
        template, subject, target = (edits[0].get(key) for key in ("prompt", "subject", "target_new"))
        target = target.get("str") if isinstance(target, dict) else None
        if all(isinstance(part, str) and part.strip() for part in (template, subject, target)):
            if str(template).count("{}") == 1:
                return str(template), str(subject), str(target)
    found = f"{len(edits)} edits" if isinstance(edits, list) and len(edits) != 1 else show(edits)
    checker.problem(row, "requested_rewrite", found, "one edit: prompt with one {}, subject, target_new with str")
    return "", "", ""
