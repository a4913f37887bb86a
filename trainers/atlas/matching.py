"""Which of a model's parameters a task vector changes: by name, tied ones once, and anything else refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..fingerprint import model_fingerprint, once, tensors_fingerprint

if TYPE_CHECKING:
    from .task_vector import TaskVector


def matched(vector: TaskVector, model: nn.Module, fingerprint: str | None = None) -> dict[str, nn.Parameter]:
    """The model's parameters that the vector changes, by the vector's names; tied ones once, in the model's order.

    Args:
        fingerprint: the model's, if it is known already.

    Raises:
        ValueError: quantised parameters, another base, names the model does not have, other shapes, or tied tensors
            that differ; with lists.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    odd = [name for name in vector.shapes if name in parameters and not parameters[name].is_floating_point()]
    if odd:
        raise ValueError(
            f"{listed(odd)}: quantised weights, into which nothing can be composed; load the base in 16 or 32 bits, "
            "or give LoRA vectors to LowRankComposer"
        )
    found = fingerprint or (model_fingerprint(model) if vector.base is not None else None)
    # A vector made from state dicts is named by the buffers in them too.
    if vector.base not in (None, found) and vector.base != tensors_fingerprint(once(model.state_dict())):
        raise ValueError(
            f"the task vector {vector.source or vector!r} was made from the base {vector.base}, but this model is "
            f"{found}; extract it again from the checkpoint that was fine-tuned and this base"
        )
    buffers = {name for name, _ in model.named_buffers()}
    wanted = {name: shape for name, shape in vector.shapes.items() if name not in buffers}
    there = {name: parameters[name].shape for name in wanted if name in parameters}
    check_same(there, wanted, "the model", vector.source or "the task vector")
    changed: dict[str, nn.Parameter] = {}
    first: dict[int, str] = {}
    for name, parameter in parameters.items():
        if name not in wanted:
            continue
        twin = first.setdefault(id(parameter), name)
        if twin == name:
            changed[name] = parameter
        elif not torch.equal(vector.dense(twin), vector.dense(name)):
            raise ValueError(
                f"{twin} and {name} are one tensor in this model, but the task vector {vector.source} changes them "
                "differently: it comes from a model in which they are not tied"
            )
    return changed


def check_same(left: Mapping[str, torch.Size], right: Mapping[str, torch.Size], one: str, other: str) -> None:
    """ValueError that lists (the first five of each) missing names and differing shapes of two sets of tensors."""
    lines = []
    for missing, owner in ((sorted(right.keys() - left.keys()), one), (sorted(left.keys() - right.keys()), other)):
        if missing:
            lines.append(f"{owner} has no {listed(missing)}")
    shapes = [
        f"{name} {list(left[name])} and {list(right[name])}"
        for name in sorted(left.keys() & right.keys())
        if left[name] != right[name]
    ]
    if shapes:
        lines.append(f"shapes differ ({one}, {other}): {listed(shapes)}")
        if any("embed" in line or "lm_head" in line or "wte" in line for line in shapes):
            lines.append("the vocabularies differ: give both models the same one, or leave these tensors out")
    if lines:
        raise ValueError("; ".join(lines))


def listed(items: Sequence[str]) -> str:
    """The first five, and how many more."""
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
