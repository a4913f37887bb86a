"""Faults of jobs of several processes: each ends with a message, and what can go on goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matrix_models import make_world

ROOT = Path(__file__).parents[1]
FAULTS = {  # what goes wrong in process 1 (or 0), put in front of the recipe; what is read of it
    "killed": ("""
import signal
from transformers import Trainer
step = Trainer.training_step
def killed(trainer, *args, **kwargs):
    if RANK == 1 and trainer.state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainer, *args, **kwargs)
Trainer.training_step = killed
""", "Signal 9 (SIGKILL) received"),
    "no data": ("""
if RANK == 1:
    sys.argv[sys.argv.index("--data_files") + 1] += "-elsewhere"
""", "mquake-elsewhere"),
    "versions": ("""
import importlib.metadata
own = importlib.metadata.version
importlib.metadata.version = lambda name: "0.0.1" if RANK == 1 and name == "peft" else own(name)
""", "error: process 1 has peft 0.0.1, process 0 has "),
    "disk full": ("""
import errno
from steerbook.trainers.lofit import stages
def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "no space left to write the adapter")
stages.save_tuned = full
""", "no space left to write the adapter"),
}  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Runs LoFiT's recipe with two processes, one of which has a fault; its return code and what it printed."""
    folder = tmp_path_factory.mktemp("job")
    world = make_world(folder / "world")

    def run(name: str, fault: str, processes: int = 2) -> tuple[int, str]:
        script = folder / "faulty.py"
        recipe = str(ROOT / "recipes" / "lofit.py")
        begin, end = "import os, runpy, sys\nRANK = int(os.environ['RANK'])\n", f"\nsys.argv[0] = {recipe!r}\n"
        script.write_text(f"{begin}{fault}{end}runpy.run_path(sys.argv[0], run_name='__main__')\n")
        flags = "--arms lofit --k 3 --max_steps 5 --per_device_train_batch_size 2 --save_strategy steps --save_steps 2"
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), str(script),
                   "--dataset", "mquake", "--data_files", str(world / "mquake"), "--model_name_or_path",
                   str(world / "base"),
                   *flags.split(), "--use_cpu", "true", "--output_dir", str(folder / name)]  # fmt: skip
        done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    return folder, run


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_the_job_and_says_what_it_was(job, name):
    _, run = job
    code, text = run(name, FAULTS[name][0])
    assert code != 0 and FAULTS[name][1] in text, text[-3000:]


def test_a_job_whose_worker_was_killed_goes_on(job):
    folder, run = job
    if not (folder / "killed").exists():
        run("killed", FAULTS["killed"][0])
    kept = json.loads(
        (folder / "killed" / "seed_42" / "selection" / "checkpoint-2" / "trainer_state.json").read_text()
    )
    code, text = run("killed", "")
    assert code == 0, text[-3000:]
    log = json.loads((folder / "killed" / "seed_42" / "selection" / "finished.json").read_text())["log"]
    assert json.loads((folder / "killed" / "results.json").read_text())["status"] == "finished"
    assert [entry for entry in log if entry["step"] <= 2] == kept["log_history"]  # the first steps are not taken again


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
