"""Files of a report: written whole or not at all, by rank 0, with finite numbers only and without machine paths."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import numbers
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO


def is_main_process() -> bool:
    """Whether this process writes files: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of ``path`` at the end, whole, or not at all; on other ranks a dummy.

    A temporary file in the same folder (made where it is missing), fsync, ``os.replace``. A full disk raises OSError
    naming path and free space.
    """
    if not is_main_process():
        with open(os.devnull, "wb") as nothing:
            yield nothing
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent).free
            raise OSError(
                error.errno,
                f"no space left to write {path} ({free / 1e6:.1f} MB free); "
                + ("the earlier file is unchanged" if path.exists() else "nothing was written"),
            ) from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON in place of ``path``, whole or not at all; ValueError, naming the key, for NaN or infinity."""
    text = json.dumps(to_json(value, ""), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


def to_json(value: Any, key: str) -> Any:
    """Plain JSON types: numpy numbers become Python's, paths lose their folders. ``key`` names the place in errors."""
    if value is None or type(value) in (bool, int, str):  # nearly all there is, before the slow checks
        return value
    if isinstance(value, Mapping):
        return {str(name): to_json(item, f"{key}.{name}".lstrip(".")) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item, f"{key}[{place}]") for place, item in enumerate(value)]
    if isinstance(value, str):
        return value
    if isinstance(value, Path):
        return anonymous(str(value))
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        if not math.isfinite(value):
            raise ValueError(f"{key} is {value}; a report holds only finite numbers (use None for what is unknown)")
        return float(value)
    raise TypeError(f"{key} is of type {type(value).__name__}, which JSON does not know; convert it first")


def anonymous(value: Any) -> Any:
    """Paths in JSON values made relative to the working directory or cut to the name: a report must not tell of the
    machine. Also in forms like ``test=/data/rows.csv``."""
    if isinstance(value, dict):
        return {key: anonymous(item) for key, item in value.items()}
    if isinstance(value, list):
        return [anonymous(item) for item in value]
    if not isinstance(value, str):
        return value
    return without_folders(value.replace(f"{Path.cwd()}{os.sep}", ""))


def without_folders(text: str) -> str:
    """A message with every absolute path cut to its last part. Addresses (``https://...``) stay."""
    return re.sub(r"(?<![\w:/.~])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\'\",:;()]+)+[/\\]", "", text)
