"""Agents with other defences than a prefix: examples, a guard in front, an aligned model's first words (spec 6.6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .agent import ModelAgent, Opening
from .episodes import Agent, Message, Reply

REFUSAL = "I cannot help with that ."


@dataclass(frozen=True)
class Examples:
    """Conversations that stand before the user's, as an `Opening` of a `ModelAgent`."""

    turns: Sequence[Message]
    store: bool = False

    def opening(self, messages: Sequence[Message]) -> str:
        return ""

    def applied(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        system = [dict(one) for one in messages if one["role"] == "system"]
        return [*system, *map(dict, self.turns), *(dict(one) for one in messages if one["role"] != "system")]


@dataclass(frozen=True)
class Attacked:
    """A conversation that somebody has prepared so that a guard fails, as an `Opening` around the guard's own, which
    sees what was prepared.

    Attributes:
        before: turns in front of the request, such as harmful requests that were carried out.
        told: what the request ends with.
        forged: turns behind it, which the agent never said.
    """

    guard: Opening
    before: Sequence[Message] = ()
    told: str = ""
    forged: Sequence[Message] = ()

    @property
    def store(self) -> bool:
        return self.guard.store

    def opening(self, messages: Sequence[Message]) -> str:
        return self.guard.opening(self._prepared(messages))

    def applied(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        return self.guard.applied(self._prepared(messages))

    def _prepared(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        place = next(number for number, one in enumerate(messages) if one["role"] == "user")
        request = dict(messages[place])
        request["content"] = " ".join(filter(None, (request["content"], self.told)))
        return [*map(dict, (*messages[:place], *self.before)), request,
                *map(dict, (*self.forged, *messages[place + 1 :]))]  # fmt: skip


class Guarded:
    """An agent whose first turn is a refusal where `flags` says so of the request; the rest goes to the agent."""

    def __init__(self, agent: Agent, flags: Callable[[Sequence[str]], Sequence[bool]]) -> None:
        self.agent, self.flags, self.form = agent, flags, agent.form

    def replies(self, conversations: Sequence[Sequence[Message]]) -> list[Reply]:
        requests = [next(str(turn["content"]) for turn in one if turn["role"] == "user") for one in conversations]
        first = [not any(turn["role"] == "assistant" for turn in one) for one in conversations]
        flagged = [found and new for found, new in zip(self.flags(requests), first, strict=True)]
        left = [one for one, stop in zip(conversations, flagged, strict=True) if not stop]
        written = iter(self.agent.replies(left) if left else [])
        return [Reply(REFUSAL, REFUSAL) if stop else next(written) for stop in flagged]


class Begun:
    """An agent whose first reply begins with the first `words` tokens that another model writes there."""

    def __init__(self, agent: ModelAgent, other: ModelAgent, words: int = 5) -> None:
        self.agent, self.other, self.words, self.form = agent, other, words, agent.form

    def replies(self, conversations: Sequence[Sequence[Message]]) -> list[Reply]:
        new = [one for one in conversations if not any(turn["role"] == "assistant" for turn in one)]
        begun = self._begin(new)
        made = self.agent.behind(_Each(begun)).replies(conversations)
        starts = [begun.get(repr(list(one)), "") for one in conversations]
        return [Reply(start + reply.text, start + reply.text) for start, reply in zip(starts, made, strict=True)]

    def _begin(self, conversations: Sequence[Sequence[Message]]) -> dict[str, str]:
        tokenizer, found = self.other.tokenizer, {}
        for one, reply in zip(conversations, self.other.replies(conversations) if conversations else [], strict=True):
            ids = tokenizer(reply.text, add_special_tokens=False)["input_ids"][: self.words]
            found[repr(list(one))] = str(tokenizer.decode(ids)) + (" " if self.agent.form == "words" else "")
        return found


@dataclass(frozen=True)
class _Each:
    texts: Mapping[str, str]
    store: bool = False

    def opening(self, messages: Sequence[Message]) -> str:
        return self.texts.get(repr(list(messages)), "")

    def applied(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        return [dict(one) for one in messages]
