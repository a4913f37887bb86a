"""Two processes learn the coefficients of one: each with the whole model (as DDP), and with its shards (FSDP2)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def coefficients(folder: Path, engine: str, *launcher: str) -> torch.Tensor:
    """Those of tests/distributed_atlas.py, in a process of its own or under a launcher."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, *launcher, str(HERE / "distributed_atlas.py"), str(folder), engine],
        env={**os.environ, "PYTHONPATH": str(HERE)}, cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "coefficients" / "coefficients.safetensors")["coefficients"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> torch.Tensor:
    return coefficients(tmp_path_factory.mktemp("distributed") / "one", "none")


@pytest.mark.parametrize("engine", ["none", "fsdp2"])
def test_two_processes_learn_the_same_as_one(tmp_path, alone, engine):
    found = coefficients(tmp_path / "two", engine, *TORCHRUN)
    assert found.abs().max() > 0.1
    torch.testing.assert_close(found, alone, atol=1e-6, rtol=0)
