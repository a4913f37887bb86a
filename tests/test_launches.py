"""Processes that would train without each other."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_processes_that_would_not_know_of_each_other_are_refused(tmp_path):
    """accelerate's DDP and FSDP configurations on a machine without a GPU: it trains copies, and says nothing."""
    script = tmp_path / "script.py"
    script.write_text("from steerbook.trainers import AgentSFTConfig\n"
                      "AgentSFTConfig(output_dir='x', ddp_backend='gloo', bf16=False)\n")  # fmt: skip
    command = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs" / "ddp.yaml"),
               "--num_processes", "2", str(script)]  # fmt: skip
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, env=env, cwd=tmp_path
    )
    assert done.returncode != 0 and "2 processes were started that would train copies" in done.stderr
