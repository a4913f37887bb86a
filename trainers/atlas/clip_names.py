"""open_clip's image tower and that of transformers' CLIPModel: the same tensors under other names (spec, P19).

The one fused `in_proj` of open_clip is query, key and value here, in this order; its `proj` is our projection
transposed. OpenAI's weights need `quick_gelu` in both. With `blocks="fused_qkv"` a composer has open_clip's blocks.

The authors' checkpoints are pickled modules, which we never load. In an environment of one's own, where they are
trusted, safetensors' `save_file({k: v.contiguous() for k, v in encoder.state_dict().items()}, "cars.safetensors")`
turns one into a file that can be given as a task vector's source.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_WHOLE = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "ln_post.weight": "vision_model.post_layernorm.weight",
    "ln_post.bias": "vision_model.post_layernorm.bias",
}
_IN_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)$")
_TOWER = re.compile(r"^(?:model\.)?visual\.")


def is_open_clip(names: Iterable[str]) -> bool:
    """Whether these are the names of an open_clip model, or of one inside the authors' `ImageEncoder`."""
    return any(_TOWER.match(name) for name in names)


def names_of(name: str) -> list[str]:
    """Our names of one open_clip tensor, given without `visual.`: three for a fused `in_proj`, else one.

    Raises ValueError for a name that a CLIP vision transformer does not have.
    """
    if name == "proj":
        return ["visual_projection.weight"]
    if name in _WHOLE:
        return [_WHOLE[name]]
    found = _LAYER.match(name)
    if found:
        layer, part, kind = found.groups()
        start = f"vision_model.encoder.layers.{layer}"
        if part == "attn.in_proj":
            return [f"{start}.self_attn.{one}_proj.{kind}" for one in "qkv"]
        if part in _IN_LAYER:
            return [f"{start}.{_IN_LAYER[part]}.{kind}"]
    raise ValueError(f"visual.{name} is no tensor of a CLIP vision transformer (ResNets are not supported)")


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image tower of an open_clip state dict under our names; everything outside of `visual.` is left out."""
    found = {}
    for name, tensor in tensors.items():
        if not _TOWER.match(name):
            continue
        ours = names_of(_TOWER.sub("", name))
        if ours == ["visual_projection.weight"]:
            tensor = tensor.T
        for one, piece in zip(ours, tensor.chunk(len(ours)), strict=True):
            found[one] = piece.contiguous()
    return found


def to_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_open_clip`, of parameters of a CLIPModel (or a vector over them)."""
    layers = {
        int(match[1]) for name in tensors if (match := re.match(r"vision_model\.encoder\.layers\.(\d+)\.", name))
    }
    theirs = [*_WHOLE, "proj"]
    theirs += [
        f"transformer.resblocks.{layer}.{part}{kind}"
        for layer in sorted(layers)
        for part in (*(f"{one}." for one in _IN_LAYER), "attn.in_proj_")
        for kind in ("weight", "bias")
    ]
    found = {}
    for name in theirs:
        ours = names_of(name)
        if all(one in tensors for one in ours):
            whole = torch.cat([tensors[one] for one in ours])
            found[f"visual.{name}"] = whole.T.contiguous() if name == "proj" else whole
    return found
