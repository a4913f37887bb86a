"""A guarded server as a model of Inspect, for AgentHarm, AgentDojo, BFCL and all else that `inspect eval` runs.

    inspect eval inspect_evals/agentharm --model ping/NAME --model-base-url http://127.0.0.1:8000/v1 \\
        -M prefix=prefix.json -T refusal_judge=... -T semantic_judge=...

Needs `pip install 'steerbook[bench]'`. A model rather than a solver: AgentHarm's and AgentDojo's lists of agents are
closed, and a model serves every agent. Inspect's own providers put a new header behind a prefix, or drop it; this one
insists on proof that the server continued it (`ServerGuard`). Without `-M prefix` it is the bare model.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageTool,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    modelapi,
)
from inspect_ai.tool import ToolCall, ToolChoice, ToolInfo

from ...endpoint import Endpoint
from .prefix import Prefix
from .server import ServerGuard

KEY = "PING_API_KEY"  # not OPENAI_API_KEY, which is the judges'
OPTIONS = ("max_tokens", "temperature", "top_p", "seed", "frequency_penalty", "presence_penalty")


@modelapi(name="ping")
class GuardedModel(ModelAPI):
    """A server with OpenAI's chat interface, whose replies begin with a prefix.

    Args:
        api_key: of the server, if it asks for one (default: the variable PING_API_KEY).
        prefix: a file of `Prefix.save`. Its fingerprint cannot be checked against a served model.
        fallback: where the server does not continue it, use it as a suffix, with a warning.
        timeout, retries: of a request.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 (Inspect's signature)
        prefix: str | None = None,
        fallback: bool = False,
        timeout: float = 600.0,
        retries: int = 3,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        if base_url is None:
            raise ValueError("give the server: --model-base-url http://127.0.0.1:8000/v1")
        found = Prefix("") if prefix is None else Prefix.load(prefix)
        endpoint = Endpoint(base_url, model_name, key_variable=KEY, key=api_key, timeout=timeout, retries=retries)
        self.guard = ServerGuard(endpoint, replace(found, fingerprint=None), fallback=bool(fallback))

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        options: dict[str, Any] = {name: value for name in OPTIONS if (value := getattr(config, name)) is not None}
        if config.stop_seqs:
            options["stop"] = config.stop_seqs
        if tools and tool_choice != "auto":
            named = {"any": "required", "none": "none"}.get(str(tool_choice))
            options["tool_choice"] = named or {"type": "function", "function": {"name": tool_choice.name}}  # type: ignore[union-attr]
        schemas = [
            {"type": "function", "function": tool.model_dump(include=SHOWN, exclude_none=True)} for tool in tools
        ]
        turn = await asyncio.to_thread(self.guard.generate, messages(input), schemas, **options)
        calls = [_call(one) for one in turn.get("tool_calls", [])]
        message = ChatMessageAssistant(content=turn["content"], tool_calls=calls or None, model=self.model_name,
                                       source="generate", metadata={"position": turn["position"]})  # fmt: skip
        cut = turn.get("finish_reason") == "length"
        choice = ChatCompletionChoice(
            message=message, stop_reason="max_tokens" if cut else "tool_calls" if calls else "stop"
        )
        return ModelOutput(model=self.model_name, choices=[choice])


SHOWN = {"name", "description", "parameters"}


def messages(conversation: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """A conversation of Inspect as OpenAI's chat interface has it."""
    made: list[dict[str, Any]] = []
    for one in conversation:
        turn: dict[str, Any] = {"role": one.role, "content": one.text}
        if isinstance(one, ChatMessageAssistant) and one.tool_calls:
            turn["tool_calls"] = [
                {"id": call.id, "type": "function",
                 "function": {"name": call.function, "arguments": json.dumps(call.arguments)}}
                for call in one.tool_calls
            ]  # fmt: skip
        if isinstance(one, ChatMessageTool):
            turn |= {"tool_call_id": one.tool_call_id or "", "name": one.function or ""}
            if one.error is not None:
                turn["content"] = f"Error: {one.error.message}"
        made.append(turn)
    return made


def _call(found: Any) -> ToolCall:
    function = found["function"]
    text = function.get("arguments") or "{}"
    try:
        arguments = json.loads(text) if isinstance(text, str) else text
        error = None if isinstance(arguments, dict) else f"arguments are no object: {text}"
    except json.JSONDecodeError as problem:
        arguments, error = {}, f"arguments are no JSON ({problem}): {text}"
    return ToolCall(id=str(found.get("id", "")), function=str(function.get("name", "")),
                    arguments=arguments if isinstance(arguments, dict) else {}, parse_error=error)  # fmt: skip
