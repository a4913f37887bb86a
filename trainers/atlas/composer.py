"""Exact composition of task vectors with learned coefficients and no autograd graph through the weights (spec 5.2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..fingerprint import model_fingerprint
from ..whole import plain_name
from .blocks import split_blocks
from .partition import partition_indices
from .rounding import rounded
from .shards import local_part, shard_bounds
from .slots import Slot, cut
from .sources import Resident, Stream, align
from .task_vector import Entry, TaskVector

MARK = "_steerbook_composer"  # attribute of the parameters that a composer has in hand


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
        task_vectors: `TaskVector`s (or plain mappings) over this model's parameter names, all over the same ones;
            only a vector that is all `LowRank` may lack some, which count as zero. Types may differ.
        blocks: what shares a coefficient, see `split_blocks`.
        include, exclude: patterns of parameter names; by default embeddings and head stay out, `exclude=()`: nothing.
        dtype: type in which sums and contractions are computed, and of the coefficients; fp32 (fp64 for a model with
            fp64 weights) unless given.
        placement: "resident" keeps the vectors beside the model; "stream" reads them tile by tile from `stream_file`,
            a block-major file that is made once and reused as long as it holds the same vectors (without a name: a
            temporary file that goes with the composer). Same results.
        rounding: how sums become weights of a narrower type: "nearest", or "stochastic" (for bf16 weights in training:
            steps smaller than half a unit in the last place are else lost, spec 4.3).
        partitions: K > 1 gives every block K coefficients, for element groups drawn by a hash (paper: aTLAS x K).
        seed: of the partitions and of stochastic rounding.

    Attributes:
        coefficients: parameter [n, m], with K > 1 [n, m, K]; zero at the start.
        block_names: the m names.
        base: fingerprint of the base, `model_fingerprint`.

    Raises:
        ValueError: vectors of another base, missing or misshapen tensors, NaN, a zero vector, tied tensors that
            differ; a model that another composer has in hand; a stream file with other contents.
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
        if placement != "stream" and stream_file is not None:
            raise ValueError("a stream_file is for placement='stream' only")
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f"unknown rounding {rounding!r}; known: nearest, stochastic")
        if partitions < 1:
            raise ValueError(f"partitions={partitions}: a block has at least one")
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype={dtype}: composition is exact in torch.float32 or torch.float64 only")
        if any(hasattr(parameter, MARK) for parameter in model.parameters()):
            raise ValueError("another composer holds this model; call its remove() (or remove(keep=True)) first")
        self.base = model_fingerprint(model)
        targets, vectors = align(vectors, model, self.base)
        members = split_blocks(model, targets, blocks, include, exclude)
        self.model, self.block_names = model, list(members)
        self.rounding, self.partitions, self.seed = rounding, partitions, seed
        self.compositions = 0  # counts `compose`, so that stochastic rounding can be repeated
        composed = {name: targets[name] for names in members.values() for name in names}
        first = next(iter(composed.values()))
        self.dtype = dtype or torch.promote_types(first.dtype, torch.float32)
        self._source: Resident | Stream
        if placement == "resident":
            self._source = Resident(vectors, composed)
        else:
            self._source = Stream(vectors, list(composed), stream_file)
        shape = (len(vectors), len(members)) + ((partitions,) if partitions > 1 else ())
        self.coefficients = nn.Parameter(torch.zeros(shape, dtype=self.dtype, device=first.device))
        self._slots = [
            Slot(name, number, len(vectors), targets[name], targets[name].detach().clone().reshape(-1))
            for number, names in enumerate(members.values())
            for name in names
        ]
        self._trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._update: Callable[[int], None] | None = None
        self._missing = Counter(slot.block for slot in self._slots)  # contractions until a block may be updated
        self._attach(model)

    @torch.no_grad()
    def compose(self) -> None:
        """Write the weights of the present coefficients into the model: summed in `dtype`, rounded once."""
        self.compositions += 1
        for slot in self._slots:
            self._write(slot, self.compositions)

    def update_in_backward(self, update: Callable[[int], None]) -> None:
        """From now on, once a backward pass has all of a block's gradient, call `update(block)`, which may change
        `coefficients[:, block]`, and compose that block. `finish_update` must follow each pass; see `OnePassAdamW`."""
        self._update = update

    @torch.no_grad()
    def finish_update(self) -> None:
        """Update and compose the blocks of which the backward pass has reached no or not all parameters."""
        for block in list(self._missing):
            self._update_block(block)
        self.compositions += 1
        self._missing = Counter(slot.block for slot in self._slots)

    def remove(self, keep: bool = False) -> None:
        """Take the hooks off; the model is the base again, or with `keep` stays as composed. Once is enough."""
        if not self._hooks:
            return
        self._detach()
        if not keep:
            with torch.no_grad():
                for slot in self._slots:
                    local_part(slot.parameter).reshape(-1).copy_(slot.base)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._trained[plain_name(name)])

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

    @torch.no_grad()
    def expansion(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of every composed parameter, by name: its value at the base, and `sum_i coefficients[i, j] * vector_i,j`.

        Raises:
            ValueError: the weights are split over processes.
        """
        if self.sharded:
            raise ValueError("the weights are split over processes; their expansion needs whole ones")
        values, directions = {}, {}
        for slot in self._slots:
            shape, device = slot.parameter.shape, slot.parameter.device
            values[slot.name] = slot.base.reshape(shape)
            pieces = [self._sum(slot, start, stop, device) for start, stop in slot.tiles]
            directions[slot.name] = torch.cat(pieces).to(slot.base.dtype).reshape(shape)
        return values, directions

    @property
    def vector_ids(self) -> list[str]:
        """Of each task vector 16 hex digits, which tell it from others (by sampled values, rounded to bf16)."""
        return self._source.ids

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
        self._detach()
        parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
        for number, slot in enumerate(self._slots):
            parameter, base, start = parameters[slot.name], slot.base, 0
            if isinstance(parameter, DTensor):
                start, stop = shard_bounds(slot.name, parameter)
                base = base[start:stop].clone()
                self._source.keep(slot.name, start, stop)
            self._slots[number] = replace(slot, parameter=parameter, base=base, start=start)
        self._attach(model)

    def _attach(self, model: nn.Module) -> None:
        self.model = model
        self._slots_of = [[slot for slot in self._slots if slot.block == b] for b in range(len(self.block_names))]
        composed = {id(slot.parameter) for slot in self._slots}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in composed)
        for slot in self._slots:
            if not local_part(slot.parameter).is_contiguous():
                slot.parameter.data = slot.parameter.data.contiguous()
            slot.parameter.grad = None  # one from before would be added to the first
            setattr(slot.parameter, MARK, True)
            self._hooks.append(slot.parameter.register_post_accumulate_grad_hook(self._contract(slot)))

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for slot in self._slots:
            if hasattr(slot.parameter, MARK):
                delattr(slot.parameter, MARK)

    def _contract(self, slot: Slot) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = local_part(parameter.grad).reshape(-1)
            if self.coefficients.grad is None:
                self.coefficients.grad = torch.zeros_like(self.coefficients)
            column = self.coefficients.grad[:, slot.block]
            for start, stop in slot.tiles:
                piece = cut(gradient, start, stop).to(self.dtype)
                stack = self._source.read(slot.name, start, stop).to(gradient.device, self.dtype)
                if self.partitions == 1:
                    part = stack @ piece
                else:
                    part = stack.new_zeros(len(stack), self.partitions)
                    part.index_add_(1, self._groups(slot, start, stop, gradient.device), stack * piece)
                column += part.to(column.device)
            parameter.grad = None
            if self._update is not None:
                self._missing[slot.block] -= 1
                if not self._missing[slot.block]:
                    self._update_block(slot.block)

        return hook

    def _update_block(self, block: int) -> None:
        assert self._update is not None
        del self._missing[block]
        self._update(block)
        for slot in self._slots_of[block]:
            self._write(slot, self.compositions + 1)

    def _write(self, slot: Slot, number: int) -> None:
        """Compose one parameter, for the `number`-th time."""
        weights = local_part(slot.parameter).reshape(-1)  # a view: parameters are contiguous (see _attach)
        for start, stop in slot.tiles:
            base, part = cut(slot.base, start, stop).to(weights.device, self.dtype), cut(weights, start, stop)
            # The movement first: added to the base one by one, small terms would be rounded at its size.
            movement = self._sum(slot, start, stop, weights.device)
            value = torch.add(base, movement, out=part if part.dtype == self.dtype else None)
            if self.rounding == "stochastic" and weights.dtype == torch.bfloat16:
                value = rounded(value, f"{self.seed} {number} {slot.name} {slot.start + start}")
            if value is not part:
                part.copy_(value)

    def _sum(self, slot: Slot, start: int, stop: int, device: torch.device) -> Tensor:
        stack = self._source.read(slot.name, start, stop).to(device, self.dtype)
        weights = self.coefficients[:, slot.block].to(device)
        if self.partitions == 1:
            return weights @ stack
        return (weights[:, self._groups(slot, start, stop, device)] * stack).sum(0)

    def _groups(self, slot: Slot, start: int, stop: int, device: torch.device) -> Tensor:
        place = slice(slot.start + start, slot.start + stop)
        return partition_indices(self.seed, slot.name, place, self.partitions, device)
