"""Scores of the LoFiT row: multiple choice (MC1, MC2, MC3), exact match and the likelihood of unrelated text.

What is computed follows from the columns of the rows:

- ``prompt``, ``best``, ``true``, ``false``: multiple choice (Yin et al. 2024, arXiv 2406.01563, as in TruthfulQA);
- ``prompt``, ``answers``, ``stop`` (and ``shortcut``): greedy generation and exact match;
- ``text``: nats per token and perplexity.

Every row has an ``id``; ``group`` (default: the id) is the cluster of the bootstrap intervals.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...endpoint import Endpoint
from ..choices import CausalLM, choice_logprobs
from ..generation import generate, local
from ..likelihood import perplexity, text_nats
from ..sharding import shared_out
from ..statistics import Evaluation, Metric, metric

Row = Mapping[str, Any]


def evaluate(
    model: CausalLM | Endpoint,
    tokenizer: PreTrainedTokenizerBase | None,
    rows: Iterable[Row],
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> Evaluation:
    """Score rows of one kind (see the module's text): metrics with intervals, and one sample a row, in their order.

    Deterministic; the model's mode is restored. The processes of a job share the rows; all must call this. Raises
    ValueError for no rows, rows of no known or of different kinds, and for a served model (which needs no tokenizer)
    unless they are exact match.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("no rows to evaluate; give at least one")
    kinds = {"true": _multiple_choice, "answers": _exact_match, "text": _likelihood}
    found = [[kind for kind in kinds if kind in row] for row in rows]
    if len(found[0]) != 1 or any(kind != found[0] for kind in found):
        raise ValueError(
            f"rows must be all multiple choice (true, false, best), all exact match (answers) or all texts (text); "
            f"the first has the columns {sorted(rows[0])}"
        )
    kind = kinds[found[0][0]]
    if kind is not _exact_match:
        local(model, "multiple choice" if kind is _multiple_choice else "the likelihood of texts")
    samples = shared_out(rows, lambda part: kind(model, tokenizer, part, batch_size, progress))
    return {"metrics": _summary(samples), "samples": samples}


def measure(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    data: Mapping[str, Any],
    *,
    prompt: str = "prompt",
    batch_size: int = 64,
    progress: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """Samples of `evaluate` for every evaluation split of a LoFiT data set; texts of several kinds count as splits.

    ``prompt``: the column to use as the prompt; another one than "prompt" leaves out the splits without it.
    """
    measured = {}
    for split, rows in data.items():
        if split in ("train", "dev", "dev_eval") or (prompt != "prompt" and prompt not in rows.column_names):
            continue
        rows = [{**row, "prompt": row[prompt]} if prompt != "prompt" else row for row in rows]
        for kind in dict.fromkeys(row.get("kind", "") for row in rows):
            part = [row for row in rows if row.get("kind", "") == kind]
            name = f"{split}_{kind}" if kind else split
            measured[name] = evaluate(model, tokenizer, part, batch_size=batch_size, progress=progress)["samples"]
    return measured


def multiple_choice(best: float, true: Sequence[float], false: Sequence[float]) -> dict[str, float]:
    """MC1, MC2 and MC3 of one question from summed log-probabilities (nats) of its answers.

    MC1: 1 if the best answer beats every false one, strictly. MC2: the true answers' share of the probability of all
    listed answers, in log space, so that it is defined however unlikely they all are. MC3: the share of true answers
    that beat every false one. Answers listed twice count twice, as in the reference.
    Raises ValueError for an empty list, NaN, or where every answer has probability zero.
    """
    if not true or not false:
        raise ValueError(f"multiple choice needs true and false answers, got {len(true)} true and {len(false)} false")
    scores = np.array([best, *true, *false], dtype=np.float64)
    if np.isnan(scores).any() or np.isposinf(scores).any():
        raise ValueError(f"log-probabilities must be numbers below infinity, got {scores.tolist()}")
    highest = max(false)
    log_true, log_false = np.logaddexp.reduce(true), np.logaddexp.reduce(false)
    total = np.logaddexp(log_true, log_false)
    if np.isneginf(total):
        raise ValueError("every answer has probability zero; there is no share to compute")
    return {
        "mc1": float(best > highest),
        "mc2": float(np.exp(log_true - total)),
        "mc3": float(np.mean([score > highest for score in true])),
    }


def exact_match(text: str, answers: Sequence[str], stop: str) -> dict[str, Any]:
    """Whether generated ``text`` gives one of ``answers``: ``em``, ``em_strict``, and the ``prediction`` of ``em``.

    ``em``: cut at ``stop`` and at a newline, stripped, lower-cased. ``em_strict`` is the paper's code: for MQuAKE
    (``stop="\\n"``) what follows the last "A:", cut at ``stop`` and not stripped, so that " Oslo" is not "oslo"; for
    CLUTRR (``stop="."``) cut there only, and stripped.
    """
    if not answers or not stop:
        raise ValueError(f"exact match needs answers and a stop text, got {answers!r} and {stop!r}")
    prediction = text.split(stop)[0].split("\n")[0].strip().lower()
    if stop == "\n":
        strict = text.split("A:")[-1].split(stop)[0].lower()
    else:
        strict = text.split("'s\n")[0].split(stop)[0].strip().lower()  # their prompt ends in "'s" and a newline
    return {
        "em": float(prediction in {answer.strip().lower() for answer in answers}),
        "em_strict": float(strict in {answer.lower() for answer in answers}),
        "prediction": prediction,
    }


def head_overlap(selections: Sequence[Sequence[tuple[int, int]]], total_heads: int) -> dict[str, Any]:
    """How many (layer, head) pairs selections share, seed against seed.

    ``pairs``: the number shared by each two selections, in the order (0, 1), (0, 2), ..., (1, 2), ...; ``observed``:
    its mean; ``chance``: what random selections of the same sizes share on average, k * k / total.
    """
    sets = [{(int(layer), int(head)) for layer, head in selection} for selection in selections]
    if len(sets) < 2:
        raise ValueError(f"overlap needs at least two selections, got {len(sets)}")
    for number, (selection, chosen) in enumerate(zip(selections, sets, strict=True)):
        if len(chosen) != len(selection) or not 0 < len(chosen) <= total_heads:
            raise ValueError(
                f"selection {number} must hold 1 to {total_heads} different heads, got {len(selection)} of which "
                f"{len(chosen)} differ"
            )
    pairs = [len(a & b) for a, b in itertools.combinations(sets, 2)]
    chances = [len(a) * len(b) / total_heads for a, b in itertools.combinations(sets, 2)]
    return {"observed": sum(pairs) / len(pairs), "chance": sum(chances) / len(chances), "pairs": pairs}


def _multiple_choice(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], batch_size: int, progress: bool
) -> list[dict[str, Any]]:
    # An answer that is listed twice (the best one always is) is scored once.
    options = [list(dict.fromkeys([row["best"], *row["true"], *row["false"]])) for row in rows]
    prompts = [row["prompt"] for row in rows]
    scored = choice_logprobs(model, tokenizer, prompts, options, max_rows=batch_size, progress=progress)
    samples = []
    for row, texts, values in zip(rows, options, scored, strict=True):
        score = dict(zip(texts, values, strict=True))
        true, false = [score[text] for text in row["true"]], [score[text] for text in row["false"]]
        try:
            marks = multiple_choice(score[row["best"]], true, false)
        except ValueError as error:
            raise ValueError(f"row {row['id']!r}: {error}") from error
        samples.append(_sample(row) | {"best": score[row["best"]], "true": true, "false": false, "metrics": marks})
    return samples


def _exact_match(
    model: CausalLM | Endpoint,
    tokenizer: PreTrainedTokenizerBase | None,
    rows: Sequence[Row],
    batch_size: int,
    progress: bool,
) -> list[dict[str, Any]]:
    texts = generate(model, tokenizer, [row["prompt"] for row in rows], batch_size=batch_size, progress=progress)
    samples = []
    for row, text in zip(rows, texts, strict=True):
        marks = exact_match(text, row["answers"], row["stop"])
        prediction = marks.pop("prediction")
        if row.get("shortcut"):  # what a model scores that only repeats the edited object
            marks["em_shortcut"] = exact_match(row["shortcut"], row["answers"], row["stop"])["em"]
        samples.append(
            _sample(row) | {"text": text, "prediction": prediction, "answers": list(row["answers"]), "metrics": marks}
        )
    return samples


def _likelihood(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], batch_size: int, progress: bool
) -> list[dict[str, Any]]:
    return [
        _sample(row) | {"tokens": tokens, "metrics": {"nats_per_token": nats / tokens}}
        for row, (nats, tokens) in zip(rows, text_nats(model, tokenizer, rows, batch_size, progress), strict=True)
    ]


def _sample(row: Row) -> dict[str, Any]:
    return {"id": row["id"], "group": row.get("group", row["id"])}


def _summary(samples: Sequence[Mapping[str, Any]]) -> dict[str, Metric]:
    metrics: dict[str, Metric] = {}
    for name in dict.fromkeys(name for sample in samples for name in sample["metrics"]):
        having = [sample for sample in samples if name in sample["metrics"]]
        values = [sample["metrics"][name] for sample in having]
        groups = [sample["group"] for sample in having]
        if name == "nats_per_token":
            metrics |= perplexity(values, [sample["tokens"] for sample in having], groups)
        else:
            metrics[name] = metric(values, groups, share=True)
    return metrics
