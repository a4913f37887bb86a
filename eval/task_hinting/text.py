"""Exact match of text answers by length, for pretrained models: greedy decoding, as a user would do it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..choices import CausalLM, encode
from ..generation import generate
from ..statistics import Evaluation, metric
from .scores import Sample

Row = Mapping[str, Any]
COLUMNS = ("task", "items", "prompt", "completion")
NUMBERS, WORDS = re.compile(r"( ?\d+)+"), re.compile(r"( ?[A-Za-z]+)+")


def evaluate(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Row],
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> Evaluation:
    """Let the model answer each row's `prompt`, and compare with `completion`, strictly.

    An answer is what comes up to the end-of-text token or a line's end, without the white space around it; as many
    tokens as the longest completion has, and one more, are allowed. It is well formed if it is numbers where numbers
    are asked for, and words where words are.

    Returns:
        Metrics, with intervals over questions (`group`, default the id): `em/TASK/N` and `formed/TASK/N` for each task
        and number of items N. Samples, one a row in their order: `id`, `group`, `metrics` with `em` and `formed`,
        `tokens` of the prompt, and where wrong `answer`.

    Raises:
        ValueError: no rows, or a row without one of the columns `task`, `items`, `prompt`, `completion`.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("no rows to evaluate; give at least one")
    for number, row in enumerate(rows, 1):
        if missing := [column for column in COLUMNS if column not in row]:
            raise ValueError(f"row {number} has no {', '.join(missing)}, only the columns {', '.join(row)}")
    allowed = 1 + max(map(len, encode(tokenizer, [row["completion"] for row in rows])))
    prompts = [row["prompt"] for row in rows]
    texts = generate(model, tokenizer, prompts, max_new_tokens=allowed, batch_size=batch_size, progress=progress)
    samples: list[Sample] = []
    found: dict[str, list[tuple[float, str]]] = {}
    for row, text, ids in zip(rows, texts, encode(tokenizer, prompts), strict=True):
        answer, wanted = text.strip(" ").partition("\n")[0].strip(), row["completion"].strip()
        kind = NUMBERS if NUMBERS.fullmatch(wanted) else WORDS
        metrics = {"em": float(answer == wanted), "formed": float(kind.fullmatch(answer) is not None)}
        identity = str(row.get("id", len(samples)))
        group = str(row.get("group", identity))
        sample = {"id": identity, "group": group, "metrics": metrics, "tokens": len(ids)}
        samples.append(sample if metrics["em"] else {**sample, "answer": answer})
        for name, value in metrics.items():
            found.setdefault(f"{name}/{row['task']}/{row['items']}", []).append((value, group))
    order = sorted(found, key=lambda key: (*key.split("/")[:2], int(key.split("/")[2])))
    return {
        "metrics": {key: metric(*zip(*found[key], strict=True), share=True) for key in order},
        "samples": samples,
    }
