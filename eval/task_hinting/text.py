"""Exact match of text answers by length, for pretrained models: greedy decoding, as a user would do it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...endpoint import Endpoint
from ..choices import CausalLM, encode
from ..generation import generate
from ..likelihood import text_nats
from ..sharding import shared_out
from ..statistics import Evaluation, metric
from .scores import EOS, Sample, error_kind

Row = Mapping[str, Any]
COLUMNS = ("task", "items", "prompt", "completion")
NUMBERS, WORDS = re.compile(r"( ?\d+)+"), re.compile(r"( ?[A-Za-z]+)+")


def evaluate(
    model: CausalLM | Endpoint,
    tokenizer: PreTrainedTokenizerBase | None,
    rows: Iterable[Row],
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> Evaluation:
    """Let the model answer each row's `prompt`, and compare with `completion`, strictly.

    An answer is what comes up to the end-of-text token or a line's end, without the white space around it; as many
    tokens as the longest completion has, and one more, are allowed. It is well formed if it is numbers where numbers
    are asked for, and words where words are; none at all, where nothing is. Of a row with `goes_on` only as many
    numbers or words count as its completion has.

    The processes of a job share the rows; all must call this (and `collateral`).

    Returns:
        Metrics, with intervals over questions (`group`, default the id), for each task and number of items N:
        `em/TASK/N` (right throughout), `tokens/TASK/N` (of the completion's numbers, words or digits and its end, the
        share that the answer has in their places) and `formed/TASK/N`. Samples, one a row in their order: `id`,
        `group`, `metrics` with `em`, `tokens` and `formed`, `tokens` of the prompt, and where wrong `answer`, `error`
        (the kind of its first wrong number, word or digit, see `error_kind`; "format" if it is not well formed) and
        `place`, how many are right before.

    Raises:
        ValueError: no rows, a row without one of the columns `task`, `items`, `prompt`, `completion`, or no tokenizer,
            which a served model needs too: the tokens of the completions are counted.
    """
    if tokenizer is None:
        raise ValueError("answers get as many tokens as the longest completion has: give the model's --tokenizer")
    rows = list(rows)
    if not rows:
        raise ValueError("no rows to evaluate; give at least one")
    for number, row in enumerate(rows, 1):
        if missing := [column for column in COLUMNS if column not in row]:
            raise ValueError(f"row {number} has no {', '.join(missing)}, only the columns {', '.join(row)}")
    allowed = 1 + max(map(len, encode(tokenizer, [row["completion"] for row in rows])))
    prompts = [row["prompt"] for row in rows]
    texts = shared_out(prompts, lambda part: generate(model, tokenizer, part, max_new_tokens=allowed,
                                                      batch_size=batch_size, progress=progress))  # fmt: skip
    samples: list[Sample] = []
    found: dict[str, list[tuple[float, str]]] = {}
    for row, text, ids in zip(rows, texts, encode(tokenizer, prompts), strict=True):
        answer, wanted = text.strip(" ").partition("\n")[0].strip(), row["completion"].strip()
        if row.get("goes_on"):
            answer = " ".join(answer.split()[: len(wanted.split())])
        form = NUMBERS if NUMBERS.fullmatch(wanted) else WORDS
        formed = form.fullmatch(answer) is not None if wanted else answer == ""
        right, said = _parts(wanted, answer)
        same = sum(one == other for one, other in zip(right, said, strict=False)) / len(right)
        metrics = {"em": float(answer == wanted), "tokens": same, "formed": float(formed)}
        identity = str(row.get("id", len(samples)))
        group = str(row.get("group", identity))
        sample: Sample = {"id": identity, "group": group, "metrics": metrics, "tokens": len(ids)}
        if not metrics["em"]:
            kind, place = _first_error(right, said) if formed else ("format", 0)
            sample |= {"answer": answer, "error": kind, "place": place}
        samples.append(sample)
        for name, value in metrics.items():
            found.setdefault(f"{name}/{row['task']}/{row['items']}", []).append((value, group))
    order = sorted(found, key=lambda key: (*key.split("/")[:2], int(key.split("/")[2])))
    return {
        "metrics": {key: metric(*zip(*found[key], strict=True), share=True) for key in order},
        "samples": samples,
    }


def _parts(*texts: str) -> list[list[str | int]]:
    """Of each text its numbers or words, or its digits if all are single numbers, and the end."""
    listed = any(" " in text for text in texts)
    return [[*(text.split() if listed else text), EOS] for text in texts]


def _first_error(right: Sequence[str | int], said: Sequence[str | int]) -> tuple[str, int]:
    """Kind and place of the first part of an answer that is wrong."""
    place = next(number for number, (one, other) in enumerate(zip(right, said, strict=False)) if one != other)
    return error_kind(right[place - 1], right[place], said[place], place == 0), place


def collateral(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Row],
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> list[Sample]:
    """What training did to unrelated texts, rows with `id`, `group` and `text`: a sample a row, with `metrics`
    (`nats_per_token`) and its `tokens`."""
    rows = list(rows)
    scored = shared_out(rows, lambda part: text_nats(model, tokenizer, part, batch_size, progress))
    return [
        {"id": row["id"], "group": row["group"], "tokens": tokens, "metrics": {"nats_per_token": nats / tokens}}
        for row, (nats, tokens) in zip(rows, scored, strict=True)
    ]
