"""Weights of tasks that change over the steps (spec 2.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

KINDS = {"constant": 1, "linear": 4, "cosine": 4, "step": 3, "first": 1, "anneal": 1}  # numbers that each takes
FORMS = "constant:V, linear:T0:T1:V0:V1, cosine:T0:T1:V0:V1, step:T:V0:V1, first:T, anneal:T"


@dataclass(frozen=True)
class Schedule:
    """A weight as a function of the optimiser step, counted from 0.

    `constant` V; `linear` and `cosine` V0 until step T0, V1 from T1 on, and between them on a line or half a cosine;
    `step` V0 before step T and V1 from it on; `first` T: 0 for the main task's weight before step T (the hint comes
    first) and 1 from it on; `anneal` T: from 1 at the start to 0 at step T, and 0 from then on.
    """

    kind: str
    numbers: tuple[float, ...]

    @staticmethod
    def parse(text: str) -> Schedule:
        """From `0.5`, or `kind:number:...`. ValueError for anything else, or a weight below 0 or not finite."""
        kind, *rest = text.split(":")
        if not rest:
            kind, rest = "constant", [text]
        try:
            numbers = tuple(float(number) for number in rest)
        except ValueError:
            numbers = ()
        if kind not in KINDS or len(numbers) != KINDS[kind]:
            raise ValueError(f"{text!r} is no weight; give a number, or one of {FORMS}")
        weights = {"constant": numbers, "linear": numbers[2:], "cosine": numbers[2:], "step": numbers[1:]}.get(
            kind, ()
        )
        if not all(math.isfinite(number) for number in numbers) or any(weight < 0 for weight in weights):
            raise ValueError(f"{text!r}: weights must be finite and not negative")
        if kind in ("linear", "cosine") and not 0 <= numbers[0] < numbers[1]:
            raise ValueError(f"{text!r}: goes from step {numbers[0]:g} to step {numbers[1]:g}, which must be later")
        if kind in ("step", "first", "anneal") and numbers[0] < (1 if kind == "anneal" else 0):
            raise ValueError(f"{text!r}: step {numbers[0]:g} is before the first")
        return Schedule(kind, numbers)

    def __call__(self, step: int) -> float:
        if self.kind == "constant":
            return self.numbers[0]
        if self.kind == "first":
            return float(step >= self.numbers[0])
        if self.kind == "step":
            return self.numbers[1 + (step >= self.numbers[0])]
        begin, end, before, after = self.numbers if self.kind != "anneal" else (0.0, self.numbers[0], 1.0, 0.0)
        done = min(1.0, max(0.0, (step - begin) / (end - begin)))
        if self.kind == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return before + (after - before) * done


def parse_weights(texts: Sequence[str] | None, tasks: Sequence[str], steps: int) -> Mapping[str, Schedule]:
    """`task=weight` texts to a schedule for every task, 1 for those not named.

    Raises:
        ValueError: a task that is not there or is named twice, a bad weight, or no weight over 0 for the main task
            (the first of `tasks`) in any of the `steps` of a run (not known if below 1).
    """
    found = {task: Schedule("constant", (1.0,)) for task in tasks}
    seen = set()
    for text in texts or ():
        task, separator, weight = text.partition("=")
        if not separator or task not in found or task in seen:
            what = "is named twice" if task in seen else f"there are {', '.join(tasks)}"
            raise ValueError(f"--weights {text}: give task=weight; {what}")
        seen.add(task)
        try:
            found[task] = Schedule.parse(weight)
        except ValueError as error:
            raise ValueError(f"--weights {text}: {error}") from error
    main = found[tasks[0]]
    if not any(main(step) for step in range(steps)) and (steps > 0 or main.kind == "constant" and not main(0)):
        raise ValueError(f"--weights gives the main task {tasks[0]} nothing; it needs a weight over 0 at some step")
    return found
