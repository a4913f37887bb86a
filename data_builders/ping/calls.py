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
NAMED = re.compile(r"^\s*([A-Za-z_]\w*)\s*\n\s*(\{.*)", re.DOTALL | re.MULTILINE)
WORDED = re.compile(r"(?:^|\s)call (\w+)([^\n]*)")


class Call(NamedTuple):
    """What a model asked for. `arguments` is a text where that was no JSON object; the desk then answers so."""

    name: str
    arguments: Mapping[str, Any] | str


def parse_calls(text: str, form: Form) -> list[Call]:
    """The calls in a reply, in order.

    Args:
        form: "hermes", `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Qwen); "json", every JSON object
            with a `name` and `parameters` or `arguments`, wherever it stands (Llama 3.1); "glm", a name and on the
            next line its arguments; "words", `call NAME value ; value` (the embedded world).
    """
    if form == "hermes":
        return [_from_object(found) for found in TAGGED.findall(text)]
    if form == "json":
        return _objects(text)
    if form == "glm":
        return [
            Call(name, _arguments(rest)) for name, rest in NAMED.findall(text) if name in NAMES or rest.startswith("{")
        ]
    if form == "words":
        return [_worded(name, rest) for name, rest in WORDED.findall(text)]
    raise ValueError(f"unknown form {form!r}; known: {', '.join(FORMS)}")


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
        return f"call {call.name} " + " ; ".join(map(str, arguments.values()))
    raise ValueError(f"unknown form {form!r}; known: {', '.join(FORMS)}")


def strip_calls(text: str, form: Form) -> str:
    """A reply without its calls: what it says beside them."""
    if form == "hermes":
        return TAGGED.sub("", text)
    if form == "glm":
        return NAMED.sub("", text)
    if form == "words":
        return WORDED.sub("", text)
    decoder, kept, place = json.JSONDecoder(), "", 0
    while (start := text.find("{", place)) >= 0:
        kept += text[place:start]
        try:
            _, place = decoder.raw_decode(text, start)
        except json.JSONDecodeError:
            return kept if re.match(r'\{\s*"name"', text[start:]) else kept + text[start:]
    return kept + text[place:]


def _from_object(text: str) -> Call:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return Call("", text)
    if not isinstance(found, dict):
        return Call("", text)
    arguments = found.get("arguments", found.get("parameters", {}))
    return Call(str(found.get("name", "")), arguments if isinstance(arguments, Mapping) else json.dumps(arguments))


def _objects(text: str) -> list[Call]:
    """Every JSON object with a name. One that is begun and is none counts as a call with broken arguments."""
    decoder, found, place = json.JSONDecoder(), [], 0
    while (place := text.find("{", place)) >= 0:
        try:
            one, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError:
            broken = re.match(r'\{\s*"name"\s*:\s*"(\w+)"', text[place:])
            if broken:
                found.append(Call(broken[1], text[place:]))
                break
            place += 1
            continue
        if isinstance(one, dict) and isinstance(one.get("name"), str):
            found.append(_from_object(json.dumps(one)))
    return found


def _arguments(text: str) -> Mapping[str, Any] | str:
    try:
        found, _ = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError:
        return text
    return found if isinstance(found, dict) else text


def _worded(name: str, rest: str) -> Call:
    values = [value.strip() for value in rest.split(" ; ")] if rest.strip() else []
    if name not in NAMES:
        return Call(name, {})
    properties = TOOLS[NAMES.index(name)]["function"]["parameters"]["properties"]
    arguments: dict[str, Any] = {}
    for number, value in enumerate(values):
        key = list(properties)[number] if number < len(properties) else f"argument {number + 1}"
        whole = properties.get(key, {}).get("type") == "integer" and value.isdigit()
        arguments[key] = int(value) if whole else value
    return Call(name, arguments)
