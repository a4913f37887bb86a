"""A prefix in front of a served model's replies, with proof that the server really continued it (spec 2.6, 6.9).

Many servers and routers drop a prefix silently, or set a new header behind it (spec 8). What counts as proof: the
server echoes the prefix (vLLM, `echo`), or shows the prompt that it makes of the conversation (`/apply-template` of
llama.cpp, `/tokenize` and `/detokenize` of vLLM), and that ends with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...endpoint import Endpoint
from .prefix import Messages, Prefix

CONTINUED = {"add_generation_prompt": False, "continue_final_message": True}


class NotContinued(ValueError):
    """A server that does not show that it went on from the prefix."""


@dataclass
class ServerGuard:
    """A served model that begins its replies with a prefix.

        guard = ServerGuard(Endpoint("http://127.0.0.1:8000/v1", "my-agent"), Prefix.load("prefix.json"))
        reply = guard.generate(messages, tools=tools, max_tokens=256)

    Attributes:
        fallback: where the server cannot be shown to continue a prefix, use it as a suffix instead, with a warning.
            That is another, weaker method: every such reply says `position: "suffix"`.

    Raises:
        NotContinued: at the first reply, of a server that cannot be shown to continue.
        OSError: a server that fails after all retries.
    """

    endpoint: Endpoint
    prefix: Prefix
    fallback: bool = False
    _proof: str | None = None

    def generate(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None = None, **options: Any
    ) -> dict[str, Any]:
        """The next message of the assistant; `options` are fields of the chat interface. `content` belongs into the
        conversation, `continuation` is what the model itself wrote, `position` where the sentence stood; `tool_calls`
        and `finish_reason` are the server's, where it gives them."""
        asked = {**options, **({"tools": list(tools)} if tools else {})}
        opening = self.prefix.opening(messages)
        if not opening:
            said = self.endpoint.message(messages=self.prefix.applied(messages), **asked)
            return _turn(said, said["content"], said["content"], self.prefix.position)
        begun = [*map(dict, messages), {"role": "assistant", "content": opening}]
        if self._proof is None and self._shown(begun, opening):
            self._proof = "prompt"
        echo = {"echo": True} if self._proof != "prompt" else {}
        said = self.endpoint.message(messages=begun, **CONTINUED, **echo, **asked)
        reply = str(said["content"])
        if echo:
            if not reply.startswith(opening.rstrip()):
                return self._instead(messages, tools, options)
            self._proof, reply = "echo", reply[len(opening) if reply.startswith(opening) else len(opening.rstrip()) :]
        stored = opening if self.prefix.store else ""
        return _turn(said, stored + reply, reply, "prefix")

    def _shown(self, begun: Messages, opening: str) -> bool:
        """Whether the server shows a prompt that ends with the opening."""
        quiet = replace(self.endpoint, retries=0)
        asked = {"model": self.endpoint.model, "messages": list(begun), **CONTINUED}
        for render in (self._template, self._tokens):
            try:
                return render(quiet, asked).rstrip().endswith(opening.rstrip())
            except (OSError, KeyError, TypeError):  # no such path, or another answer: not this kind of server
                continue
        return False

    def _template(self, endpoint: Endpoint, asked: Mapping[str, Any]) -> str:
        return str(endpoint.post("/../apply-template", asked)["prompt"])

    def _tokens(self, endpoint: Endpoint, asked: Mapping[str, Any]) -> str:
        tokens = endpoint.post("/../tokenize", asked)["tokens"]
        return str(endpoint.post("/../detokenize", {"model": endpoint.model, "tokens": tokens})["prompt"])

    def _instead(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        reason = (
            f"{self.endpoint.url} does not show that it continued the prefix: it neither echoes it nor shows a prompt "
            "that ends with it. A prefix that is dropped in silence guards nothing"
        )
        if not self.fallback:
            raise NotContinued(f"{reason}. Serve the model with vLLM or llama.cpp, or take fallback=True (a suffix)")
        warnings.warn(f"{reason}; from now on it is a SUFFIX, which is another method", stacklevel=3)
        self.prefix = replace(self.prefix, position="suffix")
        return self.generate(messages, tools, **options)


def _turn(said: Mapping[str, Any], content: str, continuation: str, position: str) -> dict[str, Any]:
    calls = {name: said[name] for name in ("tool_calls", "finish_reason") if said.get(name)}
    return {"role": "assistant", "content": content, "continuation": continuation, "position": position, **calls}
