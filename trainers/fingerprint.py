"""A short name for the exact weights of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

SAMPLES = 1024


def model_fingerprint(model: nn.Module) -> str:
    """16 hex digits that change with any tensor's name, shape or (sampled) values.

    At most 1,024 evenly spaced values of every tensor enter, rounded to bf16, so a base loaded in fp32 and in bf16
    has one fingerprint and an 8B model takes about a second. A quantised copy has another. Adapter parameters and
    what PEFT adds to names are left out: the fingerprint of an adapted model is its base's.
    """
    return tensors_fingerprint(dict(model.named_parameters()))


def checkpoint_fingerprint(model: nn.Module) -> str:
    """As `model_fingerprint`, but of an adapted model with what its adapters hold: another adapter, another name."""
    adapters = {name: value for name, value in model.named_parameters() if _of_adapter(name)}
    base = model_fingerprint(model)
    if not adapters:
        return base
    digest = hashlib.sha256(base.encode())
    for name in sorted(adapters):
        digest.update(sampled(name, adapters[name]))
    return digest.hexdigest()[:16]


def _of_adapter(name: str) -> bool:
    return any(part.startswith(("lofit_", "lora_", "ia3_", "beft_")) for part in name.split("."))


def tensors_fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """The fingerprint of the model with these parameters; a lazy mapping is read one tensor at a time."""
    digest = hashlib.sha256()
    names = {}
    for name in tensors:
        parts = name.split(".")
        if not _of_adapter(name):
            # wrapped: base_model.model.model.layers.0...o_proj.base_layer.weight; bare: model.layers.0...o_proj.weight
            names[".".join(part for part in parts if part not in ("base_layer", "base_model", "model"))] = name
    for name in sorted(names):
        digest.update(sampled(name, tensors[names[name]]))
    return digest.hexdigest()[:16]


def once(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The floating-point tensors of a `state_dict()`, of tied ones the first."""
    seen: dict[tuple, tuple[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            seen.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device), (name, tensor))
    return dict(seen.values())


def sampled(name: str, tensor: torch.Tensor) -> bytes:
    """Name, shape and sampled values of one tensor."""
    flat = tensor.detach().reshape(-1)
    count = min(SAMPLES, flat.numel())
    # In integers: fp32 `linspace` rounds the last index of an 8B model's embedding out of range.
    picked = flat[torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(1, count - 1)]
    values = picked.to("cpu", torch.bfloat16 if picked.is_floating_point() else torch.int64)
    return f"{name} {tuple(tensor.shape)}".encode() + values.contiguous().view(torch.uint8).numpy().tobytes()
