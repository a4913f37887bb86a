"""Work shared out among the processes of a job, each of which gets all of the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import distributed

Item = TypeVar("Item")
Result = TypeVar("Result")


def shared_out(items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]) -> list[Result]:
    """`work(items)`, every process doing a part of it; all of them must call this with the same items.

    Every n-th item goes to the n-th process, so that neighbours of one kind are spread.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return list(work(items))
    count, rank = distributed.get_world_size(), distributed.get_rank()
    mine = items[rank::count]
    done = work(mine) if mine else []
    parts: list[list[Result]] = [[] for _ in range(count)]
    distributed.all_gather_object(parts, list(done))
    return [parts[place % count][place // count] for place in range(len(items))]
