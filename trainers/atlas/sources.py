"""Where the composer reads task vectors from: memory, or a block-major file."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .storage import TileReader, write_blocks
from .task_vector import TaskVector

logger = logging.getLogger(__name__)


class Resident:
    """The vectors in memory, one [n, elements] tensor a parameter, in their own type."""

    def __init__(self, vectors: Sequence[TaskVector], names: Sequence[str], device: torch.device) -> None:
        self._stacks: dict[str, Tensor] = {}
        sizes = [0.0] * len(vectors)
        for name in names:
            entries = [checked(vector, name, number) for number, vector in enumerate(vectors, 1)]
            sizes = [size + float(entry.abs().max()) for size, entry in zip(sizes, entries, strict=True)]
            self._stacks[name] = torch.stack([entry.reshape(-1) for entry in entries]).to(device)
        refuse_zero(vectors, sizes)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """[n, stop - start]"""
        return self._stacks[name][:, start:stop]

    def whole(self, name: str, dtype: torch.dtype) -> bool:
        """Whether a read of the whole tensor costs no memory in `dtype`."""
        return self._stacks[name].dtype == dtype

    def keep(self, name: str, start: int, stop: int) -> None:
        """From now on this process reads elements `start:stop` only, counted from `start`."""
        self._stacks[name] = self._stacks[name][:, start:stop].clone()


class Stream:
    """The vectors in one file, [n, elements] a parameter, of which no more than a tile is in memory."""

    def __init__(self, vectors: Sequence[TaskVector], names: Sequence[str], path: Path) -> None:
        key = content_key(vectors, names)
        if path.exists() and TileReader(path).about.get("key") != key:
            raise ValueError(f"{path} holds other task vectors than these; remove it or name another file")
        if not path.exists():
            write_stream(path, vectors, names, key)
        self._reader = TileReader(path)
        self._starts = dict.fromkeys(names, 0)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """[n, stop - start]"""
        first = self._starts[name]
        return self._reader.read(name, first + start, first + stop)

    def whole(self, name: str, dtype: torch.dtype) -> bool:
        return False

    def keep(self, name: str, start: int, stop: int) -> None:
        """From now on this process reads elements `start:stop` only, counted from `start`."""
        self._starts[name] = start


def write_stream(path: Path, vectors: Sequence[TaskVector], names: Sequence[str], key: str) -> None:
    """Make the block-major file, reading one tensor of one vector at a time; OSError without room for it."""
    shapes = {}
    for name in names:
        dtype = vectors[0].dense(name).dtype
        shapes[name] = (dtype, (len(vectors), vectors[0].shapes[name].numel()))
    sizes = [0.0] * len(vectors)

    def fill(name: str, write: Callable[[Tensor], None]) -> None:
        for number, vector in enumerate(vectors):
            entry = checked(vector, name, number + 1)
            sizes[number] += float(entry.abs().max())
            write(entry)
        if name == names[-1]:
            refuse_zero(vectors, sizes)  # before the file appears

    write_blocks(path, shapes, fill, {"format": "steerbook task vectors by block 1", "key": key})
    logger.info("wrote %s", path)


def content_key(vectors: Sequence[TaskVector], names: Sequence[str]) -> str:
    """Names, shapes and at most 64 values of every tensor of every vector, hashed."""
    digest = hashlib.sha256(json.dumps([len(vectors), list(names)]).encode())
    for vector in vectors:
        for name in names:
            flat = vector.dense(name).reshape(-1)
            picked = flat[:: max(1, flat.numel() // 64)].to(torch.float64)
            digest.update(f"{flat.numel()} {flat.dtype}".encode() + picked.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def checked(vector: TaskVector, name: str, number: int) -> Tensor:
    """One entry as a tensor; ValueError if it holds NaN or infinity."""
    entry = vector.dense(name)
    if not torch.isfinite(entry).all():
        bad = int((~torch.isfinite(entry)).sum())
        raise ValueError(f"task vector {number} ({vector.source}): {name} holds {bad} NaN or infinite values")
    return entry


def refuse_zero(vectors: Sequence[TaskVector], sizes: Sequence[float]) -> None:
    for number, (vector, size) in enumerate(zip(vectors, sizes, strict=True), 1):
        if size == 0:
            raise ValueError(
                f"task vector {number} ({vector.source}) is zero everywhere: base and tuned model are the same"
            )
