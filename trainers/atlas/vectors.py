"""The task vectors of a run: given ones, or those of the embedded world, made once and cached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from ..cache import build_once
from ..fingerprint import model_fingerprint
from ..multitask import MultiTaskConfig
from .entries import LowRank
from .extract import task_vector
from .stages import fine_tune
from .task_vector import TaskVector

FORMAT = 1  # raise it when the same settings would give other vectors


@dataclass(frozen=True)
class Making:
    """How one vector is made: learning rate and, for a LoRA, its rank (0: all weights)."""

    learning_rate: float
    rank: int = 0


def embedded_vectors(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Callable[[], Dataset],
    tasks: Sequence[str],
    fingerprint: str,
    args: MultiTaskConfig,
    making: Making,
) -> dict[str, TaskVector]:
    """Task -> vector, fine-tuned from `base` on that task's rows.

    Args:
        rows: gives the rows of all tasks (column `task`), called if a vector must be made.
        fingerprint: names their content.
        args: steps, batch and seed of each fit; its `output_dir` is not used.
    """
    settings = {
        "format": FORMAT, "base": model_fingerprint(base), "rows": fingerprint, "seed": args.seed,
        "steps": args.max_steps, "rows_a_step": args.per_device_train_batch_size, "eos": args.train_eos,
        "warmup": args.warmup_steps, **vars(making),
    }  # fmt: skip
    vectors = {}
    for task in tasks:

        def build(folder: Path, task: str = task) -> None:
            folder.mkdir()
            one = rows().filter(lambda name: name == task, input_columns="task")
            adapter = None
            if making.rank:
                adapter = LoraConfig(r=making.rank, lora_alpha=2 * making.rank, target_modules="all-linear")
            tuned, _ = fine_tune(base, tokenizer, one, args, folder, adapter, learning_rate=making.learning_rate)
            vector = factors(tuned) if making.rank else TaskVector.from_state_dicts(_weights(base), _weights(tuned))
            vector = TaskVector(vector.tensors, base=settings["base"], source=task)
            vector.save(folder / "vector.safetensors")

        folder = build_once("task-vector", {**settings, "task": task}, build)
        vectors[task] = TaskVector.load(folder / "vector.safetensors")
    return vectors


def competent_base(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Callable[[], Dataset],
    fingerprint: str,
    args: MultiTaskConfig,
    learning_rate: float,
) -> PreTrainedModel:
    """The base after a little joint fine-tuning on all tasks, built once and cached: something to forget from."""
    settings = {
        "format": FORMAT, "base": model_fingerprint(base), "rows": fingerprint, "seed": args.seed,
        "steps": args.max_steps, "rows_a_step": args.per_device_train_batch_size, "eos": args.train_eos,
        "warmup": args.warmup_steps, "learning_rate": learning_rate,
    }  # fmt: skip

    def build(folder: Path) -> None:
        tuned, _ = fine_tune(base, tokenizer, rows(), args, folder / "fit", learning_rate=learning_rate)
        tuned.save_pretrained(folder)

    folder = build_once("competent-base", settings, build)
    return type(base).from_pretrained(folder).eval()


def given_vectors(
    model: ModelConfig, sources: Sequence[str], dtype: str
) -> tuple[dict[str, TaskVector], dict[str, TaskVector]]:
    """Name -> vector of `PATH` or `name=PATH` entries (by default the last part of the path), and of these the LoRA
    ones, if all are.

    Raises:
        ValueError: two of one name, or what `task_vector` says.
        OSError: a source that cannot be read.
    """
    kept = None if dtype == "auto" else getattr(torch, dtype)
    vectors: dict[str, TaskVector] = {}
    for source in sources:
        name, _, path = source.rpartition("=")
        name = name or Path(path).name.removesuffix(".safetensors")
        if name in vectors:
            raise ValueError(f"--task_vectors: two are called {name!r}; name them, as in code={path}")
        vectors[name] = task_vector(model.model_name_or_path, path, base_revision=model.model_revision, dtype=kept)
    low_rank = all(len(vector.low_rank) == len(vector) for vector in vectors.values())
    return vectors, vectors if low_rank else {}


def factors(model: PeftModel) -> TaskVector:
    """The LoRA adapter of a model in memory as a task vector."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            found[f"{name}.weight"] = LowRank(a.detach(), b.detach(), module.scaling["default"])
    return TaskVector(found)


def _weights(model: PreTrainedModel) -> dict:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
