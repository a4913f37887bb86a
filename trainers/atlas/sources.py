"""Where the composer reads task vectors from: memory, or a block-major file."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...files import is_main_process
from ..fingerprint import model_fingerprint, sampled
from .entries import Entry, LazyTensors, LowRank
from .matching import listed, matched
from .slots import cut
from .storage import TileReader, write_blocks
from .task_vector import TaskVector, refuse_non_finite

logger = logging.getLogger(__name__)


def align(
    vectors: Sequence[TaskVector], model: nn.Module, base: str | None = None
) -> tuple[dict[str, nn.Parameter], list[TaskVector]]:
    """The parameters that the vectors change, by `named_parameters()` name, and the vectors over just these names.

    `base`: the model's fingerprint, where it is known. A vector that is all factors (LoRA) is zero where it has none,
    so such vectors may have different targets.

    Raises:
        ValueError: as `matched`; or a dense vector lacks a tensor that another one changes.
    """
    if base is None and any(vector.base is not None for vector in vectors):
        base = model_fingerprint(model)
    found = [matched(vector, model, base) for vector in vectors]
    own = [{id(parameter): name for name, parameter in names.items()} for names in found]
    targets = {
        name: parameter for name, parameter in model.named_parameters() if any(id(parameter) in names for names in own)
    }
    for number, (vector, names) in enumerate(zip(vectors, own, strict=True), 1):
        missing = [name for name, parameter in targets.items() if id(parameter) not in names]
        if missing and len(vector.low_rank) < len(vector):
            raise ValueError(
                f"task vectors change different tensors: number {number} ({vector.source}) has no {listed(missing)}"
            )
    aligned = [
        TaskVector(_Aligned(vector, targets, names), base=vector.base, source=vector.source)
        for vector, names in zip(vectors, own, strict=True)
    ]
    return targets, aligned


class _Aligned(LazyTensors[Entry]):
    """A vector under the model's own names, with zeros where it has nothing."""

    def __init__(self, vector: TaskVector, targets: Mapping[str, nn.Parameter], own: Mapping[int, str]) -> None:
        self.vector = vector
        self.names = {name: own.get(id(parameter)) for name, parameter in targets.items()}
        self.shapes = {name: torch.Size(parameter.shape) for name, parameter in targets.items()}

    def __getitem__(self, name: str) -> Entry:
        own = self.names[name]
        # uint8: the one type that no other is widened by
        return torch.zeros(self.shapes[name], dtype=torch.uint8) if own is None else self.vector[own]


class Resident:
    """The vectors in memory, one [n, elements] tensor a parameter beside it, in the widest of the vectors' types.

    Attributes:
        ids: of each vector, by which another one is told from it (see `fingerprint.py`).
    """

    def __init__(self, vectors: Sequence[TaskVector], parameters: Mapping[str, nn.Parameter]) -> None:
        self._stacks: dict[str, Tensor] = {}
        sizes = [0.0] * len(vectors)
        digests = [hashlib.sha256() for _ in vectors]
        for name, parameter in sorted(parameters.items()):
            entries = [checked(vector, name, number) for number, vector in enumerate(vectors, 1)]
            sizes = [size + _size(entry) for size, entry in zip(sizes, entries, strict=True)]
            for digest, entry in zip(digests, entries, strict=True):
                digest.update(sampled(name, entry))
            dtype = reduce(torch.promote_types, [entry.dtype for entry in entries])
            stack = torch.empty(len(entries), parameter.numel(), dtype=dtype, device=parameter.device)
            for row, entry in zip(stack, entries, strict=True):
                row.copy_(entry.detach().reshape(-1))
            self._stacks[name] = stack
        refuse_zero(vectors, sizes)
        self.ids = [digest.hexdigest()[:16] for digest in digests]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """[n, stop - start]"""
        return cut(self._stacks[name], start, stop)

    def keep(self, name: str, start: int, stop: int) -> None:
        """From now on this process reads elements `start:stop` only, counted from `start`."""
        self._stacks[name] = self._stacks[name][:, start:stop].clone()


class Stream:
    """The vectors in one file, [n, elements] a parameter, of which no more than a tile is in memory.

    At every start all vectors are read once, one tensor at a time, to see that the file holds just these. Without a
    path it is a temporary file that goes with this object.

    Raises:
        ValueError: the file holds other vectors or something else; NaN or a zero vector. An existing file stays.
        OSError: no room for the file; nothing was written.
    """

    def __init__(self, vectors: Sequence[TaskVector], names: Sequence[str], path: str | Path | None = None) -> None:
        names = sorted(names)  # whatever the blocks: one file serves them all
        key, dtypes, self.ids = survey(vectors, names)
        own = path is None
        if path is None:
            folder = tempfile.mkdtemp(prefix="steerbook-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            path = Path(folder) / "vectors_by_block.safetensors"
        path = Path(path)
        if (own or is_main_process()) and not path.exists():
            write_stream(path, vectors, dtypes, key)
        if dist.is_available() and dist.is_initialized():
            dist.barrier()  # the others read what the first process has written
        self._reader = TileReader(path)
        if self._reader.about.get("key") != key:
            raise ValueError(f"{path} holds other task vectors than these; remove it or name another file")
        self._starts = dict.fromkeys(names, 0)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """[n, stop - start]"""
        first = self._starts[name]
        return self._reader.read(name, first + start, first + stop)

    def keep(self, name: str, start: int, stop: int) -> None:
        """From now on this process reads elements `start:stop` only, counted from `start`."""
        self._starts[name] = start


def write_stream(path: Path, vectors: Sequence[TaskVector], dtypes: Mapping[str, torch.dtype], key: str) -> None:
    """Make the block-major file, reading one tensor of one vector at a time; OSError without room for it."""
    shapes = {name: (dtype, (len(vectors), vectors[0].shapes[name].numel())) for name, dtype in dtypes.items()}

    def fill(name: str, write: Callable[[Tensor], None]) -> None:
        for vector in vectors:
            write(vector.dense(name))

    write_blocks(path, shapes, fill, {"format": "steerbook task vectors by block 1", "key": key})
    logger.info("wrote %s", path)


def survey(vectors: Sequence[TaskVector], names: Sequence[str]) -> tuple[str, dict[str, torch.dtype], list[str]]:
    """A key of the vectors' exact contents, each tensor's type in a file (the widest of the vectors'), and their ids.

    Raises:
        ValueError: NaN or infinity, or a vector that is zero in all these tensors.
    """
    digest = hashlib.sha256(json.dumps([len(vectors), list(names)]).encode())
    dtypes: dict[str, torch.dtype] = {}
    ids = []
    for number, vector in enumerate(vectors, 1):
        size, own = 0.0, hashlib.sha256()
        for name in names:
            entry = checked(vector, name, number)
            dtype, change = _add(digest, entry)
            dtypes[name] = torch.promote_types(dtypes.get(name, dtype), dtype)
            size += change
            own.update(sampled(name, entry))
            del entry  # before the next one is read
        refuse_zero([vector], [size], number)
        ids.append(own.hexdigest()[:16])
    return digest.hexdigest()[:16], dtypes, ids


def vector_digest(vector: TaskVector, number: int = 1, names: Iterable[str] | None = None) -> str:
    """A key of a vector's exact contents in `names` (default: all), read one tensor at a time; factors as they are.

    Raises:
        ValueError: NaN or infinity, or a vector that is zero in all of them.
    """
    digest = hashlib.sha256()
    size = 0.0
    for name in sorted(vector if names is None else names):
        entry = vector[name]
        parts = (entry.a, entry.b) if isinstance(entry, LowRank) else (entry,)
        digest.update(f"{name} {entry.scale if isinstance(entry, LowRank) else 1}".encode())
        for part in parts:
            refuse_non_finite(part, f"task vector {number} ({vector.source}): {name}")
            _add(digest, part)
        size += min(_size(part) for part in parts)
    refuse_zero([vector], [size], number)
    return digest.hexdigest()[:16]


def _add(digest: hashlib._Hash, entry: Tensor) -> tuple[torch.dtype, float]:
    """Put a tensor into the digest: at most 64 values as they are, and the sum of all values' bits (in integers: a
    sum of floats depends on the number of threads). Returns its type and size."""
    flat = entry.detach().reshape(-1)
    picked = flat[:: max(1, flat.numel() // 64)].to("cpu", torch.float64)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.dtype.itemsize]
    total = int(flat.contiguous().view(integers).sum(dtype=torch.int64))
    digest.update(f"{tuple(entry.shape)} {entry.dtype} {total}".encode() + picked.numpy().tobytes())
    return entry.dtype, _size(entry)


def checked(vector: TaskVector, name: str, number: int) -> Tensor:
    """One entry as a tensor; ValueError if it holds NaN or infinity."""
    entry = vector.dense(name)
    refuse_non_finite(entry, f"task vector {number} ({vector.source}): {name}")
    return entry


def refuse_zero(vectors: Sequence[TaskVector], sizes: Sequence[float], first: int = 1) -> None:
    """ValueError if a vector's size is 0; `first` is the number of the first one."""
    for number, (vector, size) in enumerate(zip(vectors, sizes, strict=True), first):
        if size == 0:
            raise ValueError(
                f"task vector {number} ({vector.source}) is zero in every composed tensor: base and tuned model are "
                "the same there"
            )


def _size(entry: Tensor) -> float:
    return float(entry.any())  # only whether it is zero matters
