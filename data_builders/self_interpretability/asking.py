"""What is asked of a model to measure it: choices in both orders, and questions about weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

from .contexts import Context
from .texts import Message, decision_prompt, parse_report, report_prompt
from .trials import LARGEST, Trial, difference, draw_trial
from .world import BINS, World, decision_text, draw_difference, number_text, parse_number, report_text

Prompt = str | list[Message]


@dataclass(frozen=True)
class Choice:
    """A choice between two options: A's values less B's in units of the attributes' ranges, and the prompt, as it is
    and with A and B having changed places."""

    context: str
    difference: tuple[float, ...]
    prompt: Prompt
    swapped: Prompt


@dataclass(frozen=True)
class Question:
    """A question about the weights of a context's attributes at `places`. The reply is `openings[0] number
    closings[0]`, without that closing `openings[1] number closings[1]` behind it, and so on; numbers are `values`,
    written as `numbers`. `read`: the weights that a reply written freely says, None if it is no valid one."""

    context: str
    places: tuple[int, ...]
    prompt: Prompt
    openings: tuple[str, ...]
    closings: tuple[str, ...]
    values: tuple[int, ...]
    numbers: tuple[str, ...]
    read: Callable[[str], list[float] | None]


def choices(contexts: Sequence[Context], each: int, rng: Random) -> list[Choice]:
    """`each` fresh trials of every context, in the words of `texts`."""
    found = []
    for context in contexts:
        for _ in range(each):
            trial = draw_trial(rng, context)
            found.append(
                Choice(context.name, difference(context, trial), decision_prompt(context, trial),
                       decision_prompt(context, trial.swapped()))
            )  # fmt: skip
    return found


def questions(contexts: Sequence[Context], each: int, rng: Random) -> list[Question]:
    """`each` requests for a whole report of every context, every other one with A and B having changed places; scored
    on every whole number from -100 to 100, as JSON writes it."""
    values = tuple(range(-LARGEST, LARGEST + 1))
    # The space is the number's: " -" is one token for some, and must not be scored where that of " 7" is given.
    numbers = tuple(f" {value}" for value in values)
    found = []
    for context in contexts:
        names = [attribute.name for attribute in context.attributes]
        keys = [json.dumps(name, ensure_ascii=False) for name in names]  # as `report_text` writes them
        openings = tuple(f"{', ' if place else '{'}{key}:" for place, key in enumerate(keys))
        closings = tuple("}" if name == names[-1] else "," for name in names)
        trial: Trial | None = None
        for number in range(each):
            trial = draw_trial(rng, context) if number % 2 == 0 or trial is None else trial.swapped()
            found.append(
                Question(context.name, tuple(range(len(names))), report_prompt(context, trial), openings, closings,
                         values, numbers, partial(parse_report, context))
            )  # fmt: skip
    return found


def world_choices(world: World, agents: Sequence[Context], each: int, rng: Random) -> list[Choice]:
    """`choices` of the embedded world's agents."""
    found = []
    for agent in agents:
        for _ in range(each):
            trial = draw_difference(rng, agent)
            texts = (decision_text(world, agent, one) for one in (trial, trial.swapped()))
            found.append(Choice(agent.name, difference(agent, trial), *texts))
    return found


def world_questions(agents: Sequence[Context]) -> list[Question]:
    """`questions` of the embedded world: one for each attribute of every agent, of 21 numbers."""
    numbers = tuple(map(number_text, BINS))
    return [
        Question(agent.name, (place,), report_text(agent, place), ("",), ("",), BINS, numbers, parse_number)
        for agent in agents
        for place in range(len(agent.attributes))
    ]
