"""Safetensors files written tensor by tensor, and read in tiles: neither needs more memory than one tensor."""

from __future__ import annotations

import json
import mmap
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...files import replacing

# safetensors' names of types (its format: 8 bytes of header length, a JSON header, the tensors one after the other)
TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8",
}  # fmt: skip


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write a (lazy) mapping of tensors with `about` in the header. The file appears whole or not at all.

    Raises:
        OSError: no room for it; said before anything is written.
    """
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_blocks(path, shapes, lambda name, write: write(tensors[name]), about)


def write_blocks(
    path: Path,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    fill: Callable[[str, Callable[[Tensor], None]], None],
    about: Mapping[str, str],
) -> None:
    """Write tensors of known type and shape; `fill(name, write)` hands over each one's values, in pieces, in order."""
    header: dict[str, object] = {"__metadata__": dict(about)}
    place = 0
    for name, (dtype, shape) in shapes.items():
        end = place + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < place + len(text):
        raise OSError(
            f"{path} needs {(place + len(text)) / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free there; choose "
            "another place or fewer task vectors (nothing was written)"
        )
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in shapes.items():
            written = 0

            def write(piece: Tensor, name: str = name, dtype: torch.dtype = dtype) -> None:
                nonlocal written
                flat = piece.detach().to("cpu", dtype).contiguous().reshape(-1)
                file.write(flat.view(torch.uint8).numpy().data)
                written += flat.numel()

            fill(name, write)
            if written != torch.Size(shape).numel():
                raise ValueError(f"{name}: {written} values given for the shape {list(shape)}")


class TileReader:
    """Parts of the tensors of one safetensors file, from a memory map whose pages are given back after each read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.about: dict[str, str] = header.pop("__metadata__", {})
        types = {name: dtype for dtype, name in TYPES.items()}
        self.shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        self._types = {name: types[entry["dtype"]] for name, entry in header.items()}
        self._starts = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Columns `start:stop` of the tensor [n, d], as a tensor of its own [n, stop - start]."""
        rows, width = self.shapes[name]
        dtype = self._types[name]
        tile = torch.empty(rows, stop - start, dtype=dtype)
        for row in range(rows):
            place = self._starts[name] + (row * width + start) * dtype.itemsize
            end = place + (stop - start) * dtype.itemsize
            tile[row].view(torch.uint8).numpy()[:] = memoryview(self._map)[place:end]
            first = place - place % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, end - first)
        return tile

    def close(self) -> None:
        self._map.close()
