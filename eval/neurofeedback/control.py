"""Control: whether a model moves its hidden states along an axis when told to, after examples of it (spec 3.5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ..choices import CausalLM
from ..generation import generate
from ..prompts import prompt_text
from ..statistics import Metric
from .axes import Axis, span_vector
from .dialogue import SYSTEM, Turn, as_messages, dialogue
from .outcomes import effect

Array = NDArray[np.float64]
NEW_TOKENS, TEMPERATURE = 50, 0.7


@dataclass(frozen=True)
class Steered:
    """Scores along the axes of one layer when the low and the high side of one of them was asked for.

    Attributes:
        target: its name, one of `names`.
        scores: `[repeats, assignments of labels to sides, sides (low, high), axes]`; NaN where a sentence was left
            empty.
    """

    target: str
    names: tuple[str, ...]
    scores: Array

    def effects(self) -> dict[str, Metric]:
        """Axis -> Cohen's d of high over low, every sentence of a repeat for itself; repeats with an empty one are
        left out."""
        kept = self.scores[self.whole()]
        return {
            name: effect(kept[:, :, 1, place].ravel(), kept[:, :, 0, place].ravel())
            for place, name in enumerate(self.names)
        }

    def whole(self) -> list[int]:
        """The repeats in which no sentence was left empty."""
        return [place for place, scores in enumerate(self.scores) if np.isfinite(scores).all()]

    def precision(self) -> float | None:
        """|d| on the target over its mean on all axes of the layer: above 1, control is more than a general shift.
        None where nothing moves."""
        sizes = {name: abs(one["value"]) for name, one in self.effects().items()}
        mean = float(np.mean(list(sizes.values())))
        return sizes[self.target] / mean if mean > 1e-9 else None


def request(label: int) -> str:
    return f"Please say a sentence, one that was not said before, with the score {{{label}}}."


def steer(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    axes: Sequence[Axis],
    target: str,
    sentences: Sequence[str],
    vectors: Array,
    *,
    examples: int,
    repeats: int,
    seed: int,
    write: bool = False,
    template: Mapping[str, Any] | None = None,
) -> Steered:
    """Ask for both sides of the axis `target`, after `examples` of its labels, `repeats` times.

    Each time other sentences are drawn, one of them to be said when asked (implicit control: only hidden states can
    differ); with `write` the model writes it, at a temperature of 0.7 (explicit). Both sides are asked for under both
    assignments of labels 0 and 1 to them, so that what a digit does by itself cancels.

    Args:
        axes: those of one layer.
        vectors: `[sentences, width]`, of that layer.

    Raises:
        ValueError: fewer sentences than examples and one more, or a conversation that is too long.
    """
    if len(sentences) <= examples:
        raise ValueError(f"{examples} examples and a sentence to say need more than {len(sentences)} sentences")
    axis = next(one for one in axes if one.name == target)
    sides = (axis.scores(vectors) >= axis.edges[len(axis.edges) // 2]).astype(int)
    rng = np.random.default_rng(seed)
    found = np.empty((repeats, 2, 2, len(axes)))  # repeat, assignment, side
    for repeat in range(repeats):
        *shown, said = rng.permutation(len(sentences))[: examples + 1]
        for turned in (0, 1):
            before = [Turn(sentences[place], int(sides[place]) ^ turned) for place in shown]
            for side in (0, 1):
                asked = Turn(None, request=request(side ^ turned))
                sentence: str | None = sentences[said]
                if write:
                    sentence = written(model, tokenizer, [*before, asked], template or {}, seed + repeat)
                if not sentence:
                    found[repeat, turned, side] = np.nan
                    continue
                made = dialogue(tokenizer, [*before, asked._replace(sentence=sentence)], template or {}, SYSTEM)
                vector = span_vector(model, made.ids, made.sentences[-1])[axis.layer]
                found[repeat, turned, side] = [one.scores(vector) for one in axes]
    return Steered(target, tuple(one.name for one in axes), found)


def written(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], template: Mapping[str, Any], seed: int
) -> str:
    """The sentence that the model writes next: the first line of at most 50 tokens, without a score of its own."""
    text = prompt_text(tokenizer, as_messages(turns, SYSTEM), template)
    reply = generate(model, tokenizer, [text], max_new_tokens=NEW_TOKENS, temperature=TEMPERATURE, seed=seed)[0]
    lines = reply.split("[Score")[0].strip().splitlines()
    return lines[0].strip() if lines else ""
