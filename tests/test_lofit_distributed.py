"""The L1 penalty counts once per optimiser step, however many processes share the batch."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent


def scales(folder: Path, *launcher: str) -> dict[str, torch.Tensor]:
    """Trained scales of tests/distributed_lofit.py in a process of its own, or under a launcher."""
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    script = [str(HERE / "distributed_lofit.py"), str(folder)]
    done = subprocess.run(
        [sys.executable, *launcher, *script], env=env, cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_two_processes_train_the_same_scales_as_one(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = scales(tmp_path / "one")
    two = scales(tmp_path / "two", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    assert one.keys() == two.keys() and len(one) == 3
    for name, tensor in one.items():
        # The token counts of the two halves are equal here, so the mean loss is the same sum in another order.
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
