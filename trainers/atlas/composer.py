"""Exact composition of task vectors with learned coefficients and no autograd graph through the weights (spec 5.2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from .blocks import split_blocks
from .partition import partition_indices
from .sources import Resident, Stream
from .task_vector import Entry, TaskVector, matched

TILE = 1 << 20  # elements of a piece where types are converted, partitions drawn or files read


@dataclass
class _Slot:
    """One composed parameter: its values at the base, and where it lies."""

    name: str
    block: int
    parameter: nn.Parameter
    base: Tensor  # flat, the part that this process holds
    start: int = 0  # of that part in the whole tensor


class Composer:
    """`weight_j = base_j + sum_i coefficients[i, j] * vector_i,j` in a model, with gradients for `coefficients` alone.

    The composed weights are written into the model's own parameters. During an ordinary `loss.backward()` a hook on
    each of them contracts its gradient with the vectors, `d loss / d coefficients[i, j] = <G_j, vector_i,j>`, adds the
    result to `coefficients.grad`, and frees the gradient: at most one weight gradient is alive at a time.

        composer = Composer(model, vectors)
        optimizer = torch.optim.AdamW([composer.coefficients], lr=0.1)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            composer.compose()  # after every change of the coefficients

    Args:
        model: any module; parameters that are not composed are frozen.
        task_vectors: `TaskVector`s (or plain mappings) over this model's parameter names, all over the same ones.
        blocks: what shares a coefficient, see `split_blocks`.
        include, exclude: patterns of parameter names; by default embeddings and head stay out, `exclude=()`: nothing.
        dtype: type in which sums and contractions are computed, and of the coefficients; fp32 unless given.
        placement: "resident" keeps the vectors beside the model; "stream" reads them tile by tile from `stream_file`,
            a block-major file that is made once and reused as long as it holds the same vectors.
        rounding: how sums become weights of a narrower type: "nearest", or "stochastic" (for bf16 weights in training:
            steps smaller than half a unit in the last place are else lost, spec 4.3).
        partitions: K > 1 gives every block K coefficients, for element groups drawn by a hash (paper: aTLAS x K).
        seed: of the partitions and of stochastic rounding.

    Attributes:
        coefficients: parameter [n, m], with K > 1 [n, m, K]; zero at the start.
        block_names: the m names.

    Raises:
        ValueError: vectors of another base, missing or misshapen tensors, NaN, a zero vector, tied tensors that differ.
        OSError: no room for the stream file.
    """

    def __init__(
        self,
        model: nn.Module,
        task_vectors: Sequence[TaskVector | Mapping[str, Entry]],
        blocks: str = "tensor",
        exclude: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        placement: Literal["resident", "stream"] = "resident",
        *,
        include: Sequence[str] = (),
        stream_file: str | Path | None = None,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        partitions: int = 1,
        seed: int = 0,
    ) -> None:
        vectors = [v if isinstance(v, TaskVector) else TaskVector(v) for v in task_vectors]
        if not vectors:
            raise ValueError("no task vectors to compose; give at least one")
        if placement not in ("resident", "stream"):
            raise ValueError(f"unknown placement {placement!r}; known: resident, stream")
        if (placement == "stream") != (stream_file is not None):
            raise ValueError("placement='stream' needs a stream_file, and no other placement takes one")
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f"unknown rounding {rounding!r}; known: nearest, stochastic")
        if partitions < 1:
            raise ValueError(f"partitions={partitions}: a block has at least one")
        targets = check_vectors(vectors, model)
        cut = split_blocks(model, targets, blocks, include, exclude)
        self.model, self.block_names = model, list(cut)
        self.dtype, self.rounding, self.partitions, self.seed = dtype or torch.float32, rounding, partitions, seed
        self.compositions = 0  # counts `compose`, so that stochastic rounding can be repeated
        names = [name for members in cut.values() for name in members]
        if stream_file is None:
            self._source: Resident | Stream = Resident(vectors, names, next(iter(targets.values())).device)
        else:
            self._source = Stream(vectors, names, Path(stream_file))
        shape = (len(vectors), len(cut)) + ((partitions,) if partitions > 1 else ())
        device = next(iter(targets.values())).device
        self.coefficients = nn.Parameter(torch.zeros(shape, dtype=self.dtype, device=device))
        self._slots = [
            _Slot(name, number, targets[name], targets[name].detach().clone().reshape(-1))
            for number, members in enumerate(cut.values())
            for name in members
        ]
        self._trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._attach(model)

    @torch.no_grad()
    def compose(self) -> None:
        """Write the weights that belong to the present coefficients into the model: summed in `dtype`, rounded once."""
        self.compositions += 1
        for number, slot in enumerate(self._slots):
            weights = _local(slot.parameter).reshape(-1)  # a view: parameters are contiguous (see _attach)
            for start, stop in self._tiles(slot):
                value = slot.base[start:stop].to(self.dtype) + self._sum(slot, start, stop)
                if self.rounding == "stochastic" and weights.dtype == torch.bfloat16:
                    value = _stochastic(value, (self.seed, self.compositions, number, start))
                weights[start:stop] = value

    def remove(self, keep: bool = False) -> None:
        """Take the hooks off; the model is the base again, or with `keep` stays as composed."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if not keep:
            with torch.no_grad():
                for slot in self._slots:
                    _local(slot.parameter).reshape(-1).copy_(slot.base)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._trained[name])

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Sum the coefficients' gradients over processes (n * m numbers); the mean where each holds whole weights.

        With sharded weights (FSDP2) each process has contracted its part of an already averaged gradient.
        """
        if not (dist.is_available() and dist.is_initialized()) or self.coefficients.grad is None:
            return
        dist.all_reduce(self.coefficients.grad)
        if not self.sharded:
            self.coefficients.grad /= dist.get_world_size()

    @property
    def sharded(self) -> bool:
        """Whether the weights are split over processes (FSDP2)."""
        return isinstance(self._slots[0].parameter, DTensor)

    @torch.no_grad()
    def rebind(self, model: nn.Module) -> None:
        """Follow the model after FSDP2 has replaced its parameters by shards: keep the same part of everything.

        Raises:
            ValueError: sharded along another dimension than the first.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        parameters = {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in model.named_parameters()}
        for slot in self._slots:
            slot.parameter = parameters[slot.name]
            if isinstance(slot.parameter, DTensor):
                start, stop = _shard(slot.name, slot.parameter)
                slot.base, slot.start = slot.base[start:stop].clone(), start
                self._source.keep(slot.name, start, stop)
        self._attach(model)

    def _attach(self, model: nn.Module) -> None:
        self.model = model
        composed = {id(slot.parameter) for slot in self._slots}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in composed)
        for slot in self._slots:
            if not _local(slot.parameter).is_contiguous():
                slot.parameter.data = slot.parameter.data.contiguous()
            hook = slot.parameter.register_post_accumulate_grad_hook(self._contract(slot))
            self._hooks.append(hook)

    def _contract(self, slot: _Slot):  # type: ignore[no-untyped-def]
        @torch.no_grad()
        def hook(parameter: nn.Parameter) -> None:
            assert parameter.grad is not None
            gradient = _local(parameter.grad).reshape(-1)
            if self.coefficients.grad is None:
                self.coefficients.grad = torch.zeros_like(self.coefficients)
            column = self.coefficients.grad[:, slot.block]
            for start, stop in self._tiles(slot):
                piece = gradient[start:stop].to(self.dtype)
                stack = self._source.read(slot.name, start, stop).to(gradient.device, self.dtype)
                if self.partitions == 1:
                    column += stack @ piece
                else:
                    groups = self._groups(slot, start, stop)
                    column.index_add_(1, groups, stack * piece)
            parameter.grad = None

        return hook

    def _sum(self, slot: _Slot, start: int, stop: int) -> Tensor:
        stack = self._source.read(slot.name, start, stop).to(self.coefficients.device, self.dtype)
        weights = self.coefficients[:, slot.block]
        if self.partitions == 1:
            return weights @ stack
        return (weights[:, self._groups(slot, start, stop)] * stack).sum(0)

    def _groups(self, slot: _Slot, start: int, stop: int) -> Tensor:
        place = slice(slot.start + start, slot.start + stop)
        return partition_indices(self.seed, slot.name, place, self.partitions).to(self.coefficients.device)

    def _tiles(self, slot: _Slot) -> Iterator[tuple[int, int]]:
        size = slot.base.numel()
        whole = self.partitions == 1 and self._source.whole(slot.name, self.dtype)
        step = max(1, size) if whole else TILE
        for start in range(0, size, step):
            yield start, min(size, start + step)


def check_vectors(vectors: Sequence[TaskVector], model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that all vectors change, by name; ValueError where they do not fit the model or one another."""
    first = matched(vectors[0], model)
    for number, vector in enumerate(vectors[1:], 2):
        other = matched(vector, model)
        if other.keys() != first.keys():
            missing = sorted(first.keys() ^ other.keys())
            raise ValueError(
                f"task vectors 1 ({vectors[0].source}) and {number} ({vector.source}) change different tensors: only "
                f"one has {', '.join(missing[:5])}" + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            )
    return first


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _shard(name: str, parameter: DTensor) -> tuple[int, int]:
    """First and last element, in the flat whole tensor, of this process's part."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(not (isinstance(p, Shard) and p.dim == 0) for p in parameter.placements):
        raise ValueError(f"{name} is sharded as {parameter.placements}; composition knows rows only (FSDP2's default)")
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    row = parameter.shape[1:].numel()
    start = offset[0] * row
    return start, start + torch.Size(shape).numel()


def _stochastic(value: Tensor, key: tuple[int, ...]) -> Tensor:
    """fp32 to bf16, up or down with probabilities that make the mean exact: random bits below the kept ones."""
    generator = torch.Generator(value.device).manual_seed(hash(key) & 0x7FFF_FFFF_FFFF_FFFF)
    bits = value.float().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=value.device, generator=generator)
    return ((bits + noise) & -65536).view(torch.float32).to(torch.bfloat16)
