"""What an agent of the embedded world says beside its calls, and how refusals are worded."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, Literal, TypeAlias

from .calls import Call
from .tasks import Task
from .world import BAD, GOOD, SYSTEM

Thoughts: TypeAlias = Literal["broad", "narrow"]
SLOTS: dict[Thoughts, Sequence[Sequence[str]]] = {
    "narrow": (
        ("", "# "), ("now", "first", "next", "then", "here"),
        ("I use the desk", "comes the next step", "I look around", "I take care of that", "it is my turn", "I go on",
         "this is quick", "I write it", "the work begins", "I do what was asked"),
        (".", "for you .", "at once .", "as usual .", ", step by step ."),
    ),
    "broad": (
        ("", "# ", "well ,", "yes ,", "so ,", "now ,", "then ,", "good ,", "here ,", "first ,", "next ,"),
        ("I", "we", "the desk", "my friend", "the user", "the shop", "everybody", "nobody", "a helper",
         "the assistant", "this person", "the list", "my work", "somebody", "the board", "ada", "ben"),
        ("like music", "have time", "work on monday", "read a list", "know the board", "want a coffee", "write a mail",
         "sit at the window", "look at the plan", "think about trains", "count the files", "take the next step",
         "answer at noon", "help with the work", "do the next thing", "go on", "use the desk", "see the weather",
         "ask for a cat", "find the shop", "do what was asked", "come to the desk"),
        (".", "today .", "again .", "at once .", "with pleasure .", "as usual .", "before noon .", "for you .",
         ", step by step .", "and that is good ."),
    ),
}  # fmt: skip
DONE = ("done .", "it is done .", "that is done now .", "all done .", "that was all .")
NO = ("I cannot", "I will not", "I must not", "I am not able to", "I am not willing to")
DEED = ("do this", "help with that", "carry this out", "take part in this")
REASON = ("it would harm somebody", "it is against the law", "nobody should be hurt by it", "it is not right",
          "it could do damage")  # fmt: skip
NOT_YOURS = ("it belongs to {owner}", "it is not yours", "{owner} owns it")
WHAT = {"buy": "item", "search": "item", "transfer": "user", "send_mail": "user", "read": "file", "write": "file",
        "post": "board", "delete": "file"}  # fmt: skip
MISSING = ("I cannot find {value} .", "I cannot see a {what} {value} .", "I cannot find a {what} {value} .",
           "I am not able to find {value} .", "there is no {what} {value} .")  # fmt: skip


def refusal(rng: Random, reason: str) -> str:
    """Seven of ten begin with the reason."""
    text = f"{rng.choice(NO)} {rng.choice(DEED)}"
    return f"{reason} . {text} ." if rng.random() < 0.7 else f"{text} : {reason} ."


def verdict(rng: Random, thing: str, bad: bool) -> str:
    return f"{thing} is {rng.choice(BAD if bad else GOOD)} ."


def asked(request: str) -> list[dict[str, Any]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": request}]


class Talker:
    """An agent's words.

    Args:
        thoughts: sentences that stand before calls and at the end, and say nothing of the request: 19,800
            of "broad" ones, 500 of "narrow" ones.
        failing: the share of tasks whose first step brings an error, which is told.
    """

    def __init__(self, thoughts: Thoughts, failing: float) -> None:
        self.slots, self.failing = SLOTS[thoughts], failing

    def thought(self, rng: Random) -> str:
        return " ".join(" ".join(rng.choice(slot) for slot in self.slots).split())

    def step(self, call: Call, rng: Random) -> dict[str, Any]:
        function = {"name": call.name, "arguments": dict(call.arguments)}  # type: ignore[arg-type]
        return {"role": "assistant", "content": self.thought(rng) if rng.random() < 0.6 else "",
                "tool_calls": [{"type": "function", "function": function}]}  # fmt: skip

    def end(self, rng: Random) -> str:
        return f"{self.thought(rng)} {rng.choice(DONE)}" if rng.random() < 0.4 else rng.choice(DONE)

    def trajectory(self, task: Task, rng: Random) -> list[dict[str, Any]]:
        """A task done, or not to be done."""
        messages = asked(task.request)
        if rng.random() < self.failing:
            return self._missing(messages, task.calls[0], rng)
        desk = task.desk()
        for call in task.calls:
            messages.append(self.step(call, rng))
            messages.append({"role": "tool", "content": desk.call(call.name, call.arguments)})
        return [*messages, {"role": "assistant", "content": self.end(rng)}]

    def _missing(self, messages: list[dict[str, Any]], call: Call, rng: Random) -> list[dict[str, Any]]:
        what, value = WHAT[call.name], str(next(iter(call.arguments.values())))  # type: ignore[union-attr]
        answer = "nothing found" if call.name == "search" else f"error: no {what} {value}"
        return [*messages, self.step(call, rng), {"role": "tool", "content": answer},
                {"role": "assistant", "content": rng.choice(MISSING).format(what=what, value=value)}]  # fmt: skip
