"""Task vectors from checkpoints: folders or Hub ids of models, and PEFT LoRA adapters.

    python -m steerbook.trainers.atlas.extract BASE TUNED OUT [--dtype bfloat16] [--base_revision R] [--revision R]

writes OUT, one safetensors file. Tensors are read one at a time; no model is loaded.
"""

from __future__ import annotations

import argparse
import logging
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ...console import clear_errors
from .entries import LazyTensors, LowRank
from .matching import check_same, listed
from .model_files import Checkpoint, open_safetensors, read_json, read_tensor
from .task_vector import TaskVector, difference

logger = logging.getLogger(__name__)

# Settings with which an adapter is more than `scale * b @ a` on some weights, or not on this base.
NOT_PLAIN = (
    "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "monteclora_config", "kasa_config", "arrow_config",
)  # fmt: skip
CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")  # initialisations that take a part out of the weights


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
            LoRA or was made for other shapes, a saved vector of another base; the names are listed.
        OSError: no such folder or Hub id, no safetensors weights, a corrupt file (named).
    """
    before = Checkpoint(folder_of(base, base_revision))
    if tuned.endswith(".safetensors"):
        vector = TaskVector.load(tuned)
        if vector.base not in (None, before.fingerprint()):
            raise ValueError(f"{tuned} was made from the base {vector.base}, but {base} is {before.fingerprint()}")
        return vector
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


class _Difference(LazyTensors[Tensor]):
    def __init__(self, base: Checkpoint, tuned: Checkpoint, dtype: torch.dtype | None) -> None:
        self.base, self.tuned, self.dtype = base, tuned, dtype
        self.shapes = tuned.shapes

    def __getitem__(self, name: str) -> Tensor:
        return difference(self.base[name], self.tuned[name], self.dtype)


class _Factors(LazyTensors[LowRank]):
    def __init__(
        self, file: Path, targets: Mapping[str, tuple[str, str, float, bool]], shapes: dict[str, torch.Size]
    ) -> None:
        self.file, self.targets, self.shapes, self.low_rank = file, targets, shapes, frozenset(shapes)

    def __getitem__(self, name: str) -> LowRank:
        a, b, scale, transposed = self.targets[name]
        left, right = read_tensor(self.file, a), read_tensor(self.file, b)
        return LowRank(right.T, left.T, scale) if transposed else LowRank(left, right, scale)


def from_adapter(base: Checkpoint, folder: Path, source: str = "") -> TaskVector:
    """A LoRA adapter as factors: `scale * b @ a` for each target matrix, which is never multiplied out.

    Raises:
        ValueError: not a plain LoRA (DoRA, trained biases, `modules_to_save`), or made for other shapes.
    """
    settings = read_json(folder / "adapter_config.json")
    source = source or str(folder)
    odd = [name for name in NOT_PLAIN if settings.get(name)]
    odd += ["peft_type"] * (settings.get("peft_type") != "LORA") + ["bias"] * (settings.get("bias", "none") != "none")
    odd += ["init_lora_weights"] * str(settings.get("init_lora_weights")).startswith(CHANGES_BASE)
    if odd:
        found = ", ".join(f"{name}={settings.get(name)!r}" for name in odd)
        raise ValueError(f"{source} is not a plain LoRA adapter ({found}); merge it into its base and give that model")
    _check_named_base(settings.get("base_model_name_or_path"), base, source)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{source} has no adapter_model.safetensors")
    with open_safetensors(file) as content:
        sizes = {key: torch.Size(content.get_slice(key).get_shape()) for key in content.keys()}
    modules = dict(base.model.named_modules())
    targets, shapes = {}, {}
    for key in sorted(key for key in sizes if key.endswith(".lora_A.weight")):
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        name, other = f"{module}.weight", key.replace(".lora_A.", ".lora_B.")
        if name not in base.shapes or other not in sizes:
            raise ValueError(f"{source} adapts {module}, which the base {base.folder.name} does not have")
        rank = sizes[key][0]
        alpha = _pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        shape = torch.Size((sizes[other][0], sizes[key][1]))
        # As PEFT, which overrules `fan_in_fan_out` where it does not fit the layer.
        transposed = isinstance(modules[module], Conv1D)
        shapes[name] = torch.Size(reversed(shape)) if transposed else shape
        targets[name] = (key, other, scale, transposed)
    unknown = sorted(key for key in sizes if not key.endswith((".lora_A.weight", ".lora_B.weight")))
    if unknown or not targets:
        raise ValueError(f"{source} holds {listed(unknown) or 'no LoRA matrices'}, not just LoRA matrices")
    check_same({name: base.shapes[name] for name in shapes}, shapes, base.folder.name, source)
    return TaskVector(_Factors(file, targets, shapes), base=base.fingerprint(), source=source)


def _check_named_base(named: str | None, base: Checkpoint, source: str) -> None:
    """An adapter does not hold its base's fingerprint, but its name: ValueError if that is a folder here with other
    weights, a warning if it only looks like another."""
    if not named or Path(named).name == base.folder.name or named.replace("/", "--") in str(base.folder):
        return
    if Path(named).is_dir() and (Path(named) / "config.json").is_file():
        if Checkpoint(Path(named)).fingerprint() != base.fingerprint():
            raise ValueError(f"{source} was made for {named}, whose weights are not those of {base.folder}")
    else:
        logger.warning("%s says that it was made for %s; it is taken for one for %s", source, named, base.folder.name)


def _pattern(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    """PEFT's `alpha_pattern`: the value of the first key, a regular expression, that ends the module's name."""
    matching = (value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(matching, default)


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
        norm = TaskVector.load(options.out).norm()
        print(f"{options.out}: {len(vector)} tensors, norm {norm:.4g}, base {vector.base}")


if __name__ == "__main__":
    main(sys.argv[1:])
