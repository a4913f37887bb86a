"""What the families of tasks have in common: their tokens, and how a row is put together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from .arrays import PAD, Array, Arrays, Part, Rows, concatenate

EOS, SEP, BLANK, PLUS = 1, 2, 3, 4
SPECIAL = ("<pad>", "<eos>", "=>", "_", "+")
assert SPECIAL[PAD] == "<pad>"


class Family(ABC):
    """A main task, hints for it, and the tokens that they share.

    A row is `question MARK answer`: for the main task the mark is SEP and EOS ends the answer; a hint has a mark of
    its own, or in the shared style SEP too. All hints have tokens in every vocabulary, so that the arms of an
    experiment have equal models.

    Attributes:
        main: name of the main task.
        hints: names of the hints.
        symbols: names of the tokens behind the special ones and the hints' marks.
    """

    main: ClassVar[str]
    hints: ClassVar[tuple[str, ...]]

    def __init__(self, symbols: Sequence[str]) -> None:
        self.symbols = list(symbols)
        self.first = len(SPECIAL) + len(self.hints)  # token of the first symbol

    @property
    def vocabulary(self) -> list[str]:
        """Names of all tokens, by number."""
        return [*SPECIAL, *(f"<{hint}>" for hint in self.hints), *self.symbols]

    @abstractmethod
    def draw(self, arrays: Arrays, task: str, lengths: Array, longest: int) -> Any:
        """Problems of these lengths [rows], none over `longest`."""

    @abstractmethod
    def question(self, arrays: Arrays, problem: Any) -> list[Part]: ...

    @abstractmethod
    def answer(self, arrays: Arrays, task: str, problem: Any, queries: int) -> list[Part]: ...

    @abstractmethod
    def text(self, task: str, ids: Sequence[int], targets: Sequence[bool]) -> tuple[str, str]:
        """Prompt and completion, as a pretrained model reads them."""

    def check(self, tasks: Sequence[str], longest: int) -> None:
        """ValueError for an unknown task, or if there are too few tokens for problems of this length."""
        for task in tasks:
            if task not in (self.main, *self.hints):
                raise ValueError(f"unknown task {task!r}; known: {', '.join((self.main, *self.hints))}")

    def answers(self, arrays: Arrays, task: str, problem: Any, queries: int) -> list[Part]:
        """The answer's parts, with the EOS of the main task."""
        parts = self.answer(arrays, task, problem, queries)
        if task == self.main:
            parts.append(constant(arrays, EOS, len(parts[0].tokens), target=True))
        return parts


def make_rows(
    family: Family,
    arrays: Arrays,
    task: str,
    lengths: Array,
    longest: int,
    *,
    shared: bool = False,
    queries: int = 1,
) -> Rows:
    """Fresh rows of a task, one for each of `lengths` (int64 [rows], at most `longest`).

    Args:
        shared: a hint's mark is SEP, as the main task's.
        queries: how many questions about one list a hint row has, where each has a single item and answer.
    """
    problem = family.draw(arrays, task, lengths, longest)
    mark = SEP if shared or task == family.main else len(SPECIAL) + family.hints.index(task)
    answer = [constant(arrays, mark, len(lengths)), *family.answers(arrays, task, problem, queries)]
    return concatenate(arrays, family.question(arrays, problem), answer, lengths)


def constant(arrays: Arrays, token: int, rows: int, target: bool = False) -> Part:
    """The same single token in every row."""
    return Part(arrays.full((rows, 1), token), arrays.full((rows, 1), 1), target)


def told(names: Sequence[str], tokens: Sequence[int], alone: str, between: str) -> str:
    """An answer as text, without PAD, and without EOS but where it is the whole answer: that is called `alone`."""
    words = [names[token] for token in tokens if token not in (PAD, EOS)]
    return f" {between.join(words) if words else alone}"


def one(arrays: Arrays, tokens: Array, target: bool) -> Part:
    """A single token [rows, 1] of every row."""
    return Part(tokens, arrays.full(tuple(tokens.shape), 1), target)


def asked(
    arrays: Arrays, items: Array, count: Array, queries: int, answer: Callable[[Array], list[Part]]
) -> list[Part]:
    """`queries` times an item of the row drawn at random [rows, 1], and the answer to it."""
    parts: list[Part] = []
    for _ in range(queries):
        item = arrays.take(items, arrays.integers(0, 1 << 40, tuple(count.shape)) % count)
        parts += [one(arrays, item, False), *answer(item)]
    return parts


def conflicts(family: Family, arrays: Arrays, task: str, longest: int, shared: bool, queries: int) -> list[str]:
    """Whether a hint contradicts the main task: the same visible tokens, and another next one.

    In the shared style a hint row may start just as the main row of the same question does. Of 2,000 rows with
    questions of up to `longest` items the first three contradictions are described.
    """
    if not shared or task == family.main:
        return []
    lengths = arrays.integers(1, longest + 1, (2000,))
    problem = family.draw(arrays, task, lengths, longest)
    question, mark = family.question(arrays, problem), constant(arrays, SEP, len(lengths))
    hint, main = (
        concatenate(arrays, question, [mark, *family.answers(arrays, name, problem, queries)], lengths)
        for name in (task, family.main)
    )
    width = min(hint.ids.shape[1], main.ids.shape[1])
    names, found = family.vocabulary, []
    for row in range(len(lengths)):
        ours, theirs = hint.ids[row, :width].tolist(), main.ids[row, :width].tolist()
        same = next((place for place in range(width) if ours[place] != theirs[place]), width)
        if same < width and bool(hint.targets[row, same]) and bool(main.targets[row, same]):
            seen = " ".join(names[token] for token in ours[:same])
            found.append(f"after {seen} the hint wants {names[ours[same]]}, {family.main} wants {names[theirs[same]]}")
    return found[:3]
