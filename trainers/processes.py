"""Several processes of a job that must agree."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any, TypeVar

from torch import distributed

from ..files import is_main_process

Found = TypeVar("Found")
KINDS = (OSError, ValueError, FloatingPointError)  # which recipes tell without a traceback
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "steerbook")  # which results depend on


def of_main(work: Callable[[], Found]) -> Found:
    """What `work` returns in the first process, in all of them. All must call it.

    Raises:
        What `work` raises, in the first process; in the others an error of its kind (`KINDS`) with its text.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return work()
    box: list[Any] = [None, None]
    raised = None
    if is_main_process():
        try:
            box[0] = work()
        except Exception as error:  # raised below, when the others know of it; not sent, as not every error travels
            raised = error
            box[1] = [isinstance(error, kind) for kind in KINDS], str(error)
    distributed.broadcast_object_list(box)
    if raised is not None:
        raise raised
    if box[1] is not None:
        kinds, text = box[1]
        raise next((kind for kind, is_one in zip(KINDS, kinds, strict=True) if is_one), RuntimeError)(text)
    found: Found = box[0]
    return found


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
