"""Bases with quantised weights (bitsandbytes): what they do not allow, and adapters beside them, not merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel


def is_quantised(model: Any) -> bool:
    """Whether a model, or the base of an adapted one, holds quantised weights."""
    return bool(getattr(model, "is_quantized", False))


def keep_4bit(model: nn.Module) -> None:
    """On CPUs with AVX512-BF16 the first evaluation would pack 4-bit weights into another form, in place: one that
    cannot be trained through, merged or saved (bitsandbytes 0.50, issue 2078). From now on it does not.

    Raises:
        ValueError: it has done so.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(module.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                f"{name} was evaluated before, and bitsandbytes has packed its 4-bit weights into a form that cannot "
                "be trained through: load the model anew, and give it to the trainer before its first evaluation"
            )
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def absorbed(tuned: PeftModel) -> PreTrainedModel:
    """The base with the adapter in it, for another adapter to be trained over: merged; or, as quantised weights would
    round what is added to them, beside them, frozen, and to the bit what the adapted model gives.

    Beside them it is in no `state_dict()`: keep the adapter's own folder.

    Raises:
        ValueError: see `check_joins`.
    """
    if not is_quantised(tuned):
        return tuned.merge_and_unload()
    layers = _linear_loras(tuned)
    base = tuned.unload()
    for name, layer in layers.items():
        base.get_submodule(name).register_forward_hook(_branch(layer))
    return base


def check_joins(model: PreTrainedModel, config: LoraConfig | None) -> None:
    """ValueError for an adapter that cannot be `absorbed` with this model, which is left as it was."""
    if config is not None and is_quantised(model):
        tuned = get_peft_model(model, config)
        try:
            _linear_loras(tuned)
        finally:
            tuned.unload()


def _linear_loras(tuned: PeftModel) -> dict[str, Any]:
    """An adapter's layers by the names of the modules they are around; ValueError for what is more than `B A x`."""
    config = tuned.peft_config["default"]
    found, odd = {}, [] if isinstance(config, LoraConfig) else [str(config.peft_type)]
    for name, module in tuned.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            found[name] = module
            linear = isinstance(module.get_base_layer(), nn.Linear) and not isinstance(module, ParamWrapper)
            odd += [name] if module.lora_variant or not linear else []
        elif isinstance(module, AuxiliaryTrainingWrapper):
            odd.append(name)
    if odd:
        raise ValueError(
            f"{odd[0]}: beside quantised weights only a LoRA of linear layers can stay (no DoRA, embeddings or layers "
            "trained in full); change the --lora flags, or load the model unquantised"
        )
    return found


def _branch(layer: Any) -> Callable[..., Tensor]:
    a, b, scaling = layer.lora_A["default"], layer.lora_B["default"], layer.scaling["default"]
    a.requires_grad_(False), b.requires_grad_(False)

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (b(a(args[0].to(a.weight.dtype))) * scaling).to(output.dtype)

    return add
