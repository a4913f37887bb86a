"""The edit itself, wrapped around one attention output projection."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import LofitConfig


class _AddL1(torch.autograd.Function):
    """Identity on `x` whose backward adds `coefficient * sign(scale)` to the gradient of `scale`.

    The penalty is not a term of the loss because then it would be counted once per micro-batch, show in the eval loss,
    and crash under ZeRO-3, where `scale` is whole only inside this layer's own forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, coefficient: float) -> torch.Tensor:
        ctx.save_for_backward(scale)
        ctx.coefficient = coefficient
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (scale,) = ctx.saved_tensors
        return grads[0], ctx.coefficient * scale.sign(), None  # sign(0) = 0


class LofitLayer(nn.Module, BaseTunerLayer):
    """An output projection whose input is edited on selected heads: `y = W ((1 + scale) * z + offset) + b`.

    `lofit_scale[adapter]` and `lofit_offset[adapter]` are fp32, `[selected heads of this layer, head_dim]`, rows in
    head order. Several active adapters act like merging them one after the other: the last one edits `z` first.

    Args:
        base_layer: `nn.Linear` (bitsandbytes' included) or GPT-2's `Conv1D`, or another tuner's layer around one.
        head_dim: numbers per head. The projection's input width must be a multiple of it.
    """

    adapter_layer_names = ("lofit_scale", "lofit_offset")
    get_base_layer: Callable[[], Any]  # from BaseTunerLayer
    set_adapter: Callable[..., None]
    active_adapters: list[str]

    def __init__(self, base_layer: nn.Module, head_dim: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lofit_scale = nn.ParameterDict()
        self.lofit_offset = nn.ParameterDict()
        self.selected: dict[str, tuple[int, ...]] = {}
        self.head_dim = head_dim
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._before_merge: list[tuple[torch.Tensor | None, torch.Tensor | None]] = []
        self._columns: dict[tuple[str, torch.device], torch.Tensor] = {}
        # Set by the trainer for each micro-batch (l1_lambda / accumulation steps); what it costs is read back from l1.
        self.l1_coefficient = 0.0
        self.l1: torch.Tensor | None = None

        self.in_features: int
        self.out_features: int
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        if self.in_features % head_dim != 0:
            raise ValueError(f"the projection takes {self.in_features} numbers, not a multiple of head_dim={head_dim}")
        self.num_heads = self.in_features // head_dim

    def update_layer(self, adapter_name: str, config: LofitConfig, heads: Sequence[int], inference_mode: bool) -> None:
        """Add an adapter editing `heads` (indices within this layer)."""
        device = self.get_base_layer().weight.device
        self.selected[adapter_name] = tuple(sorted(heads))
        shape = (len(heads), self.head_dim)
        for wanted, parameters in (("scale", self.lofit_scale), ("offset", self.lofit_offset)):
            if config.component in (wanted, "both"):
                # fp32 even on a bf16 base: there 1 + A equals 1 for |A| < 0.002, so small scales would do nothing.
                parameters[adapter_name] = nn.Parameter(torch.zeros(shape, dtype=torch.float32))
                if parameters[adapter_name].device.type != "meta":
                    if config.init_std > 0:
                        nn.init.normal_(parameters[adapter_name], std=config.init_std)
                    if device.type != "meta":
                        parameters[adapter_name].data = parameters[adapter_name].data.to(device)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.selected.pop(adapter_name, None)
        self._columns = {key: columns for key, columns in self._columns.items() if key[0] != adapter_name}

    def full_vector(self, adapter_name: str, rows: torch.Tensor) -> torch.Tensor:
        """`[selected heads, head_dim]` spread to the projection's whole input width, zero elsewhere."""
        if len(self.selected[adapter_name]) == self.num_heads:
            return rows.reshape(-1)
        columns = self._selected_columns(adapter_name, rows.device)
        return rows.new_zeros(self.in_features).index_copy(0, columns, rows.reshape(-1))

    def _selected_columns(self, adapter_name: str, device: torch.device) -> torch.Tensor:
        key = (adapter_name, device)
        if key not in self._columns:
            heads = torch.tensor(self.selected[adapter_name], device=device)
            columns = heads[:, None] * self.head_dim + torch.arange(self.head_dim, device=device)
            self._columns[key] = columns.reshape(-1)
        return self._columns[key]

    def edit(self, z: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """`(1 + scale) * z + offset` for one adapter, computed in at least fp32; `z` is `[..., in_features]`."""
        if adapter_name in self.lofit_scale:
            scale = self.lofit_scale[adapter_name]
            if self.l1_coefficient > 0 and torch.is_grad_enabled() and scale.requires_grad:
                z = _AddL1.apply(z, scale, self.l1_coefficient)
                self.l1 = scale.detach().abs().sum()
            factor = 1 + self.full_vector(adapter_name, scale)
            if adapter_name in self.lofit_offset:
                offset = self.full_vector(adapter_name, self.lofit_offset[adapter_name])
                return torch.addcmul(offset, z, factor) if z.dtype == offset.dtype else z * factor + offset
            return z * factor
        if adapter_name in self.lofit_offset:
            return z + self.full_vector(adapter_name, self.lofit_offset[adapter_name])
        return z

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
        elif not self.merged:
            dtype = x.dtype
            for adapter_name in reversed(self.active_adapters):
                x = self.edit(x, adapter_name)
            x = x.to(dtype)
        return self.base_layer(x, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the projection: `W <- W diag(1 + scale)`, `b <- b + W offset` (W before scaling).

        A projection without a bias gets one. Weights are rounded once, from fp32, and kept for an exact `unmerge`.

        Raises:
            ValueError: a scale on a quantised weight or around another tuner's layer; with `safe_merge`, a result
                that is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.selected:
                continue
            base = self.get_base_layer()
            weight, bias = self._merged_tensors(name, base)
            if safe_merge:
                for tensor in (weight, bias):
                    if tensor is not None and not torch.isfinite(tensor).all():
                        raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self._before_merge.append(
                (base.weight.data if weight is not None else None, base.bias.data if base.bias is not None else None)
            )
            if weight is not None:
                base.weight.data = weight
            if bias is not None and base.bias is not None:
                base.bias.data = bias
            elif bias is not None:
                base.bias = nn.Parameter(bias, requires_grad=False)
            self.merged_adapters.append(name)

    def _merged_tensors(self, name: str, base: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """New weight and new bias (None: unchanged) after folding `name` into the projection as it stands."""
        foreign = type(self.base_layer) is not type(base)
        quantised = not base.weight.dtype.is_floating_point
        weight, bias = None, None
        if name in self.lofit_offset:
            offset = self.full_vector(name, self.lofit_offset[name].detach()).float()
            if foreign or quantised:
                # Through the layer itself: it knows its quantisation, or the other tuner's change of the weight.
                probe = torch.stack([offset, torch.zeros_like(offset)])
                outputs = self.base_layer(probe.to(self._compute_dtype(base))).float()
                delta = outputs[0] - outputs[1]
            else:
                delta = (offset @ base.weight.float()) if isinstance(base, Conv1D) else base.weight.float() @ offset
            old = torch.zeros_like(delta) if base.bias is None else base.bias.data.float()
            dtype = self._compute_dtype(base) if base.bias is None else base.bias.dtype
            bias = (old + delta).to(dtype)
        if name in self.lofit_scale:
            if quantised:
                raise ValueError(
                    f"adapter {name!r} has scales, which cannot be folded into a {type(base).__name__} weight: its "
                    "quantised columns would have to be rounded again. Load the base unquantised to merge, or keep "
                    "the adapter unmerged; offsets alone do merge."
                )
            if foreign:
                raise ValueError(
                    f"adapter {name!r} has scales and shares its projection with another tuner "
                    f"({type(self.base_layer).__name__}), whose weights would have to be scaled too. Merge that first."
                )
            factor = 1 + self.full_vector(name, self.lofit_scale[name].detach()).float()
            columns = factor[:, None] if isinstance(base, Conv1D) else factor  # Conv1D stores [in, out]
            weight = (base.weight.data.float() * columns).to(base.weight.dtype)
        return weight, bias

    @staticmethod
    def _compute_dtype(base: Any) -> torch.dtype:
        if base.weight.dtype.is_floating_point:
            return base.weight.dtype
        # bitsandbytes: Linear4bit computes in compute_dtype; Linear8bitLt casts to fp16 and back, so fp32 is safe.
        return getattr(base, "compute_dtype", None) or torch.float32

    def unmerge(self) -> None:
        """Put back the weights and biases that were there before, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        while self.merged_adapters:
            self.merged_adapters.pop()
            weight, bias = self._before_merge.pop()
            if weight is not None:
                base.weight.data = weight
            if bias is not None:
                base.bias.data = bias
            else:
                base.bias = None

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, num_heads={self.num_heads}, selected={self.selected}"


def head_norms(layer: LofitLayer, rows: torch.Tensor, adapter_name: str) -> list[float]:
    """2-norm of each head's row of `rows` `[selected, head_dim]`; `-inf` for heads without a row."""
    norms = [-math.inf] * layer.num_heads
    for head, norm in zip(layer.selected[adapter_name], rows.detach().float().norm(dim=-1).tolist(), strict=True):
        norms[head] = norm
    return norms
