"""What becomes of learned coefficients: plain models, LoRA adapters, mergekit recipes.

    python -m steerbook.trainers.atlas.export COEFFICIENTS.json OUT --base BASE --task_vectors A B [--as model]

COEFFICIENTS.json is what a run leaves in an arm's folder; the vectors are given as to the recipe, in the same order.
OUT is a folder (--as model, the default; --as adapter for LoRA vectors) or a file (--as mergekit).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from ...console import clear_errors
from ...files import replacing
from ..base_model import load_base
from ..export import check_logits, eval_mode, probe_logits, refuse_existing, whole_folder
from .coefficients import apply_coefficients, check_finite, load_coefficients, members, saved_composer
from .composer import Composer
from .entries import LowRank
from .low_rank import LowRankComposer, lora_config, module_name
from .vectors import given_vectors

MERGEKIT_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def export_folded(
    composer: Composer | LowRankComposer, tokenizer: PreTrainedTokenizerBase | None, out_dir: str | Path
) -> Path:
    """Save the composed model as an ordinary folder that needs none of our code, and prove that it reloads.

    Sums are taken in the composer's type and rounded to the nearest weight, also where training rounds at random. The
    folder appears when every reloaded tensor has equalled what was composed, and, of a language model, the logits
    those of the composer. A `Composer`'s model is composed again, a `LowRankComposer`'s is left as it was.

    Args:
        tokenizer: saved beside the weights; None saves none.
        out_dir: must not exist yet.

    Raises:
        FileExistsError: `out_dir` exists.
        ValueError: a quantised base (compose its vectors on the plain one, see `apply_coefficients`), sharded
            weights, or coefficients that are not finite.
        RuntimeError: the reloaded model is another; nothing is left on disk.
    """
    out_dir = refuse_existing(out_dir)
    check_finite(composer.coefficients)
    with _composed(composer) as plain, eval_mode(composer.model):
        speaks = plain.can_generate()
        expected = probe_logits(composer.model) if speaks else None
        with whole_folder(out_dir) as scratch:
            plain.save_pretrained(scratch)
            if tokenizer is not None:
                tokenizer.save_pretrained(scratch)
            reloaded = type(plain).from_pretrained(scratch, dtype=plain.dtype)
            found = reloaded.state_dict()
            odd = [n for n, t in plain.state_dict().items() if n not in found or not torch.equal(found[n], t.cpu())]
            if odd:
                raise RuntimeError(f"the exported folder reloads with other values in {odd[:5]}; it was removed")
            if expected is not None:
                check_logits(reloaded.to(composer.coefficients.device).eval(), expected)
    return out_dir


def export_adapter(composer: LowRankComposer, out_dir: str | Path, rank: int | None = None) -> dict[str, float]:
    """Save the composition as one ordinary PEFT LoRA adapter: exact, its rank the sum of the vectors' ranks.

    `PeftModel.from_pretrained(base, out_dir)` loads it, on a quantised base too. Coefficients and scales are in
    `lora_B`, in fp32 or wider.

    Args:
        rank: cut every matrix of a higher rank to its best approximation of this one, by SVD of the factors.
        out_dir: must not exist yet; it appears whole or not at all.

    Returns:
        Relative Frobenius error of what is added to each target matrix, by parameter name; 0 where nothing was cut.

    Raises:
        FileExistsError: `out_dir` exists.
        ValueError: `rank` below 1, or coefficients that are not finite.
    """
    out_dir = refuse_existing(out_dir)
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank}: an adapter has at least rank 1")
    check_finite(composer.coefficients)
    tensors, ranks, errors = {}, {}, {}
    for block, name in enumerate(composer.block_names):
        entry, errors[name] = _cut(composer.folded(block), rank)
        ranks[module_name(name)] = len(entry.a)
        key = f"base_model.model.{module_name(name)}"
        tensors[f"{key}.lora_A.weight"] = entry.a.cpu().contiguous()
        tensors[f"{key}.lora_B.weight"] = entry.b.cpu().contiguous()
    config = lora_config(ranks, any(layer.fan_in_fan_out for layer in composer.layers))
    config.base_model_name_or_path = composer.model.get_base_model().name_or_path
    config.inference_mode = True
    with whole_folder(out_dir) as scratch:
        config.save_pretrained(str(scratch))
        save_file(tensors, scratch / "adapter_model.safetensors", {"format": "pt"})
    return errors


def mergekit_yaml(composer: Composer | LowRankComposer, base: str, sources: Sequence[str]) -> str:
    """A recipe for `mergekit-yaml RECIPE OUT_DIR` that makes the same model from published ones.

    Every parameter gets an entry of its own, 0 where nothing is composed. mergekit takes the first entry whose filter
    occurs in a tensor's name, so longer names come first. The base model's prefix is left off them: mergekit knows
    some architectures (GPT-2) without it. A tensor unknown to us has no weight, at which mergekit stops.

    Args:
        base: folder or Hub id of the base model.
        sources: those of the tuned models, in the order of the task vectors; `BASE+ADAPTER` for a LoRA adapter (then
            run mergekit with `--lora-merge-dtype float32`).

    Raises:
        ValueError: partitions, which a recipe cannot express; another number of sources, the same source twice or the
            base among them; fp64 weights, which mergekit does not know.
    """
    if isinstance(composer, Composer) and composer.partitions > 1:
        raise ValueError(
            f"mergekit has one weight a tensor, but these blocks have {composer.partitions} parts; use export_folded"
        )
    weights = composer.weights if isinstance(composer, LowRankComposer) else composer.coefficients
    check_finite(weights)
    if len(sources) != len(weights) or len({base, *sources}) != len(sources) + 1:
        raise ValueError(f"sources={list(sources)}: name {len(weights)} different models that are not the base {base}")
    model: Any = composer.model.get_base_model() if isinstance(composer, LowRankComposer) else composer.model
    if model.dtype not in MERGEKIT_TYPES:
        raise ValueError(f"mergekit does not know weights of the type {model.dtype}")
    columns = {name: block for block, names in enumerate(members(composer).values()) for name in names}
    filters = {}
    composed: dict[int, int] = {}  # parameter -> block, for names of tied ones
    for name, parameter in model.named_parameters(remove_duplicate=False):
        name = name.replace(".base_layer.", ".")
        if ".lora_" in name:
            continue
        block = columns.get(name, composed.get(id(parameter)))
        if block is not None:
            composed[id(parameter)] = block
        filters[name.removeprefix(f"{model.base_model_prefix}.")] = block
    order = sorted(filters.items(), key=lambda item: -len(item[0]))
    rows = weights.detach().cpu().tolist()
    models = [
        {
            "model": source,
            "parameters": {
                "weight": [{"filter": name, "value": 0.0 if b is None else row[b]} for name, b in order],
            },
        }
        for source, row in zip(sources, rows, strict=True)
    ]
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": models,
        "parameters": {"normalize": False},
        "dtype": "float32",  # of the sums
        "out_dtype": MERGEKIT_TYPES[model.dtype],
    }
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=1000)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m steerbook.trainers.atlas.export", description="Make a model of saved coefficients."
    )
    parser.add_argument("coefficients", help="a coefficients.json")
    parser.add_argument("out", help="folder or file to write; must not exist yet")
    parser.add_argument("--base", required=True, help="folder or Hub id of the base model")
    parser.add_argument("--task_vectors", required=True, nargs="+", help="models, adapters or saved vectors, in order")
    parser.add_argument("--as", dest="form", choices=("model", "adapter", "mergekit"), default="model")
    options = parser.parse_args(argv)
    with clear_errors(ValueError, OSError):
        refuse_existing(options.out)
        saved = load_coefficients(options.coefficients)
        config = ModelConfig(model_name_or_path=options.base)
        model, tokenizer = load_base(config, Path)  # with a name nothing is built
        vectors, lora = given_vectors(config, options.task_vectors, "auto")
        composer: Composer | LowRankComposer
        if lora and saved.kind in ("tensor", "per_factor"):
            mode: Any = "per_factor" if saved.kind == "per_factor" else "per_product"
            composer = LowRankComposer(model, list(lora.values()), mode)
        elif options.form == "adapter":
            raise ValueError("--as adapter is for coefficients of LoRA vectors, one for each matrix; use --as model")
        else:
            composer = saved_composer(saved, model, list(vectors.values()))
        apply_coefficients(composer, saved)
        if options.form == "model":
            export_folded(composer, tokenizer, options.out)
        elif options.form == "adapter":
            assert isinstance(composer, LowRankComposer)
            export_adapter(composer, options.out)
        else:
            paths = [source.rpartition("=")[2] for source in options.task_vectors]
            with replacing(Path(options.out)) as file:
                file.write(mergekit_yaml(composer, options.base, paths).encode())
        print(f"{options.out}: {options.form} of {len(vectors)} task vectors on {options.base}")


@contextmanager
def _composed(composer: Composer | LowRankComposer) -> Iterator[PreTrainedModel]:
    """A plain model with the composed weights."""
    if isinstance(composer, LowRankComposer):
        yield _merged(composer)
        return
    if composer.sharded:
        raise ValueError("the weights are sharded; apply the saved coefficients to a whole model and export that")
    rounding, count = composer.rounding, composer.compositions
    composer.rounding = "nearest"
    try:
        composer.compose()
        yield composer.model
    finally:
        composer.rounding, composer.compositions = rounding, count - 1
        composer.compose()  # with random rounding: the same weights as before


def _merged(composer: LowRankComposer) -> PreTrainedModel:
    """A new model that shares all tensors with the base but the composed ones."""
    base = composer.model.get_base_model()
    state: dict[str, Tensor] = {}
    for name, tensor in base.state_dict().items():
        if ".lora_" not in name:
            state[name.replace(".base_layer.", ".")] = tensor
    for block, (name, layer) in enumerate(zip(composer.block_names, composer.layers, strict=True)):
        weight = state[name]
        if not weight.is_floating_point():
            raise ValueError(
                f"{name} is quantised ({weight.dtype}); save the coefficients, apply them on the unquantised base, "
                "and export that, or export an adapter"
            )
        delta = composer.folded(block).dense()
        delta = delta.T if layer.fan_in_fan_out else delta
        state[name] = (weight.to(delta.dtype) + delta).to(weight.dtype)
    with init_empty_weights():
        plain = type(base)._from_config(base.config, dtype=base.dtype)
    plain.load_state_dict(state, strict=True, assign=True)
    plain.tie_weights()
    plain.generation_config = base.generation_config
    return plain.eval()


def _cut(entry: LowRank, rank: int | None) -> tuple[LowRank, float]:
    """The entry, or its best approximation of a rank, and the relative error of that."""
    if rank is None or len(entry.a) <= rank:
        return entry, 0.0
    left, inner = torch.linalg.qr(entry.b)
    right, outer = torch.linalg.qr(entry.a.T)
    u, sizes, v = torch.linalg.svd(inner @ outer.T)
    norm = float(sizes.norm())
    error = float(sizes[rank:].norm()) / norm if norm else 0.0
    return LowRank((right @ v[:rank].T).T, (left @ u[:, :rank]) * sizes[:rank]), error


if __name__ == "__main__":
    main(sys.argv[1:])
