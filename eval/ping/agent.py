"""A local model as an agent: greedy replies behind prefixes, in batches that share the work on what stands before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from ...data_builders.ping.calls import Form
from ...data_builders.ping.desk import TOOLS
from ..choices import CausalLM, encode
from ..generation import generate
from ..prompts import check_beginning, prompt_text
from ..sharding import shared_out
from .episodes import Message, Reply
from .shared import continuations

NEW_TOKENS = 150  # of a turn, as the paper scores prefixes


class Opening(Protocol):
    """A prefix; `trainers.ping.Prefix` is one."""

    @property
    def store(self) -> bool: ...

    def opening(self, messages: Sequence[Message]) -> str: ...

    def applied(self, messages: Sequence[Message]) -> list[dict[str, Any]]: ...


def form_of(tokenizer: PreTrainedTokenizerBase) -> Form:
    """How models of this tokenizer's family write calls, by what their chat template holds. ValueError where it shows
    none of the known forms."""
    text = str(tokenizer.chat_template or "")
    marks: dict[Form, tuple[str, ...]] = {
        "hermes": ("<tool_call>",),
        "json": ("ipython", '"parameters"'),
        "glm": ("<|observation|>",),
        "words": ("'call '",),
    }
    for form, needed in marks.items():
        if all(mark in text for mark in needed):
            return form
    raise ValueError(f"the chat template shows no known form of calls; give one of {', '.join(marks)}")


class ModelAgent:
    """An agent at the desk. In a job of several processes each writes a part of the replies, and all get all.

    Args:
        form: how the model writes calls (`data_builders.ping.calls`).
        opening: its prefix, if any.
        tools: schemas for the chat template; None: the template of this model takes none (they are in its words).
        template: the chat template's own arguments.
        min_new_tokens: of a turn; 1 where an empty one makes no sense.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        form: Form,
        *,
        opening: Opening | None = None,
        tools: Sequence[Mapping[str, Any]] | None = TOOLS,
        template: Mapping[str, Any] | None = None,
        max_new_tokens: int = NEW_TOKENS,
        min_new_tokens: int = 0,
        batch_size: int = 64,
    ) -> None:
        if tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template, so that it is not known where a reply begins")
        self.model, self.tokenizer, self.form, self.opening = model, tokenizer, form, opening
        self.tools, self.template = tools, dict(template or {})
        self.tokens: dict[str, Any] = {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens}
        self.batch_size = batch_size
        tools_too = {"tools": list(tools)} if tools else {}
        check_beginning(tokenizer, [{"role": "user", "content": "x"}], {**tools_too, **self.template})

    def behind(self, opening: Opening | None) -> ModelAgent:
        """The same agent with another prefix."""
        other = copy(self)
        other.opening = opening
        return other

    def prompt(self, messages: Sequence[Message], opening: Opening | None) -> tuple[str, str]:
        """The text up to the header of the reply, and what is put into the reply's mouth."""
        shown = opening.applied(messages) if opening else [dict(message) for message in messages]
        tools = {"tools": list(self.tools)} if self.tools else {}
        text = prompt_text(self.tokenizer, shown, {**tools, **self.template})
        return text, opening.opening(messages) if opening else ""

    def check(self, requests: Sequence[str]) -> None:
        """ValueError where a request, with tools and a reply, is longer than the model's positions."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        texts = ["".join(self.prompt([{"role": "user", "content": one}], self.opening)) for one in requests]
        longest = max(map(len, encode(self.tokenizer, texts)), default=0) + self.tokens["max_new_tokens"]
        if limit is not None and longest > limit:
            raise ValueError(f"a task and its first reply have up to {longest} tokens, and the model takes {limit}")

    def replies(
        self, conversations: Sequence[Sequence[Message]], openings: Sequence[Opening | None] | None = None
    ) -> list[Reply]:
        """`openings`: of every conversation its own prefix, instead of the agent's."""
        used = [self.opening] * len(conversations) if openings is None else openings
        made = [self.prompt(messages, one) for messages, one in zip(conversations, used, strict=True)]
        texts = shared_out([head + mouth for head, mouth in made], self._generate)
        return [
            Reply(text, (mouth if one is not None and one.store else "") + text)
            for text, (_, mouth), one in zip(texts, made, used, strict=True)
        ]

    def first_replies(
        self, conversations: Sequence[Sequence[Message]], openings: Sequence[Opening]
    ) -> list[list[Reply]]:
        """`[openings][conversations]`: the first reply under each of many prefixes. The work on conversations is done
        once for all of those that begin a reply; others change the conversation itself."""
        made: list[list[Reply]] = []
        if not conversations:
            return [[] for _ in openings]
        begins = [one for one in openings if one.applied(conversations[0]) == list(map(dict, conversations[0]))]
        heads = [self.prompt(messages, None)[0] for messages in conversations]
        mouths = {id(one): one.opening(conversations[0]) for one in begins}
        texts = shared_out(heads, lambda some: self._continue(some, list(mouths.values())))
        shared = {one: [row[place] for row in texts] for place, one in enumerate(mouths)}
        for one in openings:
            if id(one) in shared:
                mouth = mouths[id(one)] if one.store else ""
                made.append([Reply(text, mouth + text) for text in shared[id(one)]])
            else:
                made.append(self.behind(one).replies(conversations))
        return made

    def _generate(self, prompts: Sequence[str]) -> list[str]:
        return generate(self.model, self.tokenizer, prompts, batch_size=self.batch_size, **self.tokens)

    def _continue(self, prompts: Sequence[str], mouths: Sequence[str]) -> list[tuple[str, ...]]:
        """`[prompts][mouths]`."""
        found = continuations(self.model, self.tokenizer, prompts, mouths, batch_size=self.batch_size, **self.tokens)
        return list(zip(*found, strict=True)) if mouths else [() for _ in prompts]
