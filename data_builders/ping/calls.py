"""Tool calls as models write them: one text form for each family of chat templates."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from .desk import NAMES, TOOLS

Form: TypeAlias = Literal["hermes", "json", "glm", "words"]
FORMS: tuple[Form, ...] = ("hermes", "json", "glm", "words")
TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)
NAMED = re.compile(r"^[ \t]*([A-Za-z_]\w*)[ \t]*\n\s*(?=\{)", re.MULTILINE)
WORDED = re.compile(rf"(?:^|(?<=\s))call ({'|'.join(NAMES)})\b([^\n]*)")
BROKEN = re.compile(r'\{\s*"name"\s*:\s*"(\w+)"')
DIGITS = 18  # of a whole number that fits into SQLite


class Call(NamedTuple):
    """What a model asked for. `arguments` is a text where that was no JSON object; the desk then answers so."""

    name: str
    arguments: Mapping[str, Any] | str


def parse_calls(text: str, form: Form) -> list[Call]:
    """The calls in a reply, in order.

    Args:
        form: "hermes", `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Qwen); "json", every JSON object
            with a `name` and `parameters` or `arguments`, wherever it stands (Llama 3.1); "glm", a name and on the
            next line its arguments; "words", `call NAME value ; value` of the desk's tools (the embedded world).
    """
    if form == "hermes":
        return [_from_object(found) for found in TAGGED.findall(text)]
    if form == "json":
        return _objects(text)
    if form == "glm":
        return [Call(name, arguments) for _, _, name, arguments in _named(text)]
    if form == "words":
        return [_worded(name, rest) for name, rest in WORDED.findall(text)]
    raise ValueError(f"unknown form {form!r}; known: {', '.join(FORMS)}")


def served_call(found: Mapping[str, Any]) -> Call:
    """One of the `tool_calls` of OpenAI's chat interface, whose arguments are a text of JSON."""
    function = found.get("function") or {}
    arguments = function.get("arguments") or "{}"
    try:
        parsed = _load(arguments)[0] if isinstance(arguments, str) else arguments
    except ValueError:
        parsed = None
    return Call(str(function.get("name", "")), parsed if isinstance(parsed, Mapping) else str(arguments))


def render_call(call: Call, form: Form) -> str:
    """The text of a call, which `parse_calls` reads back."""
    arguments = dict(call.arguments) if isinstance(call.arguments, Mapping) else json.loads(call.arguments)
    if form == "hermes":
        return f"<tool_call>\n{json.dumps({'name': call.name, 'arguments': arguments})}\n</tool_call>"
    if form == "json":
        return json.dumps({"name": call.name, "parameters": arguments})
    if form == "glm":
        return f"{call.name}\n{json.dumps(arguments)}"
    if form == "words":
        order = list(TOOLS[NAMES.index(call.name)]["function"]["parameters"]["properties"])
        return f"call {call.name} " + " ; ".join(str(arguments[key]) for key in order if key in arguments)
    raise ValueError(f"unknown form {form!r}; known: {', '.join(FORMS)}")


def strip_calls(text: str, form: Form) -> str:
    """A reply without its calls: what it says beside them."""
    if form == "hermes":
        return TAGGED.sub("", text)
    if form == "words":
        return WORDED.sub("", text)
    if form == "glm":
        spans = [(start, stop) for start, stop, _, _ in _named(text)]
    else:
        spans = [(start, stop) for start, stop, _ in _spans(text)]
    kept, place = "", 0
    for start, stop in spans:
        kept, place = kept + text[place:start], stop
    return kept + text[place:]


def _load(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value that begins at `start`, and where it ends. ValueError for none, also for one of thousands of
    levels or digits, and for text that cannot be written down (half of a surrogate pair)."""
    try:
        found, stop = json.JSONDecoder().raw_decode(text, start)
        json.dumps(found, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("too many levels") from error
    return found, stop


def _from_object(text: str) -> Call:
    try:
        found, _ = _load(text)
    except ValueError:
        broken = BROKEN.search(text)
        return Call(broken[1] if broken else "", text)
    if not isinstance(found, dict):
        return Call("", text)
    arguments = found.get("arguments", found.get("parameters", {}))
    return Call(str(found.get("name", "")), arguments if isinstance(arguments, Mapping) else json.dumps(arguments))


def _spans(text: str) -> list[tuple[int, int, Call]]:
    """Every JSON object with a name, where it stands and its call. One that is begun and is none counts as a call with
    broken arguments, up to the end."""
    found: list[tuple[int, int, Call]] = []
    place = 0
    while (place := text.find("{", place)) >= 0:
        try:
            one, stop = _load(text, place)
        except ValueError:
            if broken := BROKEN.match(text, place):
                return [*found, (place, len(text), Call(broken[1], text[place:]))]
            place += 1
            continue
        if isinstance(one, dict) and isinstance(one.get("name"), str):
            found.append((place, stop, _from_object(text[place:stop])))
        place = stop
    return found


def _objects(text: str) -> list[Call]:
    return [call for _, _, call in _spans(text)]


def _named(text: str) -> list[tuple[int, int, str, Mapping[str, Any] | str]]:
    """Every name with an object on the next line: from where to where, the name and its arguments."""
    found: list[tuple[int, int, str, Mapping[str, Any] | str]] = []
    place = 0
    while match := NAMED.search(text, place):
        try:
            one, place = _load(text, match.end())
        except ValueError:
            return [*found, (match.start(), len(text), match[1], text[match.end() :])]
        found.append((match.start(), place, match[1], one if isinstance(one, dict) else json.dumps(one)))
    return found


def _worded(name: str, rest: str) -> Call:
    values = [value.strip() for value in rest.split(" ; ")] if rest.strip() else []
    properties = TOOLS[NAMES.index(name)]["function"]["parameters"]["properties"]
    arguments: dict[str, Any] = {}
    for number, value in enumerate(values):
        key = list(properties)[number] if number < len(properties) else f"argument {number + 1}"
        whole = (
            properties.get(key, {}).get("type") == "integer"
            and value.isascii()
            and value.isdecimal()
            and len(value) <= DIGITS
        )
        arguments[key] = int(value) if whole else value
    return Call(name, arguments)
