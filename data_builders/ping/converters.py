"""Public agent data as messages + tools: AgentInstruct, CodeActInstruct, ToolACE, xLAM (spec 7.2).

Each function takes one row as the data set has it and gives `messages`, `tools` and `loss`: of every turn of the
assistant, whether it is trained on.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
         "observation": "tool", "tool": "tool", "function": "tool", "function_call": "assistant"}  # fmt: skip
Converted = dict[str, Any]


def agent_instruct(row: Mapping[str, Any]) -> Converted:
    """`conversations: [{from, value, loss}]`; turns of `gpt` with `loss` false are examples and not trained on."""
    messages, loss = [], []
    for number, turn in enumerate(_turns(row, "conversations"), 1):
        role = _role(turn.get("from"), number)
        messages.append({"role": role, "content": _text(turn.get("value"), number)})
        if role == "assistant":
            loss.append(turn.get("loss") is None or bool(turn.get("loss")))
    return {"messages": messages, "tools": [], "loss": loss}


def code_act(row: Mapping[str, Any]) -> Converted:
    """`conversations: [{role, content}]`, actions as `<execute>` code: they stay text, as the model writes them."""
    messages = [
        {"role": _role(turn.get("role"), number), "content": _text(turn.get("content"), number)}
        for number, turn in enumerate(_turns(row, "conversations"), 1)
    ]
    return {"messages": messages, "tools": [], "loss": [True] * sum(one["role"] == "assistant" for one in messages)}


def tool_ace(row: Mapping[str, Any]) -> Converted:
    """`system` with the schemas in its text, `conversations: [{from, value}]`; calls are `[name(key=value), ...]`."""
    tools = schemas(_text(row.get("system"), 0))
    messages: list[dict[str, Any]] = [{"role": "system", "content": row["system"]}]
    for number, turn in enumerate(_turns(row, "conversations"), 1):
        role, text = _role(turn.get("from"), number), _text(turn.get("value"), number)
        calls = bracket_calls(text) if role == "assistant" else None
        if calls:
            messages.append({"role": role, "content": "", "tool_calls": calls})
        else:
            messages.append({"role": role, "content": text})
    return {"messages": messages, "tools": tools, "loss": [True] * sum(m["role"] == "assistant" for m in messages)}


def xlam(row: Mapping[str, Any]) -> Converted:
    """`query`, `tools` and `answers`, the latter two JSON texts or objects: one turn of calls."""
    tools = [_schema(one) for one in _json(row.get("tools"), "tools")]
    calls = [_call(one.get("name"), one.get("arguments")) for one in _json(row.get("answers"), "answers")]
    if not calls:
        raise ValueError("answers are empty: there is nothing to train on")
    messages = [{"role": "user", "content": _text(row.get("query"), 1)},
                {"role": "assistant", "content": "", "tool_calls": calls}]  # fmt: skip
    return {"messages": messages, "tools": tools, "loss": [True]}


def as_it_is(row: Mapping[str, Any]) -> Converted:
    """`messages`, and `tools` (a list or a JSON text) where there are any; arguments as objects or JSON texts."""
    messages = [dict(turn) for turn in _turns(row, "messages")]
    for turn in messages:
        if turn.get("tool_calls"):
            given = turn["tool_calls"]
            functions = [
                call.get("function", call) if isinstance(call, Mapping) else call
                for call in (given if isinstance(given, list) else [given])
            ]
            if not all(isinstance(one, Mapping) for one in functions):
                raise ValueError(f"tool_calls must be a list of objects, got {str(given)[:80]}")
            turn["tool_calls"] = [_call(one.get("name"), one.get("arguments")) for one in functions]
    tools = [_schema(one) for one in _json(row.get("tools") or [], "tools")]
    said = sum(turn.get("role") == "assistant" for turn in messages)
    loss = row.get("loss") or [True] * said
    if not isinstance(loss, list) or len(loss) != said:
        raise ValueError(f"loss must say of {said} turns of the assistant whether they are trained on, got {loss!r}")
    return {"messages": messages, "tools": tools, "loss": [bool(one) for one in loss]}


CONVERTERS: dict[str, Callable[[Mapping[str, Any]], Converted]] = {
    "agent_instruct": agent_instruct,
    "code_act": code_act,
    "tool_ace": tool_ace,
    "xlam": xlam,
    "messages": as_it_is,
}


def bracket_calls(text: str) -> list[dict[str, Any]] | None:
    """The calls of `[name(key=value), other.name(key="x")]`, or None where the text is something else. Values are
    literals; nothing is evaluated. Names may have dots, spaces and other marks, as the data's have."""
    stripped = text.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")) or "(" not in stripped:
        return None
    names: list[str] = []

    def plain(found: re.Match[str]) -> str:
        if found[1] is None:  # a text in quotes, whatever it holds
            return found[0]
        names.append(found[2].strip())
        return f"{found[1]}f{len(names) - 1}("

    code = re.sub(r"\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'|(^\[\s*|\)\s*,\s*)([^()\[\],'\"=]+)\(", plain, stripped)
    try:
        tree = ast.parse(code, mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            return None
        calls = []
        for one in tree.elts:
            if not isinstance(one, ast.Call) or not isinstance(one.func, ast.Name) or one.args:
                return None
            if any(key.arg is None for key in one.keywords):  # **
                return None
            arguments = {str(key.arg): ast.literal_eval(_literals(key.value)) for key in one.keywords}
            json.dumps(arguments)
            calls.append(_call(names[int(one.func.id[1:])], arguments))
    except (SyntaxError, ValueError, IndexError, TypeError, MemoryError, RecursionError):
        return None
    return calls


def _literals(tree: ast.expr) -> ast.expr:
    """With JSON's true, false and null as Python's."""

    class Words(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:  # noqa: N802
            known = {"true": True, "false": False, "null": None}
            return ast.Constant(known[node.id]) if node.id in known else node

    found: ast.expr = Words().visit(tree)
    return found


def schemas(text: str) -> list[dict[str, Any]]:
    """The JSON list of functions in a system message; [] where there is none."""
    decoder = json.JSONDecoder()
    for place in (found.start() for found in re.finditer(r"\[\s*\{", text)):
        try:
            found, _ = decoder.raw_decode(text, place)
        except json.JSONDecodeError:
            continue
        if all(isinstance(one, dict) and "name" in one for one in found):
            return [_schema(one) for one in found]
    return []


def _schema(one: Mapping[str, Any]) -> dict[str, Any]:
    """A function as chat templates take it; types `dict`, at any depth, and bare properties are put into JSON schema's
    form."""
    if one.get("type") == "function" and isinstance(one.get("function"), Mapping):
        return {"type": "function", "function": dict(one["function"])}
    if not isinstance(one.get("name"), str) or not isinstance(one.get("parameters") or {}, Mapping):
        raise ValueError(f"a tool without a name, or whose parameters are no object: {str(dict(one))[:80]}")
    parameters = dict(one.get("parameters") or {})
    if "properties" not in parameters:
        parameters = {"type": "object", "properties": parameters}
    parameters.setdefault("type", "object")
    return {"type": "function", "function": {"name": one["name"], "description": one.get("description", ""),
                                             "parameters": _objects(parameters)}}  # fmt: skip


def _objects(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: "object" if key == "type" and one == "dict" else _objects(one) for key, one in value.items()}
    return [_objects(one) for one in value] if isinstance(value, list) else value


def _call(name: Any, arguments: Any) -> dict[str, Any]:
    if not isinstance(name, str) or not name:
        raise ValueError(f"a call without a name: {name!r}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise ValueError(f"arguments of {name} are not JSON: {arguments[:80]!r}") from error
    if not isinstance(arguments, Mapping):
        raise ValueError(f"arguments of {name} are no object: {arguments!r}")
    return {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}


def _turns(row: Mapping[str, Any], column: str) -> Sequence[Mapping[str, Any]]:
    turns = row.get(column)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError(f"{column} must be a list of turns, got {str(turns)[:60]!r}")
    return turns


def _role(name: Any, number: int) -> str:
    if not isinstance(name, str) or name not in ROLES:
        raise ValueError(f"turn {number}: the role is {name!r}; known: {', '.join(ROLES)}")
    return ROLES[name]


def _text(value: Any, number: int) -> str:
    if not isinstance(value, str):
        raise ValueError(f"turn {number}: no text but {value!r}")
    return value


def _json(value: Any, what: str) -> list[Mapping[str, Any]]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{what} is not JSON: {value[:80]!r}") from error
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
        raise ValueError(f"{what} must be a list of objects, got {str(value)[:60]!r}")
    return value
