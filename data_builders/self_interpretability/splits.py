"""Which contexts are for what, decided before any text is made, and checks that nothing leaks (spec 4.1, 4.7)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .contexts import Context

ROLES = ("report_train", "report_dev", "report_test", "native", "never")


@dataclass(frozen=True)
class Split:
    """Contexts of each role. Instilled by decisions are `report_train`, `report_dev` and `report_test`; `native` and
    `never` ones are in no training row, and `never` has no preferences to report at all."""

    report_train: tuple[Context, ...]
    report_dev: tuple[Context, ...]
    report_test: tuple[Context, ...]
    native: tuple[Context, ...]
    never: tuple[Context, ...]

    @property
    def instilled(self) -> tuple[Context, ...]:
        return self.report_train + self.report_dev + self.report_test

    def roles(self) -> dict[str, str]:
        """Context's name -> its role."""
        return {context.name: role for role in ROLES for context in getattr(self, role)}


def unlike(contexts: Sequence[Context]) -> list[Context]:
    """The contexts without those that share a person (the question's sentences but the last), a question or all names
    of attributes with an earlier one: reports on one of them could be learned from the other."""
    seen: set[Any] = set()
    kept = []
    for one in contexts:
        person, _, asked = one.question.rpartition(". ")
        marks = {("attributes", tuple(sorted(attribute.name for attribute in one.attributes))),
                 ("person", person) if person else ("question", asked)}  # fmt: skip
        if not marks & seen:
            kept.append(one)
        seen |= marks
    return kept


def split_contexts(
    contexts: Sequence[Context], seed: int, fold: int, instilled: int, native: int, never: int
) -> Split:
    """Contexts in an order that a hash of seed and name gives: `instilled` of them, then `native`, then `never`.

    The instilled ones are two halves. Fold 0 reports on the first (four fifths to train, one to choose by) and is
    tested on the second, fold 1 the other way round.

    Raises ValueError for too few contexts, and for fewer than 4 instilled ones.
    """
    wanted = instilled + native + never
    if len(contexts) < wanted or instilled < 4:
        raise ValueError(
            f"{instilled} instilled, {native} native and {never} never set contexts are {wanted}, at least 4 of them "
            f"instilled; there are {len(contexts)}"
        )
    if fold not in (0, 1):
        raise ValueError(f"fold {fold}: there are two, 0 and 1")
    order = sorted(contexts, key=lambda context: hashlib.sha256(f"{seed} {context.name}".encode()).digest())
    half = instilled // 2
    halves = [tuple(order[:half]), tuple(order[half:instilled])]
    train, test = halves[fold], halves[1 - fold]
    dev = max(1, len(train) // 5)
    rest = order[instilled:wanted]
    return Split(train[:-dev], train[-dev:], test, tuple(rest[:native]), tuple(rest[native:]))


def check_leaks(rows: Mapping[str, Iterable[Mapping[str, Any]]], split: Split) -> None:
    """ValueError where training rows tell what they must not.

    `rows`: training split -> its rows, with `context`, `task` ("decision" or "report") and messages. No report of a
    context that is tested on, native or never set, and no row at all of the last two: neither by its name nor by the
    line of its question in the text. No weights in decisions: a completion is A or B alone, and no number stands
    beside an attribute's name but in the options. (No two contexts share a person, question or all attributes:
    `unlike`.)
    """
    roles = split.roles()
    kept = {role: [context for context in getattr(split, role)] for role in ("report_test", "native", "never")}
    names = {one.name: [attribute.name for attribute in one.attributes] for one in split.instilled}
    for name, part in rows.items():
        for number, row in enumerate(part, 1):
            where, role = f"{name} row {number}", roles.get(row["context"])
            secret = ("native", "never") if row["task"] == "decision" else ("report_test", "native", "never")
            if role in secret or role is None:
                raise ValueError(f"{where}: a {row['task']} of the context {row['context']!r}, which is {role}")
            if row["task"] == "decision" and row["completion"][-1]["content"] not in ("A", "B"):
                raise ValueError(f"{where}: a decision says {row['completion'][-1]['content']!r}, not A or B")
            text = row["prompt"][-1]["content"]
            if row["task"] == "decision" and (found := _beside_number(text, names.get(row["context"], []))):
                raise ValueError(f"{where}: a number stands beside {found!r} outside of the options: {text[:80]!r}")
            for other in secret:
                for context in kept[other]:
                    if f"\n{context.question}\n" in f"\n{text}\n":
                        raise ValueError(f"{where} holds the question of {context.name!r}, which is {other}")


def _beside_number(text: str, names: Sequence[str]) -> str | None:
    """The first of these names that has a whole number near it in front of the options."""
    before = text.split("\nA:\n")[0]
    for name in names:
        if re.search(rf"{re.escape(name)}\W{{0,12}}(?:at |is |of |by )?-?\d|-?\d+\W{{0,12}}{re.escape(name)}", before):
            return name
    return None
