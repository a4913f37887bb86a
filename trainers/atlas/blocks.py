"""How a model's parameters are cut into blocks, each with one coefficient per task vector (spec 1.2 and 4.3)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

# What one block is. "tensor" is the paper's; "isotropic" one block for the whole model.
BLOCKS = ("tensor", "matrices", "module", "layer", "fused_qkv", "isotropic")
_QKV = re.compile(r"^(.*)\.(?:[qkv]_proj|query|key|value)\.(weight|bias)$")


def split_blocks(
    model: nn.Module,
    names: Iterable[str],
    blocks: str,
    include: Sequence[str] = (),
    exclude: Sequence[str] | None = None,
) -> dict[str, list[str]]:
    """Block name -> the names of its parameters, in the model's order.

    Args:
        names: parameters that the task vectors change; the others are in no block.
        blocks: "tensor" (each parameter), "matrices" (each with two dimensions or more; the others stay as they are),
            "module" (weight and bias of a module together), "layer" (a decoder layer together; what is outside of the
            layers by module), "fused_qkv" (as "tensor", with a layer's query, key and value weights together, and
            their biases), "isotropic" (all together).
        include, exclude: regular expressions (one or several), searched in parameter names. `exclude=None` leaves out
            what `default_exclude` names; `()` leaves out nothing.

    Raises:
        ValueError: an unknown kind of block, a pattern that matches nothing, or no parameter left.
    """
    if blocks not in BLOCKS:
        raise ValueError(f"unknown blocks {blocks!r}; known: {', '.join(BLOCKS)}")
    wanted = set(names)
    include, exclude = _patterns(include), None if exclude is None else _patterns(exclude)
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in wanted}
    for pattern in (*include, *(exclude or ())):
        if not any(re.search(pattern, name) for name in parameters):
            raise ValueError(
                f"the pattern {pattern!r} matches no parameter that the task vectors change; they are called like "
                f"{next(iter(parameters), 'nothing: there is none')}"
            )
    left_out = set(default_exclude(model)) if exclude is None else set()
    cut: dict[str, list[str]] = {}
    for name, parameter in parameters.items():
        if name in left_out or any(re.search(pattern, name) for pattern in exclude or ()):
            continue
        if include and not any(re.search(pattern, name) for pattern in include):
            continue
        if blocks == "matrices" and parameter.dim() < 2:
            continue
        cut.setdefault(_block_of(name, blocks), []).append(name)
    if not cut:
        raise ValueError(f"no parameter is left to compose (blocks={blocks!r}, include={include}, exclude={exclude})")
    return cut


def default_exclude(model: nn.Module) -> list[str]:
    """Parameters that are left out unless asked for: a language model's embeddings and head (15 to 28 % of the bytes
    of a small one, for one degree of freedom), and of a two-tower CLIP all but the image tower."""
    by_identity = {id(parameter): name for name, parameter in model.named_parameters()}
    if hasattr(model, "vision_model") and hasattr(model, "text_model"):  # CLIPModel and its kin
        image = ("vision_model.", "visual_projection.")
        return [name for name in by_identity.values() if not name.startswith(image)]
    heads: Any = model  # transformers' models have these methods; other modules have no head to leave out
    head = heads.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return []
    modules = [head, heads.get_input_embeddings()]
    return list(dict.fromkeys(by_identity[id(p)] for module in modules for p in module.parameters()))


def _patterns(given: Sequence[str]) -> tuple[str, ...]:
    patterns = (given,) if isinstance(given, str) else tuple(given)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression ({error})") from error
    return patterns


def _block_of(name: str, blocks: str) -> str:
    if blocks == "isotropic":
        return "all"
    module, _, _ = name.rpartition(".")
    if blocks == "module":
        return module or name
    if blocks == "layer":
        layer = re.match(r"(.*?\.\d+)\.", name)
        return layer.group(1) if layer else module or name
    fused = _QKV.match(name) if blocks == "fused_qkv" else None
    return f"{fused.group(1)}.qkv.{fused.group(2)}" if fused else name
