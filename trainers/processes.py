"""Several processes of a job that must agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

from ..files import is_main_process

Found = TypeVar("Found")


def of_main(work: Callable[[], Found]) -> Found:
    """What `work` returns in the first process, in all of them, or what it raises there. All must call it."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return work()
    box: list[Any] = [None, None]
    if is_main_process():
        try:
            box[0] = work()
        except Exception as error:  # raised below, in every process
            box[1] = error
    distributed.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    found: Found = box[0]
    return found
