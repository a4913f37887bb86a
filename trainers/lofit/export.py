"""Write a merged model as a plain Hugging Face checkpoint, and prove that it reloads to the same function."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..export import check_logits, eval_mode, probe_logits, refuse_existing, whole_folder
from .layer import LofitLayer


def export_merged(
    model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, out_dir: str | Path
) -> Path:
    """Fold the active LoFiT adapters into the weights and save an ordinary checkpoint without custom code.

    Scales fold into the columns of the output projection everywhere. Offsets become its bias, so the architecture's
    own format must have one: where `attention_bias` exists (Llama, Qwen3, Gemma, ...) it is switched on and the other
    projections get zero biases; Qwen2 and Mistral without a sliding window are written as the Llama they are equal
    to. The folder is complete and checked when it appears; the model is left as it was.

    Args:
        model: a `PeftModel` with LoFiT, or a transformers model with LoFiT adapters loaded into it.
        tokenizer: saved beside the weights; None saves none.
        out_dir: must not exist yet.

    Raises:
        FileExistsError: `out_dir` exists.
        ValueError: no LoFiT in the model, a quantised base, another tuner's layers, or an architecture that has no
            exact plain form.
        RuntimeError: the reloaded checkpoint's logits differ from the model's (nothing is left on disk).
    """
    out_dir = refuse_existing(out_dir)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LofitLayer)}
    check_exportable(base, layers)
    to_merge = [layer for layer in layers.values() if not layer.merged]
    with eval_mode(model):
        expected = probe_logits(model)
        try:
            with whole_folder(out_dir) as scratch:
                for layer in to_merge:
                    layer.merge(safe_merge=True)
                plain = plain_model(base, export_config(base.config, any(map(has_offset, layers.values()))))
                plain.save_pretrained(scratch)
                if tokenizer is not None:
                    tokenizer.save_pretrained(scratch)
                reloaded = AutoModelForCausalLM.from_pretrained(scratch, dtype=base.dtype)
                check_logits(reloaded.to(next(base.parameters()).device).eval(), expected)
        finally:
            for layer in to_merge:
                if layer.merged:
                    layer.unmerge()
    return out_dir


def check_exportable(base: PreTrainedModel, layers: dict[str, LofitLayer]) -> None:
    """Refuse what cannot be written as a plain checkpoint before anything is computed."""
    if not layers:
        raise ValueError("the model holds no LoFiT layers; there is nothing to merge")
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight
        if not weight.dtype.is_floating_point:
            raise ValueError(
                f"{name} is quantised ({weight.dtype}); load the base unquantised with this adapter, and export that"
            )
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, LofitLayer):
            raise ValueError(
                f"the model also holds another tuner's weights ({name}, ...); merge or unload those first"
            )
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(f"{name} was trained in full (modules_to_save), which export_merged does not fold in")


def has_offset(layer: LofitLayer) -> bool:
    """Whether an offset is merged into the layer."""
    return any(name in layer.lofit_offset for name in layer.merged_adapters)


def export_config(config: PreTrainedConfig, offsets: bool) -> PreTrainedConfig:
    """The configuration whose plain model has a bias on every output projection (if `offsets`)."""
    config = copy.deepcopy(config)
    if not offsets:
        return config
    text = config.get_text_config()
    if hasattr(text, "attention_bias"):
        text.attention_bias = True
        return config
    if config.model_type in ("gpt2", "opt"):  # their projections always have a bias
        return config
    if config.model_type in ("qwen2", "mistral"):
        layer_types = set(getattr(config, "layer_types", None) or [])
        window = config.sliding_window if config.model_type == "mistral" or config.use_sliding_window else None
        if window is not None and window < config.max_position_embeddings or "sliding_attention" in layer_types:
            raise ValueError(
                f"this {config.model_type} uses a sliding window of {window} tokens, which Llama's format cannot "
                "express, and its own output projection has no bias: there is no exact plain form. Ship the adapter."
            )
        shared = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "hidden_act max_position_embeddings initializer_range rms_norm_eps tie_word_embeddings "
            "rope_parameters attention_dropout bos_token_id eos_token_id pad_token_id dtype"
        ).split()
        values: dict[str, Any] = {name: getattr(config, name) for name in shared}
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return LlamaConfig(**values, head_dim=head_dim, attention_bias=True, mlp_bias=False)
    raise ValueError(
        f"{config.model_type}'s output projection has no bias in its checkpoint format, so merged offsets have no "
        "exact plain form. Ship the adapter instead (scales alone can be exported)."
    )


def plain_model(base: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of `config` holding the merged weights of `base` (shared, not copied) and zero for biases it lacks."""
    with init_empty_weights():
        plain = AutoModelForCausalLM.from_config(config, dtype=base.dtype)
    state = {}
    for name, tensor in base.state_dict().items():
        if "lofit_" not in name:
            state[name.replace(".base_layer.", ".")] = tensor
    for name, parameter in plain.named_parameters():
        if name not in state:
            if not name.endswith(".bias") or ".layers." not in name:
                raise ValueError(
                    f"the plain {config.model_type} model needs {name}, which the tuned model does not have"
                )
            state[name] = torch.zeros(parameter.shape, dtype=base.dtype)
    plain.load_state_dict(state, strict=True, assign=True)
    plain.tie_weights()
    plain.generation_config = base.generation_config
    return plain.eval()
