"""The model card of a run, made from its ``results.json`` alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

TOY = (
    "> **A toy.** This run tuned a tiny model that was built on the spot, to show the method at work. "
    "Its numbers say nothing about large models."
)
FEW = 30  # lines of a list that people read


def model_card(results: Mapping[str, Any], figures: Sequence[str] = ()) -> str:
    """Markdown with YAML front matter. ``figures``: names of files in the folder ``figures``."""
    parts = [_front_matter(results), f"# {results['recipe']}", f"Status: **{results['status']}**."]
    if results["toy"]:
        parts.insert(2, TOY)
    if "error" in results:
        parts.append(f"```\n{results['error']}\n```")
    base = results.get("base_model", {})
    if base:
        revision = f", revision `{base['revision']}`" if base.get("revision") else ""
        parts.append(f"Base model: `{base['name']}`{revision}.")
    if "trainable_parameters" in results:
        parts.append(f"Trainable parameters: {_plain(results['trainable_parameters'])}.")
    if results.get("adapter") and base:
        parts += ["## Use", _loading(base, results["adapter"])]
    elif results.get("model"):
        parts += ["## Use", _loading_whole(results["model"])]
    if results.get("prefix"):
        parts.append(_guard(results["prefix"]))
    if "metrics" in results:
        parts += ["## Results", "Mean with a 95 % interval.", _tables(results["metrics"])]
    if results.get("claims"):
        parts += ["## Claims", _claims(results["claims"])]
    if figures:
        parts.append("\n\n".join(f"![{name.removesuffix('.png')}](figures/{name})" for name in figures))
    for title in ("data", "cost", "arguments", "environment"):
        if results.get(title):
            parts += [f"## {title.capitalize()}", _bullets(results[title])]
    return "\n\n".join(parts) + "\n"


def _front_matter(results: Mapping[str, Any]) -> str:
    fields: dict[str, Any] = {"tags": ["steerbook", results["recipe"], *(["toy"] if results["toy"] else [])]}
    base = results.get("base_model", {})
    if results.get("adapter"):
        fields["library_name"] = "peft"
    if base and not base.get("folder"):  # the Hub knows only its own names
        fields["base_model"] = base["name"]
    return f"---\n{yaml.safe_dump(fields, sort_keys=True)}---"


def _loading(base: Mapping[str, Any], adapter: str) -> str:
    source = repr(base.get("folder") or base["name"])
    pinned = f", revision={base['revision']!r}" if base.get("revision") and not base.get("folder") else ""
    return f"""From this folder:

```python
import steerbook  # registers our adapter types with PEFT
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({source}{pinned})
model = AutoModelForCausalLM.from_pretrained({source}{pinned})
model = PeftModel.from_pretrained(model, {adapter!r})
```"""


def _loading_whole(model: Mapping[str, str]) -> str:
    return f"""From this folder:

```python
from {model["module"]} import {model["function"].partition(".")[0]}
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({model["folder"]!r})
model = {model["function"]}({model["folder"]!r})
```"""


def _guard(prefix: str) -> str:
    return f"""Its replies behind the prefix:

```python
from steerbook.trainers import Prefix, PrefixGuard

guard = PrefixGuard(model, tokenizer, Prefix.load({prefix!r}))
reply = guard.generate(messages, tools=tools, max_new_tokens=256)
```"""


def _tables(metrics: Mapping[str, Any]) -> str:
    """A row for each method (`before`, `after`, and those inside other sections), a column for each metric; sections
    without a metric in common make tables of their own. What is not of that form: up to `FEW` numbers a section."""
    tables: list[dict[str, Mapping[str, Any]]] = []
    rest: list[str] = []
    for section, content in metrics.items():
        inside = content if isinstance(content, Mapping) else {}
        rows = {
            name: methods
            for name, methods in {section: content, **inside}.items()
            if isinstance(methods, Mapping) and methods and all(_is_metric(value) for value in methods.values())
        }
        columns = {column for methods in rows.values() for column in methods}
        if rows:
            same = (table for table in tables if any(columns & methods.keys() for methods in table.values()))
            into = next(same, None)
            if into is None:
                tables.append(rows)
            else:
                into |= rows
        if section not in rows and not (inside and all(name in rows for name in inside)):
            leaves = _bullets({section: content})
            more = f"- {section}: in `results.json`"
            rest += [more if leaves.count("\n") >= FEW else leaves] if leaves else []
    return "\n\n".join([*map(_table, tables), *(["\n".join(rest)] if rest else [])])


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for methods in rows.values() for name in methods))
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, methods in rows.items():
        cells = [_interval(methods[column]) if column in methods else "" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _is_metric(value: Any) -> bool:
    return isinstance(value, Mapping) and "value" in value


def _interval(metric: Mapping[str, Any]) -> str:
    bounds = "" if metric.get("low") is None else f" [{_plain(metric['low'])}, {_plain(metric['high'])}]"
    return _plain(metric["value"]) + bounds


def _claims(claims: Sequence[Mapping[str, Any]]) -> str:
    verdict = {True: "supported", False: "not supported"}
    lines = [f"- **{verdict[claim['supported']]}**: {claim['claim']}" for claim in claims]
    return "\n".join(
        line + (f" ({_plain(claim['detail'])})" if claim.get("detail") else "")
        for line, claim in zip(lines, claims, strict=True)
    )


def _bullets(values: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {_plain(value)}" for name, value in _leaves(values))


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested names joined by " / ", down to numbers, texts, lists and metrics (mappings with "value")."""
    for name, value in values.items():
        if isinstance(value, Mapping) and "value" not in value:
            yield from _leaves(value, f"{prefix}{name} / ")
        else:
            yield f"{prefix}{name}", value


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "unknown"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return str(value).replace("|", "\\|").replace("\n", " ")
