"""A served model as an agent: greedy replies over /v1/chat/completions, many at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...data_builders.ping.calls import Form
from ...data_builders.ping.desk import TOOLS
from ...endpoint import side_by_side
from .agent import NEW_TOKENS
from .episodes import Message, Reply


class ServedAgent:
    """An agent at the desk, whose next message a server writes.

    Calls may come as the server's own `tool_calls`, or in the text, in the model's form: both are carried out alike.

    Args:
        message: gives the next message of a conversation: `Endpoint.message`, or `generate` of a `ServerGuard`, which
            puts a prefix in front.
        form: how the model writes calls into its text, where the server leaves them there.
        tools: schemas that the server shows the model; None: none.
        at_once: how many conversations are with the server at a time.
        asked: further fields of the interface (`tool_choice`, `chat_template_kwargs`).
    """

    def __init__(
        self,
        message: Callable[..., Mapping[str, Any]],
        form: Form,
        *,
        tools: Sequence[Mapping[str, Any]] | None = TOOLS,
        max_new_tokens: int = NEW_TOKENS,
        at_once: int = 32,
        asked: Mapping[str, Any] | None = None,
    ) -> None:
        self.message, self.form, self.at_once = message, form, at_once
        self.asked: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": 0, **(asked or {})}
        if tools:
            self.asked["tools"] = list(tools)

    def replies(self, conversations: Sequence[Sequence[Message]]) -> list[Reply]:
        return side_by_side(self._reply, conversations, self.at_once)

    def _reply(self, messages: Sequence[Message]) -> Reply:
        said = self.message(messages=[dict(one) for one in messages], **self.asked)
        text = str(said.get("continuation", said["content"]))  # a guard's prefix is not the model's own
        return Reply(text, str(said["content"]), tuple(said.get("tool_calls") or ()))
