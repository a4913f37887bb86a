"""Run by test_matrix.py, in one process or under a launcher: recipes in turn, each killed once and started again.

usage: matrix_job.py ENGINE CASES.json, an object of name -> [recipe, flags...]
"""

import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

engine, file = sys.argv[1:]
processes = int(os.environ.get("WORLD_SIZE", "1"))
torch.set_num_threads(1)
if engine == "fsdp2":  # accelerate starts FSDP2 on accelerators only; told that gloo is one, it runs on the CPU too
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)

from transformers import Trainer  # noqa: E402

STEP = Trainer.training_step
WANTED = {"one": "NO", "ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
KILL_AT = 3  # steps, of the first fit that takes so many


class KilledError(BaseException):
    """Stands for the end of the job: nothing catches it."""


def killed_once(trainer, *args, **kwargs):
    state = trainer.accelerator.state
    assert state.distributed_type == WANTED[engine] and state.num_processes == processes, state
    if trainer.state.global_step == KILL_AT:
        Trainer.training_step = STEP
        raise KilledError
    return STEP(trainer, *args, **kwargs)


def recipe(name):
    path = Path(__file__).parents[1] / "recipes" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


for case, (name, *flags) in json.loads(Path(file).read_text()).items():
    Trainer.training_step = killed_once
    try:
        recipe(name).main(flags)
        raise AssertionError(f"{case}: no fit of {KILL_AT} steps")
    except KilledError:
        pass
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the launcher ends the others, which wait for this one
    try:
        recipe(name).main(flags)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    print(f"MATRIX {case}: finished", flush=True)

PartialState().destroy_process_group()  # else a thread of gloo may outlive the interpreter, which then aborts
