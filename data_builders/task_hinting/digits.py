"""Arithmetic on digits: increment by one (spec 1.10), and addition of two numbers (spec 1.12), with their hints.

Inside, digits lie with the ones first; rows show numbers as one writes them, or `reverse`d.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .arrays import Array, Arrays, Part
from .family import EOS, PLUS, SEP, Family, asked, constant, one, told


class Numbers(NamedTuple):
    """Digits 0 .. 9 [rows, longest], the ones first, 0 behind the end; of each number how many [rows, 1]."""

    digits: Array
    other: Array | None  # the second operand's
    count: Array


class Digits(Family):
    """A number is `count` digits, the first not 0 (except that 0 is a number).

    Args:
        reverse: answers start with the ones.
    """

    def __init__(self, reverse: bool = False) -> None:
        super().__init__([str(digit) for digit in range(10)])
        self.reverse = reverse

    def _draw(self, arrays: Arrays, lengths: Array, longest: int) -> Array:
        place, count = arrays.arange(longest)[None, :], lengths[:, None]
        digits = arrays.integers(0, 10, (len(lengths), longest))
        leading = arrays.integers(1, 10, (len(lengths), longest))
        digits = arrays.where((place == count - 1) & (place > 0), leading, digits)
        return arrays.where(place < count, digits, 0)

    def _shown(self, arrays: Arrays, digits: Array, count: Array, target: bool) -> Part:
        """Digits as tokens, in the order of the row; what is a question always as one writes it."""
        if not (target and self.reverse):
            place = count - 1 - arrays.arange(digits.shape[1])[None, :]
            digits = arrays.take(digits, arrays.where(place < 0, 0, place))
        return Part(digits + self.first, count, target)

    def _with_end(self, arrays: Arrays, digits: Array, count: Array, task: str) -> list[Part]:
        answer = [self._shown(arrays, digits, count, True)]
        return answer if task == self.main else [*answer, constant(arrays, EOS, len(count), True)]

    def text(self, task: str, ids: Sequence[int], targets: Sequence[bool]) -> tuple[str, str]:
        names = [name if name != f"<{task}>" else "=>" for name in self.vocabulary]
        start, mark = list(targets).index(True), next(i for i, token in enumerate(ids) if names[token] == "=>")
        question = "".join(names[token] for token in ids[:mark]).replace("+", " + ")
        item = "".join(f" {names[token]}" for token in ids[mark + 1 : start])
        heading = (self.main if ids[mark] == SEP else task).replace("_", " ").capitalize()
        return f"{heading}: {question} =>{item}", told(names, ids[start:], "none", "")


class Increment(Digits):
    """A number plus one.

    Args:
        nines: share of rows that end in a run of nines of a length drawn uniformly up to all digits. (Of independent
            digits a carry over j of them has probability 10^-j, and long ones are never seen.)
    """

    main = "increment"
    hints = ("carry", "nines", "digit", "copy")

    def __init__(self, reverse: bool = False, nines: float = 0.5) -> None:
        super().__init__(reverse)
        if not 0 <= nines <= 1:
            raise ValueError(f"the share of rows that end in nines is {nines}; it must lie between 0 and 1")
        self.nines = nines

    def draw(self, arrays: Arrays, task: str, lengths: Array, longest: int) -> Numbers:
        digits, count = self._draw(arrays, lengths, longest), lengths[:, None]
        run = arrays.integers(0, 1 << 40, tuple(count.shape)) % (count + 1)
        run = arrays.where(arrays.uniform(tuple(count.shape)) < self.nines, run, 0)
        return Numbers(arrays.where(arrays.arange(longest)[None, :] < run, 9, digits), None, count)

    def question(self, arrays: Arrays, problem: Numbers) -> list[Part]:
        return [self._shown(arrays, problem.digits, problem.count, False)]

    def answer(self, arrays: Arrays, task: str, problem: Numbers, queries: int) -> list[Part]:
        digits, _, count = problem
        place = arrays.arange(digits.shape[1])[None, :]
        ending = (arrays.cumsum((digits != 9) * 1) == 0) & (place < count)  # the nines at the end
        run = ending.sum(1)[:, None]
        if task == "increment":
            longer = arrays.join([digits, arrays.full((len(count), 1), 0)])
            place = arrays.arange(longer.shape[1])[None, :]
            plus = arrays.where(place < run, 0, longer + (place == run) * 1)
            return self._with_end(arrays, plus, count + (run == count) * 1, task)
        if task == "carry":  # 1 for each digit that changes
            return self._with_end(arrays, (place <= run) * 1, count, task)
        if task == "nines":
            return [
                Part(arrays.full(tuple(digits.shape), self.first + 9), run, True),
                constant(arrays, EOS, len(count), True),
            ]
        if task == "copy":
            return self._with_end(arrays, digits, count, task)

        def successor(item: Array) -> list[Part]:
            return [one(arrays, self.first + (item - self.first + 1) % 10, True)]

        return asked(arrays, digits + self.first, count, queries, successor)


class Addition(Digits):
    """The sum of two numbers of equally many digits."""

    main = "addition"
    hints = ("no_carry", "carry", "copy")

    def draw(self, arrays: Arrays, task: str, lengths: Array, longest: int) -> Numbers:
        return Numbers(self._draw(arrays, lengths, longest), self._draw(arrays, lengths, longest), lengths[:, None])

    def question(self, arrays: Arrays, problem: Numbers) -> list[Part]:
        assert problem.other is not None
        return [
            self._shown(arrays, problem.digits, problem.count, False),
            constant(arrays, PLUS, len(problem.count)),
            self._shown(arrays, problem.other, problem.count, False),
        ]

    def answer(self, arrays: Arrays, task: str, problem: Numbers, queries: int) -> list[Part]:
        digits, other, count = problem
        if task == "copy":
            return self._with_end(arrays, digits, count, task)
        plain = digits + other
        if task == "no_carry":
            return self._with_end(arrays, plain % 10, count, task)
        carries = [arrays.full((len(count), 1), 0)]  # into each digit, and out of the last
        for place in range(digits.shape[1]):
            carries.append((plain[:, place : place + 1] + carries[-1] >= 10) * 1)
        if task == "carry":  # 1 for each digit that a carry goes out of
            return self._with_end(arrays, arrays.join(carries[1:]), count, task)
        carry = arrays.join(carries)
        longer = arrays.join([plain, arrays.full((len(count), 1), 0)])
        overflow = arrays.take(carry, count)
        return self._with_end(arrays, (longer + carry) % 10, count + overflow, task)
