"""The conversation of the paradigm, and where sentences and scores stand among its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..prompts import prompt_text
from ..self_interpretability.answers import answer_tokens

SYSTEM = (
    "You are in a neurofeedback session. Whenever you say a sentence, your inner activity is measured along one fixed "
    "direction, and its score is shown behind the sentence, in braces."
)
ASK = "Please say a sentence."


class Turn(NamedTuple):
    """A request and the sentence that answers it (None: it is still to be written), with its score if it is shown."""

    sentence: str | None
    score: int | None = None
    request: str = ASK


class Dialogue(NamedTuple):
    """Tokens of a conversation.

    Attributes:
        ids: all of them.
        sentences: first token and end of every sentence.
        scores: the place of every score that is shown.
        before: the text in front of the first score.
    """

    ids: list[int]
    sentences: list[tuple[int, int]]
    scores: list[int]
    before: str


def as_messages(turns: Sequence[Turn], system: str | None) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages.append({"role": "user", "content": turn.request})
        if turn.sentence is not None:
            shown = "" if turn.score is None else f" [Score: {{{turn.score}}}]"
            messages.append({"role": "assistant", "content": turn.sentence + shown})
    return messages


def dialogue(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], template: Mapping[str, Any], system: str | None = None
) -> Dialogue:
    """The turns, each with its sentence, through the chat template, which gets `template` as its own arguments.

    Raises:
        ValueError: a tokenizer that cannot tell where tokens stand, a template that changes what is said, or a score
            that shares a token with something else.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell where tokens stand in a text; take a fast tokenizer"
        )
    messages = as_messages(turns, system)
    text = prompt_text(tokenizer, messages, template, generation_prompt=False)
    places, position = [], 0
    for message in messages:
        place = text.find(message["content"], position)
        if place < 0:
            raise ValueError(f"the chat template does not keep {message['role']}'s text {message['content'][:60]!r}")
        position = place + len(message["content"])
        if message["role"] == "assistant":
            places.append((place, position))
    made = tokenizer(text, return_offsets_mapping=True)
    offsets = made["offset_mapping"]
    sentences, scores, before = [], [], ""
    token = 0
    for turn, (start, stop) in zip(turns, places, strict=True):
        end = start + len(turn.sentence or "")
        while offsets[token][1] <= start:
            token += 1
        first = token
        while token < len(offsets) and offsets[token][0] < end:
            token += 1
        sentences.append((first, token))
        if turn.score is None:
            continue
        digit = stop - len(f"{turn.score}}}]")
        while offsets[token][1] <= digit:
            token += 1
        if tuple(offsets[token]) != (digit, digit + 1):
            raise ValueError(
                f"the score {turn.score} is not a token of its own in {text[digit - 8 : digit + 3]!r} under this "
                "tokenizer, so that its probability cannot be read off one place"
            )
        before = before or text[:digit]
        scores.append(token)
    return Dialogue(list(made["input_ids"]), sentences, scores, before)


def score_tokens(tokenizer: PreTrainedTokenizerBase, before: str, levels: int) -> list[int]:
    """The tokens of the scores 0, 1, ... behind the text. ValueError unless each is a single one."""
    return answer_tokens(tokenizer, before, [str(level) for level in range(levels)])
