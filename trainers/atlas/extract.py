"""Task vectors from checkpoints: folders or Hub ids of models, and PEFT LoRA adapters.

    python -m steerbook.trainers.atlas.extract BASE TUNED OUT [--dtype bfloat16] [--base_revision R] [--revision R]

writes OUT, one safetensors file. Tensors are read one at a time; no model is loaded.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from ...console import clear_errors
from ..fingerprint import tensors_fingerprint
from .task_vector import Entry, LazyTensors, LowRank, TaskVector, check_same, difference


def task_vector(
    base: str, tuned: str, *, base_revision: str | None = None, revision: str | None = None,
    dtype: torch.dtype | None = None,
) -> TaskVector:  # fmt: skip
    """The vector from `base` to `tuned`, read lazily.

    Args:
        base: folder or Hub id of the base model.
        tuned: a file written by `TaskVector.save`, a LoRA adapter (folder or Hub id), or a fine-tuned model of the
            base's architecture.
        dtype: of the differences; default: that of the tuned checkpoint.

    Raises:
        ValueError: not a model of the same architecture, missing or misshapen tensors, an adapter that is not a plain
            LoRA or was made for another base; the names are listed.
        OSError: no such folder or Hub id, no safetensors weights, a corrupt file (named).
    """
    if tuned.endswith(".safetensors"):
        return TaskVector.load(tuned)
    before = Checkpoint(folder_of(base, base_revision))
    folder = folder_of(tuned, revision)
    if (folder / "adapter_config.json").is_file():
        return from_adapter(before, folder, tuned)
    after = Checkpoint(folder)
    if after.config.model_type != before.config.model_type:
        raise ValueError(
            f"{tuned} is a {after.config.model_type!r} model, the base {base} {before.config.model_type!r}"
        )
    check_same(before.shapes, after.shapes, base, tuned)
    return TaskVector(_Difference(before, after, dtype), base=before.fingerprint(), source=tuned)


def folder_of(name: str, revision: str | None = None) -> Path:
    """A local folder, or that of a Hub model's downloaded configuration and safetensors files."""
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"{name}: no such folder (a Hub id has the form owner/name)")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise OSError(f"{name}: neither a folder nor to be had from the Hub ({reason})") from error


class Checkpoint(LazyTensors):
    """A model's floating-point parameters by `named_parameters()` name, read from its safetensors files when asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} has no config.json; give the folder of a model")
        self.config = AutoConfig.from_pretrained(folder)
        files = _files(folder)
        model = _empty_model(self.config)
        self._places: dict[str, tuple[Path, str]] = {}
        self.shapes = {}
        missing = []
        for names, parameter in _named(model):
            key = next((key for name in names for key in _keys(name, model.base_model_prefix) if key in files), None)
            if key is None:
                missing.append(names[0])
                continue
            self._places[names[0]] = (files[key], key)
            self.shapes[names[0]] = parameter.shape
        if missing:
            raise ValueError(
                f"{folder} lacks {', '.join(missing[:5])}" + (f" and {len(missing) - 5} more" if missing[5:] else "")
                + ": its files do not hold this model's tensors by name; load both models and use "
                "TaskVector.from_state_dicts"
            )  # fmt: skip
        for name, (file, key) in self._places.items():
            with _open(file) as content:
                self.shapes[name] = torch.Size(content.get_slice(key).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        file, key = self._places[name]
        with _open(file) as content:
            return content.get_tensor(key)

    def fingerprint(self) -> str:
        """`model_fingerprint` of the model, without loading it."""
        return tensors_fingerprint(self)


class _Difference(LazyTensors):
    def __init__(self, base: Checkpoint, tuned: Checkpoint, dtype: torch.dtype | None) -> None:
        self.base, self.tuned, self.dtype = base, tuned, dtype
        self.shapes = tuned.shapes

    def __getitem__(self, name: str) -> Tensor:
        return difference(self.base[name], self.tuned[name], self.dtype)


class _Factors(LazyTensors):
    def __init__(self, file: Path, targets: Mapping[str, tuple[str, str, float, bool]], shapes: dict) -> None:
        self.file, self.targets, self.shapes = file, targets, shapes

    def __getitem__(self, name: str) -> Entry:
        a, b, scale, transposed = self.targets[name]
        with _open(self.file) as content:
            left, right = content.get_tensor(a), content.get_tensor(b)
        return LowRank(right.T, left.T, scale) if transposed else LowRank(left, right, scale)


def from_adapter(base: Checkpoint, folder: Path, source: str = "") -> TaskVector:
    """A LoRA adapter as factors: `scale * b @ a` for each target matrix, which is never multiplied out.

    Raises:
        ValueError: not a plain LoRA (DoRA, trained biases, `modules_to_save`), or made for other shapes.
    """
    settings = json.loads((folder / "adapter_config.json").read_text())
    source = source or str(folder)
    odd = {
        "peft_type": settings.get("peft_type") != "LORA",
        "use_dora": settings.get("use_dora"),
        "bias": settings.get("bias", "none") != "none" or settings.get("lora_bias"),
        "modules_to_save": settings.get("modules_to_save"),
        "trainable_token_indices": settings.get("trainable_token_indices"),
    }
    if any(odd.values()):
        found = ", ".join(f"{name}={settings.get(name)!r}" for name, is_odd in odd.items() if is_odd)
        raise ValueError(f"{source} is not a plain LoRA adapter ({found}); merge it into its base and give that model")
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{source} has no adapter_model.safetensors")
    with _open(file) as content:
        sizes = {key: torch.Size(content.get_slice(key).get_shape()) for key in content.keys()}
    targets, shapes = {}, {}
    for key in sizes:
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        name, other = f"{module}.weight", key.replace(".lora_A.", ".lora_B.")
        if name not in base.shapes or other not in sizes:
            raise ValueError(f"{source} adapts {module}, which the base {base.folder.name} does not have")
        rank = sizes[key][0]
        alpha = _pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        shape = torch.Size((sizes[other][0], sizes[key][1]))
        transposed = bool(settings.get("fan_in_fan_out"))
        shapes[name] = shape[::-1] if transposed else shape
        targets[name] = (key, other, scale, transposed)
    unknown = sorted(key for key in sizes if ".lora_A.weight" not in key and ".lora_B.weight" not in key)
    if unknown or not targets:
        raise ValueError(f"{source} holds {', '.join(unknown[:5]) or 'no LoRA matrices'}, not just LoRA matrices")
    check_same({name: base.shapes[name] for name in shapes}, shapes, base.folder.name, source)
    return TaskVector(_Factors(file, targets, shapes), base=base.fingerprint(), source=source)


def _pattern(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    """PEFT's `alpha_pattern`: the value of the first key that the module's name ends in."""
    return next((value for key, value in (pattern or {}).items() if f".{module}".endswith(f".{key}")), default)


def _files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = json.loads(index.read_text())["weight_map"]
        absent = sorted({file for file in named.values() if not (folder / file).is_file()})
        if absent:
            raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}, which its index names")
        return {key: folder / file for key, file in named.items()}
    file = folder / "model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no model.safetensors (only safetensors weights are read)")
    with _open(file) as content:
        return dict.fromkeys(content.keys(), file)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise OSError(f"{file} is not a readable safetensors file ({error}); copy or download it again") from error


def _empty_model(config: PreTrainedConfig) -> Any:
    """The model's structure without memory."""
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise ValueError(f"config.json names the architecture {names}, which transformers does not have")
    with torch.device("meta"):
        model = kind(config)
        model.tie_weights()
    return model


def _named(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """Each parameter once, with all names that tied ones have, the one of `named_parameters()` first."""
    names: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), ([], parameter))[0].append(name)
    return list(names.values())


def _keys(name: str, prefix: str) -> list[str]:
    """How checkpoint files may call a parameter: with or without the base model's prefix."""
    return [name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m steerbook.trainers.atlas.extract", description="Save what fine-tuning changed as one file."
    )
    parser.add_argument("base", help="folder or Hub id of the base model")
    parser.add_argument("tuned", help="folder or Hub id of the fine-tuned model, or of a LoRA adapter")
    parser.add_argument("out", help="file to write (.safetensors)")
    parser.add_argument("--dtype", help="of the differences, like float16; default: that of the tuned checkpoint")
    parser.add_argument("--base_revision", help="branch, tag or commit of the base on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit of the tuned model on the Hub")
    options = parser.parse_args(argv)
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, None: None}
    with clear_errors(ValueError, OSError):
        if options.dtype not in dtypes:
            raise ValueError(f"--dtype {options.dtype}: choose float32, float16 or bfloat16")
        if not options.out.endswith(".safetensors"):
            raise ValueError(f"{options.out}: the file's name must end in .safetensors")
        if Path(options.out).exists():
            raise FileExistsError(f"{options.out} exists already; nothing was changed")
        vector = task_vector(
            options.base, options.tuned, base_revision=options.base_revision, revision=options.revision,
            dtype=dtypes[options.dtype],
        )  # fmt: skip
        vector.save(options.out)
        print(f"{options.out}: {len(vector)} tensors, norm {vector.norm():.4g}, base {vector.base}")


if __name__ == "__main__":
    main(sys.argv[1:])
