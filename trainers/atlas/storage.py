"""Safetensors files written tensor by tensor, and read in tiles: neither needs more memory than one tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from ...files import replacing

# safetensors' names of types (its format: 8 bytes of header length, a JSON header, the tensors one after the other)
TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8",
}  # fmt: skip


def write_blocks(
    path: Path,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    fill: Callable[[str, Callable[[Tensor], None]], None],
    about: Mapping[str, str],
) -> None:
    """Write tensors of known type and shape, with `about` in the header. The file appears whole or not at all.

    Args:
        fill: called with a name and a function `write`, to which it hands that tensor's values in pieces, in order.

    Raises:
        OSError: no room for it, said before anything is written; or the disk filled up meanwhile.
        ValueError: a type that files cannot hold, or more or fewer values than the shape says.
    """
    header: dict[str, object] = {"__metadata__": dict(about)}
    place = 0
    for name, (dtype, shape) in shapes.items():
        if dtype not in TYPES:
            raise ValueError(f"{name} is of type {dtype}; only {', '.join(TYPES.values())} can be written")
        end = place + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < place + len(text):
        raise OSError(
            f"{path} needs {(place + len(text)) / 1e6:,.1f} MB, but only {free / 1e6:,.1f} MB are free there; choose "
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
    """Parts of the tensors of one file that `write_blocks` made.

    Plain reads into the tile, not a memory map: the pages of a map count as this process's memory, and the kernel maps
    more of them around each read than one would give back.

    Raises:
        ValueError: not a safetensors file, or cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        types = {name: dtype for dtype, name in TYPES.items()}
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            try:
                if length + 8 > size:
                    raise ValueError("cut short")
                header = json.loads(file.read(length))
                self.about: dict[str, str] = header.pop("__metadata__", {})
                self.shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
                self.dtypes = {name: types[entry["dtype"]] for name, entry in header.items()}
                self._starts = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}
                if size != max((8 + length + entry["data_offsets"][1] for entry in header.values()), default=0):
                    raise ValueError("cut short")
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(
                    f"{path} is not a whole file of task vectors ({type(error).__name__}: {error}); remove it or name "
                    "another"
                ) from error
        self._file = open(path, "rb", buffering=0)
        self._lock = Lock()  # a model on several devices runs its backward pass in several threads

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Columns `start:stop` of the tensor [n, d], as a tensor of its own [n, stop - start]."""
        rows, width = self.shapes[name]
        dtype = self.dtypes[name]
        tile = torch.empty(rows, stop - start, dtype=dtype)
        for row in range(rows):
            self._fill(tile[row], self._starts[name] + (row * width + start) * dtype.itemsize)
        return tile

    def _fill(self, tensor: Tensor, place: int) -> None:
        rest = tensor.view(torch.uint8).numpy().data
        with self._lock:
            self._file.seek(place)
            while len(rest):
                count = self._file.readinto(rest)
                if not count:
                    raise OSError(f"{self.path} has become shorter since it was opened")
                rest = rest[count:]

    def close(self) -> None:
        self._file.close()
