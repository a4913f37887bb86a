"""Scores of the aTLAS row: exact match of completions, classification, likelihood of texts, disentanglement.

What is computed follows from the columns of the rows:

- ``task``, ``prompt``, ``completion`` (both texts, or both lists of messages): whether greedy decoding gives the
  completion, and its nats;
- ``text``: nats per token and perplexity.

Every row has an ``id``; ``group`` (default: the id) is the cluster of the bootstrap intervals.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from transformers import PreTrainedTokenizerBase

from ...endpoint import Endpoint
from ..choices import CausalLM, common_prefix, encode
from ..generation import continuation, local
from ..likelihood import TokenScores, perplexity, score_tokens, text_nats
from ..sharding import shared_out
from ..statistics import Evaluation, Metric, metric

Row = Mapping[str, Any]


def evaluate(
    model: CausalLM | Endpoint,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Row],
    *,
    batch_size: int = 64,
    progress: bool = False,
    eos: bool = False,
) -> Evaluation:
    """Score rows of one kind (see the module's text): metrics with intervals, and one sample a row, in their order.

    Completions: one forward pass over prompt and completion. Greedy decoding gives the completion exactly if each of
    its tokens is the most probable one after those before it. Samples: ``task``, ``correct``, ``nats``, ``tokens``,
    and where wrong ``prediction``, the most probable tokens after the true ones before them. Metrics: see `accuracy`.

    ``eos``: the completion must end there too: the end-of-text token that TRL trains behind a text, or the token that
    the chat template puts behind an answer.

    Deterministic; the model's mode is restored. Raises ValueError for no rows, rows of no known or of different kinds,
    a prompt or completion without a token of its own, and a served model.
    """
    model = local(model, "the likelihood of completions and texts")
    rows = list(rows)
    if not rows:
        raise ValueError("no rows to evaluate; give at least one")
    kinds = {"completion": ("task", "prompt", "completion"), "text": ("text",)}
    found = [[kind for kind, needed in kinds.items() if all(column in row for column in needed)] for row in rows]
    if len(found[0]) != 1 or any(kind != found[0] for kind in found):
        raise ValueError(
            f"rows must be all completions (task, prompt, completion) or all texts (text); the first has the columns "
            f"{sorted(rows[0])}"
        )
    if found[0] == ["text"]:
        scored = shared_out(rows, lambda part: text_nats(model, tokenizer, part, batch_size, progress))
        samples = [
            _sample(row) | {"tokens": tokens, "nats": nats} for row, (nats, tokens) in zip(rows, scored, strict=True)
        ]
        each = [sample["nats"] / sample["tokens"] for sample in samples]
        groups = [sample["group"] for sample in samples]
        return {"metrics": perplexity(each, [sample["tokens"] for sample in samples], groups), "samples": samples}
    samples = Completions(tokenizer, rows, eos).samples(model, batch_size, progress)
    return {"metrics": accuracy(samples), "samples": samples}


class Completions:
    """Rows with completions, tokenised once to be scored under many models; the processes of a job share them, and all
    must call what scores."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], eos: bool = False) -> None:
        self.tokenizer, self.rows = tokenizer, rows
        tokenized = _messages if isinstance(rows[0]["prompt"], list) else _texts
        prompts, self.whole = tokenized(tokenizer, rows, eos)
        # As TRL does: the completion begins where prompt and whole part, be it a token before the end of the prompt.
        self.starts = [common_prefix(prompt, ids) for prompt, ids in zip(prompts, self.whole, strict=True)]
        for row, start, ids in zip(rows, self.starts, self.whole, strict=True):
            if not 0 < start < len(ids):
                raise ValueError(
                    f"row {row['id']!r}: no token is left {'of' if start else 'in front of'} the completion "
                    f"{row['completion']!r} behind the prompt {row['prompt']!r}"
                )

    def means(self, model: CausalLM, batch_size: int = 64, progress: bool = False) -> tuple[float, float]:
        """The values of `accuracy` and `nats_per_token` of `evaluate`, without intervals: for choices on dev rows."""
        sizes, correct, nats = Counter(row["task"] for row in self.rows), 0.0, 0.0
        for row, start, ids, scores in self._scored(model, batch_size, progress):
            correct += (scores.greedy == list(ids[start:])) / sizes[row["task"]]
            nats += scores.nats
        tokens = sum(len(ids) - start for ids, start in zip(self.whole, self.starts, strict=True))
        return correct / len(sizes), nats / tokens

    def samples(self, model: CausalLM, batch_size: int = 64, progress: bool = False) -> list[dict[str, Any]]:
        """The samples of `evaluate`."""
        found = []
        for row, start, ids, scores in self._scored(model, batch_size, progress):
            correct = scores.greedy == list(ids[start:])
            sample = _sample(row) | {
                "task": row["task"], "correct": correct, "nats": scores.nats, "tokens": len(ids) - start
            }  # fmt: skip
            if not correct:
                sample["prediction"] = continuation(self.tokenizer, ids[:start], scores.greedy)
            found.append(sample)
        return found

    def _scored(
        self, model: CausalLM, batch_size: int, progress: bool
    ) -> Iterator[tuple[Row, int, list[int], TokenScores]]:
        def scores(places: Sequence[int]) -> list[TokenScores]:
            whole, starts = [self.whole[place] for place in places], [self.starts[place] for place in places]
            return list(score_tokens(model, whole, starts, batch_size=batch_size, progress=progress,
                                     unit="completion"))  # fmt: skip

        scored = shared_out(range(len(self.rows)), scores)
        return zip(self.rows, self.starts, self.whole, scored, strict=True)


def accuracy(samples: Sequence[Mapping[str, Any]]) -> dict[str, Metric]:
    """``accuracy`` (the mean of the tasks' means), ``accuracy/<task>`` and ``nats_per_token`` (over all tokens), with
    intervals, from samples with ``task``, ``group``, ``correct``, ``nats`` and ``tokens``."""
    sizes = Counter(sample["task"] for sample in samples)
    groups = [sample["group"] for sample in samples]
    correct = [float(sample["correct"]) for sample in samples]
    found = {"accuracy": metric(correct, groups, weights=[1 / sizes[s["task"]] for s in samples], share=True)}
    for task in sizes:
        places = [place for place, sample in enumerate(samples) if sample["task"] == task]
        own = [groups[place] for place in places]
        found[f"accuracy/{task}"] = metric([correct[place] for place in places], own, share=True)
    tokens = [sample["tokens"] for sample in samples]
    each = [sample["nats"] / sample["tokens"] for sample in samples]
    return found | {"nats_per_token": metric(each, groups, weights=tokens)}


def classify(rows: Iterable[Row], logits: ArrayLike) -> Evaluation:
    """Like `evaluate`, for a classifier: rows with ``id``, ``task`` and ``label`` (a column's number), and logits
    ``[rows, classes]``. A sample's ``prediction`` is its predicted label, where wrong; each label counts as a token.

    Raises ValueError for logits of another shape, NaN, and labels outside of the classes.
    """
    rows, scores = list(rows), np.asarray(logits, dtype=np.float64)
    if not rows or scores.ndim != 2 or len(scores) != len(rows) or np.isnan(scores).any():
        raise ValueError(f"{len(rows)} rows need logits [{len(rows)}, classes] without NaN, got shape {scores.shape}")
    samples = []
    for row, values in zip(rows, scores, strict=True):
        if not 0 <= row["label"] < len(values):
            raise ValueError(f"row {row['id']!r}: label {row['label']} of {len(values)} classes")
        best = int(values.argmax())
        nats = float(np.logaddexp.reduce(values) - values[row["label"]])
        sample = _sample(row) | {"task": row["task"], "correct": best == row["label"], "nats": nats, "tokens": 1}
        samples.append(sample if sample["correct"] else sample | {"prediction": best})
    return {"metrics": accuracy(samples), "samples": samples}


def predicted(samples: Sequence[Mapping[str, Any]]) -> list[Any]:
    """A label for what each sample's model says, for `disentanglement`: the prediction, or None for the right one."""
    return [None if sample["correct"] else sample["prediction"] for sample in samples]


def normalised(accuracies: Mapping[str, float], tuned: Mapping[str, float]) -> float:
    """The mean over tasks of accuracy relative to the model that was fine-tuned on the task."""
    if set(accuracies) != set(tuned) or not tuned or not all(tuned.values()):
        raise ValueError(
            f"normalised accuracy needs the same tasks twice, fine-tuned ones above 0; got {dict(accuracies)} and "
            f"{dict(tuned)}"
        )
    return sum(accuracies[task] / tuned[task] for task in tuned) / len(tuned)


def disentanglement(predictions: Sequence[Sequence[Sequence[Any]]]) -> dict[str, Any]:
    """How much the vectors disturb each other: the share of a task's rows whose label changes.

    Disentanglement error as in the paper (Zhang et al. 2024, arXiv 2407.02880) is taken at the learned coefficients:
    ``predictions[i][j]`` are labels on the rows of task i under vectors i and j together, ``predictions[i][i]`` under
    vector i alone. Returns ``matrix`` ``[n, n]``, where ``[i][j]`` is the
    share that changes as vector j joins vector i (0 on the diagonal), and ``error``, its mean over ordered pairs.
    """
    count = len(predictions)
    if count < 2 or any(len(row) != count for row in predictions):
        raise ValueError(f"predictions must be [n][n], n at least 2, got {[len(row) for row in predictions]}")
    matrix = np.zeros((count, count))
    for i, row in enumerate(predictions):
        for j, labels in enumerate(row):
            if len(labels) != len(row[i]) or not len(labels):
                raise ValueError(
                    f"predictions[{i}][{j}] has {len(labels)} labels, predictions[{i}][{i}] {len(row[i])}"
                )
            matrix[i, j] = np.mean([one != other for one, other in zip(labels, row[i], strict=True)])
    return {"matrix": matrix.tolist(), "error": float(matrix.sum() / (count * (count - 1)))}


def _texts(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], eos: bool
) -> tuple[list[list[int]], list[list[int]]]:
    prompts = encode(tokenizer, [row["prompt"] for row in rows])
    whole = encode(tokenizer, [row["prompt"] + row["completion"] for row in rows])
    end = tokenizer.eos_token_id
    if eos and end is None:
        raise ValueError("eos=True, but the tokenizer has no end-of-text token")
    return prompts, [ids if not eos or ids[-1] == end else [*ids, end] for ids in whole]


def _messages(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], eos: bool
) -> tuple[list[list[int]], list[list[int]]]:
    """Rendered as TRL does. What the template puts behind an answer is markup: at most its first token is scored."""

    def render(messages: Any, **options: bool) -> Any:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)

    prompts, whole = [], []
    for row in rows:
        prompts.append(render(row["prompt"], add_generation_prompt=True))
        said = [*row["prompt"], *row["completion"]]
        ids, content = render(said), render(said, continue_final_message=True)
        whole.append(ids[: common_prefix(ids, content) + eos])
    return prompts, whole


def _sample(row: Row) -> dict[str, Any]:
    return {"id": row["id"], "group": row.get("group", row["id"])}
