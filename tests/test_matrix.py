"""Every recipe with two CPU processes under DDP, FSDP2, ZeRO-2 and ZeRO-3, against one process with the same batches.

One launch an engine runs all recipes (tests/matrix_job.py), each killed at its fourth step and started again: losses,
trained tensors and all that is measured must be those of one process, which was killed and started again, too. The
configurations are those for GPUs (accelerate_configs/), with two processes.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matrix_models import make_world
from safetensors.torch import load_file

from steerbook.eval.results import read_records

HERE = Path(__file__).parent
ROOT = HERE.parent
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
LORA = ["--use_peft", "true", "--lora_dropout", "0", "--lora_target_modules", "q_proj", "v_proj"]  # masks of dropout
# are drawn by each process, and would differ
LOSS = 2e-5  # of a step's mean loss, up to 10: printed with six digits
WEIGHTS = 2e-5  # which move by 5 steps of up to 1e-2
SCORES = 1e-3  # relative; a report in hundreds follows weights that differ in the fifth digit


def cases(world: Path, out: Path, processes: int, engine: str) -> dict[str, list[str]]:
    """Name -> recipe and flags. The same rows a step, and epochs that the processes divide: else accelerate fills an
    epoch's end up with its first rows."""
    rows = str(4 // processes)
    common = [
        *"--bf16 false --logging_steps 1 --save_strategy steps --save_steps 2 --disable_tqdm true".split(),
        *("--use_cpu true" if engine in ("one", "ddp") else "--ddp_backend gloo").split(),
        *"--adam_epsilon 1e-4".split(),  # else AdamW blows rounding errors of gradients near zero up to whole steps
    ]
    plain = ["--model_name_or_path", str(world / "base"), *common]
    hinting = [
        *"task_hinting --preset smoke --test_rows 5 --test_lengths 3 5 --longest 3 --main increment".split(),
        *"--hints carry --max_steps 5 --learning_rate 0.01".split(), *plain,
    ]  # fmt: skip
    told = [
        *"self_interpretability --preset smoke --instilled 4 --native 2 --never 1 --asked 1 --choices 8".split(),
        *"--eval_batch_size 402 --report_max_steps 3 --learning_rate 1e-3".split(),
        "--scenarios", str(world / "contexts.jsonl"), "--model_name_or_path", str(world / "chat"),
        "--per_device_train_batch_size", rows, "--report_per_device_train_batch_size", rows, *common,
    ]  # fmt: skip
    found = {
        "lofit": ["lofit", "--dataset", "mquake", "--data_files", str(world / "mquake"), "--arms", "lofit", "lora",
                  "--k", "3", "--max_steps", "5", "--per_device_train_batch_size", rows, *plain],
        "hinting": [*hinting, "--arms", "untouched", "standard", "hint_softmax", "--softmax_rule", "learn"],
        "hinting_lora": [*hinting, "--arms", "hint", *LORA],
        "self_lora": [*told, "--max_steps", "5", *LORA],
        "self_all": [*told, "--max_steps", "4", "--levels", "L3", "--controls", "reinstil"],
        "ping": [
            *"ping --preset smoke --dtype float32 --max_length 2048 --max_steps 4 --learning_rate 1e-3".split(),
            *"--gradient_checkpointing false --defences false --probes false".split(),
            "--per_device_train_batch_size", rows, "--model_name_or_path", str(world / "agent"), *common,
        ],
    }  # fmt: skip
    if engine in ("one", "ddp", "zero2"):  # the others are refused: test_quantised.py
        found["hinting_4bit"] = [*hinting, "--arms", "hint", *LORA, "--load_in_4bit", "true"]
    if engine in ("one", "ddp"):  # the others are refused
        found["ping_constrained"] = [*found["ping"], "--controls", "constrained", "--rounds", "1"]
        found["atlas"] = ["atlas", "--base", str(world / "base"), "--task_vectors", f"first={world}/vectors/first",
                          f"second={world}/vectors/second", "--tasks", f"first={world}/first.jsonl",
                          f"second={world}/second.jsonl", "--arms", "alpha", "atlas", "finetune", "--max_steps", "5",
                          "--per_device_train_batch_size", rows, *common]  # fmt: skip
        clip = world / "clip"
        found["atlas_clip"] = [
            *"atlas_clip --preset smoke --sections addition --arms alpha atlas --max_steps 5".split(),
            *"--crop_scale 1 --flip false --templates".split(), "a photo of a {}.", "--base", str(clip / "base"),
            "--task_vectors", *(f"{name}={clip}/{name}_tower" for name in ("mnist", "cars")),
            "--tasks", *(f"{name}={clip}/{name}" for name in ("mnist", "cars")),
            "--per_device_train_batch_size", rows, *common,
        ]  # fmt: skip
    return {name: [*flags, "--output_dir", str(out / name)] for name, flags in found.items()}


def run(world: Path, out: Path, engine: str) -> Path:
    """The folder with the runs of all cases."""
    out.mkdir()
    processes = 1 if engine == "one" else 2
    (out / "cases.json").write_text(json.dumps(cases(world, out, processes, engine)))
    config = ROOT / "accelerate_configs" / f"{engine}.yaml"
    launch = [] if engine == "one" else ["-m", "accelerate.commands.launch", "--config_file", str(config),
                                         "--num_processes", "2"]  # fmt: skip
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # DeepSpeed compiles with ninja
    done = subprocess.run(
        [sys.executable, *launch, str(HERE / "matrix_job.py"), engine, str(out / "cases.json")], cwd=out,
        env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    return run(world, tmp_path_factory.mktemp("matrix") / "one", "one")


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_give_what_one_does(world, alone, tmp_path, engine):
    both = run(world, tmp_path / engine, engine)
    for name in json.loads((both / "cases.json").read_text()):
        one, two = alone / name, both / name
        assert json.loads((two / "results.json").read_text())["status"] == "finished"
        same_tensors(one, two)
        same_records(one, two)
        for log in one.rglob("search.jsonl"):  # written once
            assert len((two / log.relative_to(one)).read_text().splitlines()) == len(log.read_text().splitlines())


def saved(folder: Path) -> dict[Path, Path]:
    """What was trained: files of tensors beside the checkpoints."""
    return {file.relative_to(folder): file for file in sorted(folder.rglob("*.safetensors"))
            if not any(part.startswith("checkpoint-") for part in file.relative_to(folder).parts)}  # fmt: skip


def same_tensors(one: Path, two: Path) -> None:
    first, second = saved(one), saved(two)
    assert first and first.keys() == second.keys()
    for name, file in first.items():
        wanted, found = load_file(file), load_file(second[name])
        assert wanted and wanted.keys() == found.keys()
        for key, tensor in wanted.items():
            message = f"{name}: {key}"
            torch.testing.assert_close(
                found[key], tensor, atol=WEIGHTS, rtol=0, msg=lambda text, m=message: f"{m}: {text}"
            )


def same_records(one: Path, two: Path) -> None:
    seeds = sorted(int(folder.name[5:]) for folder in one.glob("seed_*"))
    first, second = (read_records(folder, seeds, lambda record: record["name"]) for folder in (one, two))
    assert first and first.keys() == second.keys()
    trained = 0
    for seed, arms in first.items():
        assert arms.keys() == second[seed].keys()
        for arm, wanted in arms.items():
            found = second[seed][arm]
            losses = [[entry["loss"] for entry in record.get("log", []) if entry.get("loss") is not None]
                      for record in (wanted, found)]  # fmt: skip
            assert losses[0] == pytest.approx(losses[1], abs=LOSS), arm
            trained += len(losses[0]) > 1
            for record in (wanted, found):
                for key in ("log", "seconds", "peak_memory_bytes"):
                    record.pop(key, None)
            differences = list(apart(wanted, found, arm))
            assert not differences, differences[:5]
    assert trained


def apart(one, two, where):
    """Places where two JSON values differ by more than rounding."""
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        for key in one:
            yield from apart(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        for place, (left, right) in enumerate(zip(one, two, strict=True)):
            yield from apart(left, right, f"{where}/{place}")
    elif isinstance(one, float) and isinstance(two, float):
        if not math.isclose(one, two, rel_tol=SCORES, abs_tol=SCORES):
            yield where, one, two
    elif one != two:
        yield where, one, two
