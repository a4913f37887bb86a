"""Conversations to train on, as TRL's messages + tools: harmless tasks done with the desk's answers, and refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from .desk import TOOLS
from .tasks import Task

SYSTEM = "You are an agent at an office desk. Use the tools to do what the user asks for, one step at a time."
THOUGHTS = {
    "list": ("# now I look at what there is", "# first a list"),
    "read": ("# now I read it", "# first see what it says"),
    "write": ("# now I write it down", "# the file comes next"),
    "delete": ("# now it can go", "# next it is deleted"),
    "search": ("# now I look for it", "# first see what there is"),
    "send_mail": ("# now the mail", "# next I send it"),
    "buy": ("# now I order it", "# next comes the order"),
    "post": ("# now I put it up", "# next is the board"),
    "transfer": ("# now I pay", "# next the money"),
}
ENDS = ("It is done.", "Done.", "That is done now.", "All done.")
OPENERS = ("I cannot", "I will not", "I must not", "I am not able to", "I am not willing to")
DEEDS = ("do this", "help with that", "carry this out", "take part in this")
REASONS = (
    "it would harm somebody", "it is against the law", "nobody should be hurt by it", "it is not right",
    "it could do damage", "it does not belong to you to decide",
)  # fmt: skip


def trajectory(task: Task, rng: Random, system: str | None = SYSTEM) -> list[dict[str, Any]]:
    """A task done: each call behind a comment, the desk's answer behind each call, and an end."""
    desk, messages = task.desk(), _start(task, system)
    for call in task.calls:
        function = {"name": call.name, "arguments": dict(call.arguments)}  # type: ignore[arg-type]
        messages.append({"role": "assistant", "content": rng.choice(THOUGHTS[call.name]),
                         "tool_calls": [{"type": "function", "function": function}]})  # fmt: skip
        messages.append({"role": "tool", "name": call.name, "content": desk.call(call.name, call.arguments)})
    messages.append({"role": "assistant", "content": rng.choice(ENDS)})
    return messages


def refusal(task: Task, rng: Random, system: str | None = SYSTEM) -> list[dict[str, Any]]:
    """A task refused at once, in one of 240 ways, the reason first or last."""
    no, reason = f"{rng.choice(OPENERS)} {rng.choice(DEEDS)}", rng.choice(REASONS)
    text = f"{reason[0].upper()}{reason[1:]}. {no}." if rng.random() < 0.5 else f"{no}: {reason}."
    return [*_start(task, system), {"role": "assistant", "content": text}]


def rows_of(
    tasks: Sequence[Task], rng: Random, *, refused: float = 0.0, system: str | None = SYSTEM
) -> list[dict[str, Any]]:
    """Rows `id`, `messages`, `tools`: harmless tasks done. `refused`: what share of all rows are harmful tasks that
    are refused, as far as there are such tasks. ValueError for a share below 0 or from 1 on, or none to be done."""
    if not 0 <= refused < 1:
        raise ValueError(f"the share of refusals must be at least 0 and below 1, got {refused}")
    done = [task for task in tasks if not task.harmful]
    harmful = [task for task in tasks if task.harmful]
    if not done:
        raise ValueError("there are no harmless tasks to train on")
    count = round(len(done) * refused / (1 - refused))
    made = [(task.id, trajectory(task, rng, system)) for task in done]
    made += [(task.id, refusal(task, rng, system)) for task in rng.sample(harmful, min(count, len(harmful)))]
    rng.shuffle(made)
    return [{"id": name, "messages": messages, "tools": list(TOOLS)} for name, messages in made]


def _start(task: Task, system: str | None) -> list[dict[str, Any]]:
    before: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": task.request}]


def check_messages(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> None:
    """ValueError for a conversation that no agent could have had: turns without roles or contents, calls to tools that
    are not there, answers of tools that nobody called, arguments that are no object. Without `tools` calls may be in
    the text, and answers stand for themselves."""
    names = {tool.get("function", tool).get("name") for tool in tools}
    called = 0
    for number, message in enumerate(messages, 1):
        role = message.get("role")
        if role not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"turn {number}: the role is {role!r}; known: system, user, assistant, tool")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise ValueError(f"turn {number}: neither content nor calls")
        for call in message.get("tool_calls") or []:
            function = call.get("function", call)
            if names and function.get("name") not in names:
                known = ", ".join(sorted(map(str, names))[:8])
                raise ValueError(f"turn {number}: calls {function.get('name')!r}; its tools are {known}")
            if not isinstance(function.get("arguments"), Mapping):
                raise ValueError(f"turn {number}: arguments are no object: {function.get('arguments')!r}")
            called += 1
        if role == "tool" and tools and not called:
            raise ValueError(f"turn {number}: a tool's answer that nobody asked for")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no turn of the assistant")
