"""Fits on images with the signatures of `stages.py`, a `ZeroShot` in the tokenizer's place; bases and vectors."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerBase, set_seed

from ..cache import build_once
from ..fingerprint import model_fingerprint
from ..processes import of_main
from ..training import anew
from .clip_names import from_open_clip, is_open_clip
from .composer import Composer
from .extract import folder_of
from .images import AtlasImageConfig, AtlasImageTrainer, ImageTrainer
from .matching import check_same, listed
from .model_files import _files, read_tensor
from .stages import FINISHED, Fit, KeepBest, _run
from .task_vector import TaskVector
from .zero_shot import ZeroShot

FORMAT = 1  # raise it when the same settings would give other vectors
TOWER = ("vision_model.", "visual_projection.")  # of a CLIPModel's parameter names: the image tower


def fit_coefficients(
    composer: Composer,
    zero_shot: ZeroShot,
    rows: Dataset,
    args: AtlasImageConfig,
    out_dir: Path,
    keep: KeepBest | None = None,
    **changes: Any,
) -> Fit:
    """Learn the coefficients in `out_dir`; see `stages.fit_coefficients`."""
    args = anew(args, output_dir=str(out_dir), **changes)
    set_seed(args.seed)
    if keep is not None:
        args.save_strategy = "no"
    trainer = AtlasImageTrainer(composer, args, rows, zero_shot, None if keep is None else [keep])
    if of_main((out_dir / FINISHED).exists):
        trainer._load_from_checkpoint(str(out_dir))
        return Fit(**json.loads((out_dir / FINISHED).read_text()))
    return _run(trainer, out_dir, composer.coefficients.numel())


def fine_tune(
    clip: CLIPModel,
    zero_shot: ZeroShot,
    rows: Dataset,
    args: AtlasImageConfig,
    out_dir: Path,
    adapter: None = None,
    norms: bool = False,
    **changes: Any,
) -> tuple[CLIPModel, Fit]:
    """Fine-tune a copy's image tower, or with `norms` its LayerNorms alone; an interrupted fit starts anew.

    Raises ValueError for an adapter.
    """
    if adapter is not None:
        raise ValueError("adapters are not trained on images; leave the arm lora out")
    args = anew(args, output_dir=str(out_dir), save_strategy="no", **changes)
    set_seed(args.seed)
    tuned = copy.deepcopy(clip).requires_grad_(False)
    for module_name, module in tuned.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            inside = f"{module_name}.{name}".startswith(TOWER)
            parameter.requires_grad_(inside and (not norms or isinstance(module, nn.LayerNorm)))
    trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    fit = _run(ImageTrainer(tuned, args, rows, zero_shot), out_dir, trained, save=False)
    return tuned.eval(), fit


def load_clip(
    name: str | None, revision: str | None, tiny: Callable[[], Path], keep_in: Path | None = None,
    device: torch.device | str = "cpu",
) -> tuple[CLIPModel, PreTrainedTokenizerBase, Any]:  # fmt: skip
    """Model (fp32, in eval mode), tokenizer and image processor of a folder or Hub id; without one, of `tiny()`.

    Args:
        keep_in: a run's folder, into which the tiny base is copied as `base_model`.

    Raises:
        OSError: not to be had, no CLIP, or without safetensors weights.
    """
    if name is None:
        folder = tiny()
        if keep_in is not None:
            shutil.copytree(folder, keep_in / "base_model", dirs_exist_ok=True)
            folder = keep_in / "base_model"
        name, revision = str(folder), None
    try:
        model = CLIPModel.from_pretrained(name, revision=revision, use_safetensors=True, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        processor = CLIPImageProcessorPil.from_pretrained(name, revision=revision)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise OSError(
            f"cannot load --base {name}: not a CLIP with safetensors weights in a folder or on the Hub "
            f"({str(error).splitlines()[0]})"
        ) from error
    return model.to(device).eval(), tokenizer, processor


def image_vectors(
    clip: CLIPModel, zero_shot: ZeroShot, rows: Dataset, content: str, args: AtlasImageConfig, learning_rate: float,
    report: Callable[[str], None],
) -> dict[str, TaskVector]:  # fmt: skip
    """Task -> vector, the image tower fine-tuned on that task's rows; made once and cached.

    Args:
        content: a fingerprint of the rows.
        args: steps, batch and seed of each fit; its `output_dir` is not used.
        report: told when a vector is there.
    """
    settings = {
        "format": FORMAT, "base": model_fingerprint(clip), "rows": content, "seed": args.seed,
        "steps": args.max_steps, "rows_a_step": args.per_device_train_batch_size, "learning_rate": learning_rate,
        "crop_scale": args.crop_scale, "flip": args.flip, "weight_decay": args.weight_decay,
    }  # fmt: skip
    vectors = {}
    for task in dict.fromkeys(rows["task"][:]):

        def build(folder: Path, task: str = task) -> None:
            folder.mkdir()
            one = rows.filter(lambda name: name == task, input_columns="task")
            tuned, _ = fine_tune(clip, zero_shot, one, args, folder, learning_rate=learning_rate)
            vector = TaskVector.from_state_dicts(tower(clip), tower(tuned))
            TaskVector(vector.tensors, base=settings["base"], source=task).save(folder / "vector.safetensors")

        folder = build_once("image-vector", {**settings, "task": task}, build)
        vectors[task] = TaskVector.load(folder / "vector.safetensors")
        report(task)
    return vectors


def given_image_vectors(clip: CLIPModel, sources: Sequence[str]) -> dict[str, TaskVector]:
    """Name -> vector of `PATH` or `name=PATH` entries: fine-tuned image towers or whole CLIPs (folders, Hub ids),
    saved vectors (`.safetensors`), or safetensors files of open_clip towers.

    Raises:
        ValueError: two of one name, another architecture, a text tower that was trained, too.
        OSError: a source that cannot be read.
    """
    base, known = {name: p.detach() for name, p in clip.named_parameters()}, model_fingerprint(clip)
    vectors: dict[str, TaskVector] = {}
    for entry in sources:
        name, _, source = entry.rpartition("=")
        name = name or Path(source).name.removesuffix(".safetensors")
        if name in vectors:
            raise ValueError(f"--task_vectors: two are called {name!r}; name them, as in cars={source}")
        vectors[name] = _tower_vector(base, source, known)
    return vectors


def tower(clip: CLIPModel) -> dict[str, Tensor]:
    """The image tower's parameters by name."""
    return {name: p.detach() for name, p in clip.named_parameters() if name.startswith(TOWER)}


def _tower_vector(base: dict[str, Tensor], source: str, known: str) -> TaskVector:
    if source.endswith(".safetensors"):
        files = dict.fromkeys(_keys_of(Path(source)), Path(source))
        if not is_open_clip(files):
            return TaskVector.load(source)
    else:
        files = _files(folder_of(source))
    tensors = {key: read_tensor(file, key) for key, file in files.items()}
    if is_open_clip(tensors):
        tensors = from_open_clip(tensors)
    # CLIPVisionModel's own names have no prefix since transformers 5; its files mostly still do.
    named = {key if key in base else f"vision_model.{key}": value for key, value in tensors.items()}
    changed_text = sorted(
        name for name, value in named.items()
        if name in base and not name.startswith(TOWER) and not torch.equal(value.float(), base[name].float().cpu())
    )  # fmt: skip
    if changed_text:
        raise ValueError(
            f"{source} differs from the base outside of the image tower, too ({listed(changed_text)}); the zero-shot "
            "head is the base's, so only towers that were tuned against a frozen text tower can be composed"
        )
    wanted = {name for name in base if name.startswith(TOWER[0])} | (named.keys() & {f"{TOWER[1]}weight"})
    tuned = {name: value for name, value in named.items() if name in wanted}
    expected = {name: base[name].shape for name in wanted}
    check_same(expected, {name: value.shape for name, value in tuned.items()}, "the base's image tower", source)
    before = {name: base[name].cpu() for name in tuned}
    vector = TaskVector.from_state_dicts(before, tuned)
    return TaskVector(vector.tensors, base=known, source=source)


def _keys_of(file: Path) -> list[str]:
    from .model_files import open_safetensors

    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    with open_safetensors(file) as content:
        return list(content.keys())
