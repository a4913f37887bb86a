"""recipes/ping.py under two processes: the weights, outcomes, search and prefix of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from test_ping_pretrained import SHORT, base  # noqa: F401 (a fixture)

ROOT = Path(__file__).parents[1]


def test_two_processes_do_what_one_does(base, tmp_path):  # noqa: F811
    """Replies are shared out; the constrained loss counts tokens of the whole step."""
    common = [str(ROOT / "recipes" / "ping.py"), *SHORT, "--model_name_or_path", str(base / "qwen25_7b"),
              "--defences", "false", "--probes", "false", "--controls", "constrained",
              "--learning_rate", "1e-3"]  # fmt: skip
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, launcher, batch in (("one", [], 4), ("two", launch, 2)):
        command = [sys.executable, *launcher, *common, "--per_device_train_batch_size", str(batch),
                   "--output_dir", str(tmp_path / name)]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    start = load_file(base / "qwen25_7b" / "model.safetensors")
    for arm in ("agent", "constrained"):
        one, two = (load_file(tmp_path / name / "seed_42" / arm / "model" / "model.safetensors")
                    for name in ("one", "two"))  # fmt: skip
        assert max(float((one[key] - start[key]).abs().max()) for key in one) > 5e-4
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, atol=1e-5, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
    for arm in ("aligned", "agent", "constrained"):
        found = [
            json.loads((tmp_path / name / "seed_42" / arm / "measured.json").read_text()) for name in ("one", "two")
        ]
        for key in ("sets", "winner", "search", "guarded"):
            assert found[0].get(key) == found[1].get(key)
    lines = [
        (tmp_path / name / "seed_42" / "agent" / "search.jsonl").read_text().splitlines() for name in ("one", "two")
    ]
    assert len(lines[0]) == len(lines[1])  # written once


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
