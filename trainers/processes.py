"""Several processes of a job that must agree."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, TypeVar

from torch import distributed

from ..files import is_main_process

Found = TypeVar("Found")
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "steerbook")  # which results depend on


def of_main(work: Callable[[], Found]) -> Found:
    """What `work` returns in the first process, in all of them, or what it raises there. All must call it."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return work()
    box: list[Any] = [None, None]
    if is_main_process():
        try:
            box[0] = work()
        except Exception as error:  # raised in every process, in the others as text if it does not travel
            box[1] = error if _travels(error) else RuntimeError(f"{type(error).__name__}: {error}")
    distributed.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    found: Found = box[0]
    return found


def _travels(error: Exception) -> bool:
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:  # whatever its __init__ or __reduce__ raises
        return False


def check_versions() -> None:
    """ValueError where the processes of a job, on several machines, have packages of different versions. All must call
    it."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    mine = {name: version(name) for name in PACKAGES}
    all_of_them: list[dict[str, str]] = [{}] * distributed.get_world_size()
    distributed.all_gather_object(all_of_them, mine)
    for rank, theirs in enumerate(all_of_them):
        for name, found in theirs.items():
            if found != (first := all_of_them[0][name]):
                raise ValueError(
                    f"process {rank} has {name} {found}, process 0 has {first}: install the same versions on all "
                    "machines (constraints.txt)"
                )
