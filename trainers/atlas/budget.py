"""New tasks from few rows with a few of the task vectors, chosen in four ways (paper, section 5.1; spec 2.5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .bench import Arm, Bench
from .selection import blockwise_vectors, gradient_scores, random_vectors, vectors_by_feature, vectors_by_gradient
from .task_vector import TaskVector

CHOICES = ("random", "feature", "gradient", "blockwise")


def budget(bench: Bench) -> Iterator[Arm]:
    """aTLAS on each new task with `budgets` vectors, from as many rows as the largest of `shots`."""
    a = bench.arguments
    for task in bench.new:
        rows = bench.first(bench.tasks(bench.fit, [task]), max(a.shots))
        for choice in CHOICES:
            for size in a.budgets:
                if not bench.wanted("budget", choice, task, size):
                    continue
                picked = pick(bench, rows, choice, size)
                low_rank = picked if bench.lora_vectors is bench.vectors else {}
                left = replace(bench, vectors=picked, lora_vectors=low_rank)
                yield from left.learned("budget", choice, rows, task, size, **a.few())


def pick(bench: Bench, rows: Dataset, choice: str, size: int) -> dict[str, TaskVector]:
    """`size` of the bench's vectors for the task of `rows`. ValueError for a vector whose task has no rows, where
    "feature" needs them."""
    names, vectors = list(bench.vectors), list(bench.vectors.values())
    if choice == "random":
        chosen = random_vectors(len(vectors), size, bench.args.seed)
    elif choice == "feature":
        chosen = vectors_by_feature(
            torch.stack([_feature_of(bench, name) for name in names]), _feature(bench, rows), size
        )
    else:
        blocks = bench.arguments.blocks
        losses = (_model(bench, batch, labels=True).loss for batch in _batches(bench, rows))
        scores, cut = gradient_scores(bench.base, vectors, losses, blocks, bench.arguments.exclude)
        if choice == "blockwise":
            ranks = blockwise_vectors(vectors, scores, cut, size)
            return {f"rank {number}": vector for number, vector in enumerate(ranks, 1)}
        chosen = vectors_by_gradient(scores, size)
    return {names[number]: vectors[number] for number in chosen}


def _feature_of(bench: Bench, name: str) -> Tensor:
    rows = bench.tasks(bench.fit, [name])
    if not len(rows):
        raise ValueError(
            f"--arms feature compares tasks, but no task is called like the vector {name!r}; leave it out"
        )
    return _feature(bench, rows)


@torch.no_grad()
def _feature(bench: Bench, rows: Dataset) -> Tensor:
    """[d], the mean over rows of the base's last hidden state before the completion."""
    found = []
    for batch in _batches(bench, rows):
        hidden = _model(bench, batch, output_hidden_states=True).hidden_states[-1]
        last = (batch["labels"] != -100).int().argmax(1) - 1
        found.append(hidden[torch.arange(len(last)), last].double())
    return torch.cat(found).mean(0)


def _model(bench: Bench, batch: dict[str, Tensor], labels: bool = False, **options: Any) -> Any:
    given = {key: value for key, value in batch.items() if labels or key != "labels"}
    return bench.base(**given, use_cache=False, **options)


def _batches(bench: Bench, rows: Dataset) -> Iterator[dict[str, Tensor]]:
    """Tokenised rows as padded tensors, in their order."""
    device, size = next(bench.base.parameters()).device, bench.args.per_device_train_batch_size

    def padded(lists: Sequence[list[int]], value: int) -> Tensor:
        return pad_sequence([torch.tensor(ids) for ids in lists], True, value).to(device)

    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        labels = padded(part["labels"], -100)
        if not bench.args.train_eos:
            labels = labels.masked_fill(labels == bench.tokenizer.eos_token_id, -100)
        mask = padded([[1] * len(ids) for ids in part["input_ids"]], 0)
        yield {"input_ids": padded(part["input_ids"], 0), "attention_mask": mask, "labels": labels}
