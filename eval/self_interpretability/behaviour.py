"""What a model chooses, exactly: the margin of A over B at the place of the answer, in both orders (spec 4.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..choices import CausalLM, encode
from ..next_token import next_token_logprobs
from ..prompts import Prompt, prompt_text
from .answers import answer_tokens, answers_of
from .weights import fit_weights, linearity

Array = NDArray[np.float64]


class Trial(Protocol):
    """A choice to be made: `context`, whose it is; `difference` of the options' values; `prompt`, and `swapped` with A
    and B having changed places."""

    context: str
    difference: Sequence[float]
    prompt: Prompt
    swapped: Prompt


@dataclass(frozen=True)
class Behaviour:
    """The choices of one context.

    Attributes:
        differences: `[trials, attributes]`, A's values less B's.
        margins: `[trials]`, log-odds of A over B in nats, half the difference between the two orders.
        bias: mean margin of what stands first, whatever it is.
        off_answer: mean probability of anything but A and B.
    """

    differences: Array
    margins: Array
    bias: float
    off_answer: float

    def weights(self, estimator: str = "paper") -> Array:
        """`[attributes]`; see `fit_weights` (which says what is refused)."""
        targets = {"paper": self.margins > 0, "fractional": 1 / (1 + np.exp(-self.margins)),
                   "least_squares": self.margins}  # fmt: skip
        return fit_weights(self.differences, targets[estimator], estimator)  # type: ignore[arg-type]

    @property
    def linearity(self) -> float:
        """R^2 of margins on differences; see `linearity`."""
        return linearity(self.differences, self.margins)

    def agreement(self, weights: Sequence[float]) -> float:
        """The share of trials that are decided as these weights would decide them."""
        return float(np.mean((self.margins > 0) == (self.differences @ np.asarray(weights, float) > 0)))


def measure_choices(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    trials: Sequence[Trial],
    *,
    template: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> dict[str, Behaviour]:
    """Context -> its behaviour; two prompts a trial, and what those of a context begin with once. Nothing is sampled.

    Raises:
        ValueError: no trials, or answers that are not single tokens.
    """
    if not trials:
        raise ValueError("no trials to measure; give at least one")
    of: dict[str, list[Trial]] = {}
    for trial in trials:
        of.setdefault(trial.context, []).append(trial)
    first = prompt_text(tokenizer, trials[0].prompt, template or {})
    answers = answer_tokens(tokenizer, first, answers_of(trials[0].prompt))
    found = {}
    for context, own in tqdm(of.items(), disable=not progress, desc="choices", unit="context"):
        texts = [prompt_text(tokenizer, prompt, template or {})
                 for trial in own for prompt in (trial.prompt, trial.swapped)]  # fmt: skip
        logs = next_token_logprobs(model, encode(tokenizer, texts), answers, batch_size=batch_size)
        logs = logs.reshape(len(own), 2, 2)  # trials, orders, answers
        margins = logs[..., 0] - logs[..., 1]
        found[context] = Behaviour(
            np.array([trial.difference for trial in own], dtype=np.float64),
            (margins[:, 0] - margins[:, 1]) / 2,
            float(margins.mean()),
            float((1 - np.exp(logs).sum(-1)).mean()),
        )
    return found
