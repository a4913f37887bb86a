"""Find the newest checkpoint that is really complete."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)


def newest_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The `checkpoint-N` folder with the highest N whose files can all be read, or None.

    transformers writes checkpoints in place and resumes from the highest number, complete or not; after a kill or on a
    full disk that one may be cut short. Incomplete folders are left alone, with a warning that says what is wrong.
    """
    numbered = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if match and folder.is_dir():
            numbered.append((int(match.group(1)), folder))
    for step, folder in sorted(numbered, reverse=True):
        problem = checkpoint_problem(folder, step)
        if problem is None:
            return folder
        logger.warning("%s is not complete (%s); looking for an earlier one", folder, problem)
    return None


def checkpoint_problem(folder: Path, step: int) -> str | None:
    """What is wrong with a checkpoint, or None. Reads headers and directories, not the tensors."""
    state_file = folder / "trainer_state.json"  # the last file transformers writes
    try:
        state = json.loads(state_file.read_text())
    except FileNotFoundError:
        return "trainer_state.json is missing: the save was interrupted"
    except ValueError:
        return "trainer_state.json is cut short"
    if not isinstance(state, dict):
        return "trainer_state.json holds no object"
    if state.get("global_step") != step:
        return f"trainer_state.json speaks of step {state.get('global_step')}"
    weights = list(folder.rglob("*.safetensors"))  # PEFT saves a second adapter in a folder of its own
    if not weights and not list(folder.glob("pytorch_model_fsdp*")):
        return "it holds no weights"
    for file in weights:
        try:
            with safe_open(file, framework="pt"):  # checks that the header's offsets match the file's size
                pass
        except (SafetensorError, OSError) as error:
            return f"{file.name}: {error}"
    for file in [*folder.glob("*.pt"), *folder.glob("*.pth")]:
        if not zipfile.is_zipfile(file):  # torch's format; a zip's directory is its last part
            return f"{file.name} is cut short"
    return None


def check_launch(folder: Path, processes: int, engine: str | None) -> None:
    """ValueError for a checkpoint of another number of processes, whose batches would have another size, or of another
    engine, whose optimiser transformers would leave out in silence."""
    wrote = len(list(folder.glob("rng_state*.pth")))  # one of each process; none with --save_only_model
    if wrote not in (0, processes):
        raise ValueError(
            f"{folder} was written by {wrote} process{'es' * (wrote > 1)}, and this job has {processes}: start it "
            f"with {wrote} (--num_processes), or anew in another --output_dir"
        )
    kinds = {"DeepSpeed": "global_step*", "FSDP": "optimizer.bin", None: "optimizer.pt"}
    found = [kind for kind, pattern in kinds.items() if list(folder.glob(pattern))]
    if found and engine not in found:
        wrote_it, now = (kind or "neither DeepSpeed nor FSDP" for kind in (found[0], engine))
        raise ValueError(
            f"the optimiser in {folder} was written by {wrote_it}, and this job is run by {now}: launch it with the "
            "same accelerate configuration, or anew in another --output_dir"
        )
