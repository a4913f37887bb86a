"""Contenders that take turns in one process, so that a slow moment hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def measure(
    contenders: dict[str, Callable[[], None]], rounds: int, repeat: int, device: str
) -> dict[str, list[float]]:
    """Seconds of every contender in every round. CPU time on a CPU (other processes do not count), else wall time."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):  # round 0 warms up
        for name, run in contenders.items():
            start = clock()
            for _ in range(repeat):
                run()
            if device != "cpu":
                torch.cuda.synchronize()
            if number:
                seconds[name].append((clock() - start) / repeat)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, against: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[against], strict=True))
