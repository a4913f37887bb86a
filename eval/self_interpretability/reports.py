"""What a model reports: exactly, the probability of every number in a reply whose form is given (spec 4.5), and as the
paper does it, by writing replies and reading them (spec 1.7)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ...endpoint import Endpoint
from ..choices import CausalLM, choice_logprobs
from ..generation import generate
from ..prompts import Prompt, prompt_text

Array = NDArray[np.float64]
NEW_TOKENS = 200


class Question(Protocol):
    """A question about weights: of `context` those at `places` of its attributes, each answered by a number.

    The reply to `prompt` is `openings[0] number closings[0]`, without the closing `openings[1] number closings[1]`
    behind it, and so on. Numbers are `values`, written as `numbers`.
    """

    context: str
    places: Sequence[int]
    prompt: Prompt
    openings: Sequence[str]
    closings: Sequence[str]
    values: Sequence[int]
    numbers: Sequence[str]

    @property
    def read(self) -> Callable[[str], list[float] | None]:
        """The weights that a reply written freely says; None if it is no valid one."""


@dataclass(frozen=True)
class Report:
    """What one question found about each of its places.

    Attributes:
        probabilities: `[places, values]`, normalised over the values.
        mass: `[places]`, the probability of all values together: how much of the model's answer they are.
    """

    places: tuple[int, ...]
    values: Array
    probabilities: Array
    mass: Array

    @property
    def expected(self) -> Array:
        """`[places]`: the mean reported weight."""
        return self.probabilities @ self.values

    @property
    def mode(self) -> Array:
        return self.values[self.probabilities.argmax(1)]

    @property
    def entropy(self) -> Array:
        """In nats."""
        p = self.probabilities
        return -(p * np.log(np.where(p > 0, p, 1))).sum(1)

    @property
    def positive(self) -> Array:
        """Probability of a weight above 0, and half of that of 0."""
        return self.probabilities @ (np.sign(self.values) + 1) / 2


def measure_reports(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    template: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> list[Report]:
    """A report for each question. Later numbers of a reply are asked behind the most probable earlier ones.

    A number is scored with what closes it, so that "1" does not stand for "10" as well; the reply's form is given, so
    that no reply is invalid. All numbers share the key-value cache of what stands before them.
    """
    before = [prompt_text(tokenizer, question.prompt, template or {}) for question in questions]
    logs: list[list[list[float]]] = [[] for _ in questions]
    for step in range(max((len(question.places) for question in questions), default=0)):
        asked = [number for number, question in enumerate(questions) if step < len(question.places)]
        for number in asked:
            before[number] += questions[number].openings[step]
        choices = [[text + questions[number].closings[step] for text in questions[number].numbers] for number in asked]
        texts = [before[number] for number in asked]
        scored = choice_logprobs(model, tokenizer, texts, choices, max_rows=batch_size, progress=progress)
        for number, found in zip(asked, scored, strict=True):
            logs[number].append(found)
            before[number] += questions[number].numbers[int(np.argmax(found))]
    return [_report(question, np.array(found)) for question, found in zip(questions, logs, strict=True)]


def mean_reports(questions: Sequence[Question], reports: Sequence[Report]) -> dict[str, Array]:
    """Context -> its reported weights in the attributes' order, means over all questions about each."""
    found: dict[str, dict[int, list[float]]] = {}
    for question, report in zip(questions, reports, strict=True):
        for place, value in zip(report.places, report.expected, strict=True):
            found.setdefault(question.context, {}).setdefault(place, []).append(float(value))
    return {
        context: np.array([np.mean(places[place]) for place in sorted(places)]) for context, places in found.items()
    }


def written_reports(
    model: CausalLM | Endpoint,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    template: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    new_tokens: int = NEW_TOKENS,
    progress: bool = False,
) -> list[tuple[str, list[float] | None]]:
    """Greedy replies of at most `new_tokens`, and what each question reads in its one: None where that is no valid
    report. The tokenizer's chat template makes the prompts, of a served model too."""
    texts = [prompt_text(tokenizer, question.prompt, template or {}) for question in questions]
    replies = generate(model, tokenizer, texts, max_new_tokens=new_tokens, batch_size=batch_size, progress=progress)
    return [(reply, question.read(reply)) for reply, question in zip(replies, questions, strict=True)]


def _report(question: Question, logs: Array) -> Report:
    total = np.logaddexp.reduce(logs, axis=1)
    probabilities = np.exp(logs - total[:, None])
    return Report(tuple(question.places), np.array(question.values, dtype=np.float64), probabilities, np.exp(total))
