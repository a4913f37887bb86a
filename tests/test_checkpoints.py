"""The newest checkpoint that is whole, among those that a kill or a full disk cut short."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from steerbook.trainers.checkpoints import check_launch, checkpoint_problem, newest_complete_checkpoint


def write(folder, step, *, shards=1):
    """What transformers writes for an adapter, `trainer_state.json` last."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for shard in range(shards):
        name = "adapter_model.safetensors" if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({"a": torch.randn(50, 20)}, path / name)
    (path / "second").mkdir()
    save_file({"b": torch.randn(9)}, path / "second" / "adapter_model.safetensors")
    torch.save({"state": {0: torch.randn(30)}}, path / "optimizer.pt")
    torch.save({"last_epoch": step}, path / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state()}, path / "rng_state.pth")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    return path


def cut(file, keep=0.6):
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])


def test_the_highest_number_wins_not_the_last_in_the_alphabet(tmp_path):
    for step in (5, 10, 9):
        write(tmp_path, step)
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert newest_complete_checkpoint(str(tmp_path)) == tmp_path / "checkpoint-10"


DAMAGE = {
    "weights cut": lambda path: cut(path / "adapter_model.safetensors"),
    "weights cut by a byte": lambda path: cut(path / "adapter_model.safetensors", 0.9999),
    "weights empty": lambda path: cut(path / "adapter_model.safetensors", 0),
    "weights gone": lambda path: [file.unlink() for file in path.rglob("*.safetensors")],
    "second adapter cut": lambda path: cut(path / "second" / "adapter_model.safetensors"),
    "optimizer cut": lambda path: cut(path / "optimizer.pt"),
    "optimizer empty": lambda path: cut(path / "optimizer.pt", 0),
    "scheduler cut": lambda path: cut(path / "scheduler.pt"),
    "random state cut": lambda path: cut(path / "rng_state.pth"),
    "state cut": lambda path: cut(path / "trainer_state.json"),
    "state empty": lambda path: cut(path / "trainer_state.json", 0),
    "state gone": lambda path: (path / "trainer_state.json").unlink(),
    "state no object": lambda path: (path / "trainer_state.json").write_text("[]"),
    "state of zeros": lambda path: (path / "trainer_state.json").write_bytes(bytes(100)),
    "state of random bytes": lambda path: (path / "trainer_state.json").write_bytes(bytes(range(128, 256))),
    "wrong step": lambda path: (path / "trainer_state.json").write_text('{"global_step": 7}'),
    "everything gone": lambda path: [file.unlink() for file in path.rglob("*") if file.is_file()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_left_alone(damage, tmp_path, caplog):
    good, bad = write(tmp_path, 3), write(tmp_path, 4)
    assert newest_complete_checkpoint(tmp_path) == bad
    DAMAGE[damage](bad)
    remains = {file: file.read_bytes() for file in bad.rglob("*") if file.is_file()}
    assert newest_complete_checkpoint(tmp_path) == good
    assert "checkpoint-4 is not complete" in caplog.text and "earlier" in caplog.text
    assert {file: file.read_bytes() for file in bad.rglob("*") if file.is_file()} == remains
    shutil.rmtree(good)
    assert newest_complete_checkpoint(tmp_path) is None


def test_the_reason_names_the_file(tmp_path):
    path = write(tmp_path, 4)
    cut(path / "optimizer.pt")
    assert checkpoint_problem(path, 4) == "optimizer.pt is cut short"
    (path / "trainer_state.json").write_text('{"global_step": 7}')
    assert "step 7" in checkpoint_problem(path, 4)


def test_one_shard_of_several_cut(tmp_path):
    path = write(tmp_path, 4, shards=3)
    assert newest_complete_checkpoint(tmp_path) == path
    cut(path / "model-00002-of-00003.safetensors")
    assert "model-00002-of-00003.safetensors" in checkpoint_problem(path, 4)


def test_other_folders_and_files_are_not_checkpoints(tmp_path):
    write(tmp_path, 2).rename(tmp_path / "checkpoint-2-old")
    write(tmp_path, 2).rename(tmp_path / "my-checkpoint-2")
    (tmp_path / "checkpoint-9").write_text("a file")
    (tmp_path / "checkpoint-").mkdir()
    assert newest_complete_checkpoint(tmp_path) is None


def test_no_folder_and_an_empty_one(tmp_path):
    assert newest_complete_checkpoint(tmp_path) is None
    assert newest_complete_checkpoint(tmp_path / "never") is None


def test_a_checkpoint_of_another_launch(tmp_path):
    for rank in range(2):
        (tmp_path / f"rng_state_{rank}.pth").touch()
    check_launch(tmp_path, 2, "DeepSpeed")
    with pytest.raises(ValueError, match="written by 2 processes, and this job has 4: start it with 2"):
        check_launch(tmp_path, 4, "DeepSpeed")
    (tmp_path / "global_step3").mkdir()
    check_launch(tmp_path, 2, "DeepSpeed")
    with pytest.raises(ValueError, match="written by DeepSpeed, and this job is run by neither"):
        check_launch(tmp_path, 2, None)
    with pytest.raises(ValueError, match="written by DeepSpeed, and this job is run by FSDP"):
        check_launch(tmp_path, 2, "FSDP")
