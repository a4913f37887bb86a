"""Exact match by length, where it breaks down, and how: scores of the task hinting row.

For a target without choice, greedy decoding gives it exactly if each of its tokens is the most probable one after the
true ones before it: one forward pass over the whole row stands for as many as it has targets (`teacher_forced`).
`generated` decodes step by step, as a user would.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from ..choices import CausalLM, evaluating, model_device
from ..statistics import Metric, metric

EOS = 1
ERRORS = ("first token", "stopped repeating", "repeated too long", "wrong next", "end", "format")  # the last: of texts
Sample = dict[str, Any]
Telling = Callable[[Tensor], AbstractContextManager[None]]  # tells the model the items of a batch's problems


class Rows(Protocol):
    """Rows of tokens, padded at their ends, as `data_builders.task_hinting.test_sets` makes them."""

    ids: Any  # [rows, width]
    targets: Any  # which carry loss, bool [rows, width]
    lengths: Any  # items of the problem [rows]
    questions: Any  # tokens of the question, at the start [rows]


def teacher_forced(model: CausalLM, rows: Rows, batch_size: int = 256, telling: Telling | None = None) -> list[Sample]:
    """A sample a row, in their order: `group` (a hash of its question), `metrics` with `em` (1 or 0) and `tokens`
    (share of target tokens that are the most probable ones) and, where wrong, `error`, the kind of the first wrong
    token (see `error_kind`), and `place`, its number among the targets.

    Deterministic; the model's mode is restored.
    """
    samples: list[Sample] = []
    for ids, targets, questions, best in _passes(model, rows, batch_size, telling):
        for row, seen, question, guess in zip(ids.tolist(), targets.tolist(), questions, best, strict=True):
            places = [place for place, target in enumerate(seen) if target]
            right = [guess[place - 1] == row[place] for place in places]
            name = f"{crc32(' '.join(map(str, row[:question])).encode()):08x}"
            found = {"em": float(all(right)), "tokens": sum(right) / len(right)}
            sample: Sample = {"group": name, "metrics": found}
            if not all(right):
                first = right.index(False)
                place = places[first]
                sample["error"] = error_kind(row[place - 1], row[place], guess[place - 1], first == 0)
                sample["place"] = first
            samples.append(sample)
    return samples


def error_kind(before: Hashable, wanted: Hashable, got: Hashable, first: bool) -> str:
    """Which of `ERRORS` a wrong token is: `before` it stands the last true token, `got` instead of `wanted`; `EOS` is
    the end."""
    if first:
        return "first token"
    if wanted == before:
        return "stopped repeating"
    if got == before:
        return "repeated too long"
    return "end" if EOS in (wanted, got) else "wrong next"


def generated(model: CausalLM, rows: Rows, batch_size: int = 256, telling: Telling | None = None) -> list[Sample]:
    """`em` of each row by greedy decoding of `generate`, from the tokens before the first target on.

    Only for rows whose targets are one stretch up to the end. A row is right if it gives its targets and nothing else;
    without its EOS in the tokens allowed (the targets' number) it is wrong.
    """
    ids, targets = (torch.as_tensor(part) for part in (rows.ids, rows.targets))
    first = targets.int().argmax(1)
    device = model_device(model)
    run: Any = model.generate
    samples: list[Sample] = []
    with evaluating(model):
        for start in range(0, len(ids), batch_size):
            part = slice(start, start + batch_size)
            prompts = [row[:place].tolist() for row, place in zip(ids[part], first[part].tolist(), strict=True)]
            answers = [row[seen].tolist() for row, seen in zip(ids[part], targets[part], strict=True)]
            width, longest = max(map(len, prompts)), max(map(len, answers))
            batch = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
            config = GenerationConfig(max_new_tokens=longest, do_sample=False, eos_token_id=EOS, pad_token_id=0)
            with told(telling, torch.as_tensor(rows.lengths)[part]):
                found = run(input_ids=batch, attention_mask=mask, generation_config=config)[:, width:].tolist()
            for tokens, answer in zip(found, answers, strict=True):
                said = tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens
                samples.append({"metrics": {"em": float(said == answer)}})
    return samples


def by_length(samples: Mapping[int, Sequence[Sample]]) -> dict[str, Metric]:
    """`em/N` and `tokens/N` of each length N, with intervals over questions."""
    found = {}
    for length, scored in samples.items():
        groups = [sample["group"] for sample in scored]
        for name in ("em", "tokens"):
            found[f"{name}/{length}"] = metric([sample["metrics"][name] for sample in scored], groups, share=True)
    return found


def falls_under(curve: Mapping[int, float], level: float) -> int | None:
    """The first length (in ascending order) whose exact match is under `level`; None: none of those tested."""
    return next((length for length in sorted(curve) if curve[length] < level), None)


def area(curve: Mapping[int, float]) -> float:
    """Mean exact match over the lengths from the shortest to the longest tested, on lines between them."""
    lengths = sorted(curve)
    if len(lengths) < 2:
        raise ValueError(f"an area needs at least two lengths, got {lengths}")
    values = [curve[length] for length in lengths]
    return float(np.trapezoid(values, lengths) / (lengths[-1] - lengths[0]))


def error_shares(samples: Sequence[Sample]) -> dict[str, float]:
    """Of all rows, the share that is wrong in each way."""
    counts = Counter(sample["error"] for sample in samples if "error" in sample)
    return {kind: counts[kind] / len(samples) for kind in ERRORS}


def told(telling: Telling | None, lengths: Tensor) -> AbstractContextManager[None]:
    """What tells the model the items of the problems, or nothing."""
    return nullcontext() if telling is None else telling(lengths)


def _passes(
    model: CausalLM, rows: Rows, batch_size: int, telling: Telling | None
) -> Iterator[tuple[Tensor, Tensor, list[int], list[list[int]]]]:
    """Batches: ids, targets, questions, and after each place the most probable token."""
    ids, targets, lengths = (torch.as_tensor(part) for part in (rows.ids, rows.targets, rows.lengths))
    device = model_device(model)
    with evaluating(model):
        for start in range(0, len(ids), batch_size):
            part = slice(start, start + batch_size)
            with told(telling, lengths[part]):
                logits = model(input_ids=ids[part].to(device), use_cache=False).logits
            yield ids[part], targets[part], torch.as_tensor(rows.questions)[part].tolist(), logits.argmax(-1).tolist()
