"""Seeds in processes of their own: their reports, their errors, their deaths."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from steerbook.trainers.seeds import run_seeds


class TooBad(ArithmeticError):
    """An error type of its own, as NonFiniteError is."""


def work(argv: list[str], seed: int, report) -> None:
    """Writes what it was given; `argv` is [folder, what seed 2 does]."""
    folder, trouble = Path(argv[0]), argv[1]
    (folder / f"started-{seed}").write_text(str(os.getpid()))
    report("half")
    if seed == 2 and trouble == "raise":
        raise TooBad("seed 2 is too bad")
    if seed == 2 and trouble == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if seed != 2 and trouble != "none":
        time.sleep(60)
    report("whole")
    (folder / f"finished-{seed}").write_text("")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def run(folder, trouble, seeds=(1, 2), parallel=True):
    run_seeds(work, [str(folder), trouble], seeds, steps=2, preload=["json"], parallel=parallel)


def pids(folder) -> list[int]:
    return [int(path.read_text()) for path in sorted(folder.glob("started-*"))]


def test_every_seed_runs_in_its_own_process_and_reports(tmp_path, capsys):
    run(tmp_path, "none")
    assert {path.name for path in tmp_path.glob("finished-*")} == {"finished-1", "finished-2"}
    one, other = pids(tmp_path)
    assert len({one, other, os.getpid()}) == 3 and not alive(one) and not alive(other)
    out = capsys.readouterr().out
    for seed in (1, 2):
        assert f"seed {seed}: half" in out and f"seed {seed}: whole" in out
    assert "4/4" in out


@pytest.mark.parametrize("parallel", [True, False])
def test_an_error_keeps_its_type_and_stops_the_others(parallel, tmp_path):
    start = time.monotonic()
    with pytest.raises(TooBad, match="seed 2 is too bad") as caught:
        run(tmp_path, "raise", seeds=(1, 2) if parallel else (2, 1), parallel=parallel)
    assert time.monotonic() - start < 30
    if parallel:
        note = "\n".join(caught.value.__notes__)
        assert "process of seed 2" in note and "in work" in note  # the worker's own traceback
        assert not any(alive(pid) for pid in pids(tmp_path))
    assert not list(tmp_path.glob("finished-*"))


def test_a_killed_process_is_reported(tmp_path):
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="seed 2 .*exit code -9"):
        run(tmp_path, "die")
    assert time.monotonic() - start < 30 and not any(alive(pid) for pid in pids(tmp_path))


def test_one_seed_or_no_parallelism_stays_in_this_process(tmp_path):
    run(tmp_path, "none", seeds=(5,))
    run(tmp_path, "none", seeds=(1, 3), parallel=False)
    assert pids(tmp_path) == [os.getpid()] * 3
