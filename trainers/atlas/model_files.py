"""A model's tensors on disk, by the names that its parameters have in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from ..fingerprint import tensors_fingerprint
from .entries import LazyTensors
from .matching import listed


class Checkpoint(LazyTensors[Tensor]):
    """A model's parameters by `named_parameters()` name, read from its safetensors files when asked.

    Tied ones appear once, unless the files hold them twice with different values: transformers then unties them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} has no config.json; give the folder of a model")
        try:
            self.config = AutoConfig.from_pretrained(folder)
        except (ValueError, OSError) as error:  # transformers' text runs over several lines
            raise ValueError(f"{folder}/config.json: {str(error).splitlines()[0]}") from error
        if getattr(self.config, "quantization_config", None) is not None:
            raise ValueError(f"{folder} holds quantised weights; give the model in its original precision")
        sizes = _shapes(_files(folder))
        self.model = _empty_model(self.config)
        self._places: dict[str, tuple[Path, str]] = {}
        self.shapes = {}
        missing = []
        for names in _names(self.model):
            options = [[key for key in _keys(name, self.model.base_model_prefix) if key in sizes] for name in names]
            there = [(name, keys[0]) for name, keys in zip(names, options, strict=True) if keys]
            if not there:
                missing.append(names[0])
                continue
            kept = [(names[0], there[0][1])]  # under its first name, whichever one the files use
            if len(there) > 1 and not all(self._equal(sizes, there[0][1], key) for _, key in there[1:]):
                kept = there
            for name, key in kept:
                file, self.shapes[name] = sizes[key]
                self._places[name] = (file, key)
        if missing:
            raise ValueError(
                f"{folder} lacks {listed(missing)}: its files do not hold this model's tensors by name; load both "
                "models and use TaskVector.from_state_dicts"
            )

    def __getitem__(self, name: str) -> Tensor:
        return read_tensor(*self._places[name])

    @staticmethod
    def _equal(sizes: Mapping[str, tuple[Path, torch.Size]], one: str, other: str) -> bool:
        same_shape = sizes[one][1] == sizes[other][1]
        return same_shape and torch.equal(read_tensor(sizes[one][0], one), read_tensor(sizes[other][0], other))

    def fingerprint(self) -> str:
        """`model_fingerprint` of the model, without loading it."""
        return tensors_fingerprint(self)


def _files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = read_json(index)["weight_map"]
        absent = sorted({file for file in named.values() if not (folder / file).is_file()})
        if absent:
            raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}, which its index names")
        return {key: folder / file for key, file in named.items()}
    file = folder / "model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no model.safetensors (only safetensors weights are read)")
    with open_safetensors(file) as content:
        return dict.fromkeys(content.keys(), file)


def _shapes(files: Mapping[str, Path]) -> dict[str, tuple[Path, torch.Size]]:
    """Tensor name -> its file and shape; each file is opened once."""
    found = {}
    for file in sorted(set(files.values())):
        with open_safetensors(file) as content:
            there = set(content.keys())
            for key in (key for key, place in files.items() if place == file):
                if key not in there:
                    raise OSError(f"{file} lacks {key}, which its index puts there; copy or download it again")
                found[key] = (file, torch.Size(content.get_slice(key).get_shape()))
    return found


def read_json(file: Path) -> dict[str, Any]:
    """ValueError, naming the file, if it is not JSON."""
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error})") from error


def open_safetensors(file: Path) -> Any:
    """OSError, naming the file, if it is cut short or something else."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise OSError(f"{file} is not a readable safetensors file ({error}); copy or download it again") from error


def read_tensor(file: Path, key: str) -> Tensor:
    with open_safetensors(file) as content:
        return content.get_tensor(key)


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


def _names(model: nn.Module) -> list[list[str]]:
    """Of each parameter all names that tied ones have, the one of `named_parameters()` first."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _keys(name: str, prefix: str) -> list[str]:
    """How checkpoint files may call a parameter: with or without the base model's prefix."""
    return [name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"]
