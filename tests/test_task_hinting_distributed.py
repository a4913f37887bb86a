"""Two processes (DDP) take the steps of one: the same rows, losses and weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

HERE = Path(__file__).parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def run(folder: Path, normalise: str, *launcher: str):
    """Weights and log of tests/distributed_hinting.py, in a process of its own or under a launcher."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, *launcher, str(HERE / "distributed_hinting.py"), str(folder), normalise],
        env=os.environ, cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "model" / "model.safetensors"), json.loads((folder / "log.json").read_text())


@pytest.mark.parametrize("normalise", ["task_token", "task_row"])
def test_two_processes_take_the_steps_of_one(tmp_path, normalise):
    alone, log = run(tmp_path / "one", normalise)
    both, logs = run(tmp_path / "two", normalise, *TORCHRUN)
    apart = {name: float((alone[name] - both[name]).abs().max()) for name in alone}
    assert any(name.endswith("length_weight") for name in apart) and max(apart.values()) < 1e-6, apart
    for one, two in zip(log, logs, strict=True):
        for key in one:
            if key.startswith(("loss", "tokens", "rows", "weight")):
                assert two[key] == pytest.approx(one[key], rel=1e-4), key
        assert one["rows/sort"] == 6 and one["rows/successor"] == 2
    assert log[0]["loss"] != log[-1]["loss"]
