"""Counting how often a letter occurs in a word, or a word in a list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .arrays import PAD, Array, Arrays, Part
from .family import EOS, Family, one

ITEMS = {
    "letters": tuple("abcdefghijklmnopqrstuvwxyz"),
    "words": tuple("apple bread chair drum eagle fork grape horse iron jar kite lamp moon nest olive pearl".split()),
}


class Counted(NamedTuple):
    """Tokens [rows, longest] (-1 behind the end), items of each row, and the token that is asked about, [rows, 1]."""

    items: Array
    count: Array
    item: Array


class Counting(Family):
    """The answer is the item as often as it occurs: a number as one token would have to be seen in training, up to the
    longest test. In text it is a number.

    Args:
        kind: "letters" or "words".
        different: how many of them there are to draw from (few: each occurs often).
    """

    main = "count"
    hints = ("member", "copy")

    def __init__(self, kind: str = "letters", different: int = 5) -> None:
        if kind not in ITEMS:
            raise ValueError(f"unknown kind of counting {kind!r}; known: {', '.join(ITEMS)}")
        if not 1 <= different <= len(ITEMS[kind]):
            raise ValueError(f"{different} different {kind}: there are 1 to {len(ITEMS[kind])}")
        super().__init__([*ITEMS[kind][:different], "yes", "no"])
        self.kind, self.different = kind, different

    def draw(self, arrays: Arrays, task: str, lengths: Array, longest: int) -> Counted:
        rows, count = len(lengths), lengths[:, None]
        items = arrays.integers(self.first, self.first + self.different, (rows, longest))
        items = arrays.where(arrays.arange(longest)[None, :] < count, items, -1)
        return Counted(items, count, arrays.integers(self.first, self.first + self.different, (rows, 1)))

    def question(self, arrays: Arrays, problem: Counted) -> list[Part]:
        return [Part(problem.items, problem.count, False)]

    def answer(self, arrays: Arrays, task: str, problem: Counted, queries: int) -> list[Part]:
        items, _, item = problem
        times = (items == item).sum(1)[:, None]
        yes = self.first + self.different
        answers = {
            "count": Part(arrays.where(items < -1, items, item), times, True),
            "member": one(arrays, arrays.where(times > 0, yes, yes + 1), True),
            "copy": one(arrays, item, True),
        }
        return [one(arrays, item, False), answers[task]]

    def text(self, task: str, ids: Sequence[int], targets: Sequence[bool]) -> tuple[str, str]:
        names, start = self.vocabulary, list(targets).index(True)
        items, item = ids[: start - 2], names[ids[start - 1]]
        told = [token for token in ids[start:] if token not in (PAD, EOS)]
        answer = str(len(told)) if task == self.main else names[told[0]]
        listed = ("" if self.kind == "letters" else " ").join(names[token] for token in items)
        heading = {"count": "Count", "member": "Is there", "copy": "Repeat"}[task]
        return f"{heading} {item} in: {listed} =>", f" {answer}"
