"""LoFiT as a PEFT tuner, and its out-of-tree registration."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features, check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import LofitConfig, SteerbookPeftType
from .layer import LofitLayer

# The projection from concatenated head outputs to the residual stream. Names are written with their parent where the
# short name also stands for an MLP's output (GPT-2's c_proj, GPT-NeoX's dense_4h_to_h is distinct but `dense` is not).
OUTPUT_PROJECTIONS: dict[str, list[str]] = {
    **dict.fromkeys(
        ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text", "phi3", "olmo2", "smollm3"],
        ["self_attn.o_proj"],
    ),
    "granite": ["self_attn.o_proj"],
    "gpt2": ["attn.c_proj"],
    "gpt_neox": ["attention.dense"],
    "opt": ["self_attn.out_proj"],
}


class LofitModel(BaseTuner):
    """Injects `LofitLayer` around the output projections that `LofitConfig` selects.

    Raises:
        ValueError: an unknown architecture without `target_modules`, heads that the model does not have, or a head
            width that cannot be read from the model.
    """

    prefix = "lofit_"
    tuner_layer_cls = LofitLayer
    target_module_mapping = OUTPUT_PROJECTIONS

    def _prepare_adapter_config(self, peft_config: LofitConfig, model_config: dict[str, Any]) -> LofitConfig:
        if peft_config.target_modules is None and model_config.get("model_type") not in OUTPUT_PROJECTIONS:
            raise ValueError(
                f"LoFiT does not know where the attention output projection of model_type="
                f"{model_config.get('model_type')!r} is. Name it: LofitConfig(target_modules=['self_attn.o_proj']). "
                f"Known: {', '.join(OUTPUT_PROJECTIONS)}."
            )
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: LofitConfig, model: nn.Module) -> None:
        """Check the selection against the model before anything is changed."""
        if peft_config.heads is None:
            return
        every_head = head_grid(model, peft_config)
        missing = [head for head in peft_config.heads if head[1] >= every_head.get(head[0], 0)]
        if missing:
            raise ValueError(
                f"the model has no head {missing[0]} ({len(missing)} of {len(peft_config.heads)} selected heads are "
                f"out of range): it has layers 0-{max(every_head)} with {every_head[max(every_head)]} heads each. "
                "Were the heads selected on another model?"
            )

    @staticmethod
    def _check_target_module_exists(peft_config: LofitConfig, key: str) -> Any:
        found = check_target_module_exists(peft_config, key)
        if found is True or isinstance(found, re.Match):
            return peft_config.heads is None or layer_index(key) in {layer for layer, _ in peft_config.heads}
        return found

    def _create_and_replace(
        self,
        peft_config: LofitConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, nn.Linear | Conv1D):
            raise ValueError(
                f"LoFiT edits the input of linear projections; {current_key} is a {type(base).__name__}. "
                "Check target_modules."
            )
        layer = target
        if not isinstance(layer, LofitLayer):
            head_dim = find_head_dim(self.model, parent, base, current_key, peft_config)
            layer = LofitLayer(target, head_dim)
        heads = range(layer.num_heads)
        if peft_config.heads is not None:
            index = layer_index(current_key)
            heads = [head for at, head in peft_config.heads if at == index]  # type: ignore[assignment]
        layer.update_layer(adapter_name, peft_config, heads, inference_mode=peft_config.inference_mode)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Parameters start in fp32; only an explicit `autocast_adapter_dtype=False` gives them the base's dtype."""
        if autocast_adapter_dtype:
            return super()._cast_adapter_dtype(adapter_name, True)
        for layer in self.modules():
            if isinstance(layer, LofitLayer):
                BaseTunerLayer._move_adapter_to_device_of_base_layer(layer, adapter_name)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        bare = {
            name
            for name, module in self.model.named_modules()
            if isinstance(module, LofitLayer) and module.bias is None
        }
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        if merge and any(model.get_submodule(name).bias is not None for name in bare):
            warnings.warn(
                "the merged offsets live in output-projection biases that this architecture's checkpoint does not "
                "have; save_pretrained followed by from_pretrained would drop them without an error. Save with "
                "steerbook.trainers.lofit.export_merged instead.",
                stacklevel=3,
            )
        return model


def layer_index(key: str) -> int:
    """Index of the layer a module belongs to: the first number in its name."""
    match = re.search(r"(?:^|\.)(\d+)\.", key)
    if match is None:
        raise ValueError(f"{key} has no layer number in its name, so heads=[(layer, head), ...] cannot address it")
    return int(match.group(1))


def find_head_dim(
    model: nn.Module, parent: nn.Module, projection: nn.Module, key: str, peft_config: LofitConfig
) -> int:
    """Width of one head, from the config, else from the attention module around the projection."""
    in_features, _ = _get_in_out_features(projection)
    attributes = vars(parent)
    head_dim = peft_config.head_dim or attributes.get("head_dim") or attributes.get("head_size")
    if head_dim is None:
        raise ValueError(
            f"{type(parent).__name__} ({key}) does not say how wide a head is; pass LofitConfig(head_dim=...)"
        )
    if in_features % head_dim != 0:
        raise ValueError(f"{key} takes {in_features} numbers, which is not a multiple of head_dim={head_dim}")
    config = vars(model).get("config")
    if config is not None and peft_config.head_dim is None:
        heads = config.get_text_config().num_attention_heads
        if heads * head_dim != in_features:
            raise ValueError(
                f"{key} takes {in_features} numbers, but the config says {heads} heads and the attention module "
                f"head_dim={head_dim}; pass LofitConfig(head_dim=...) if this projection is the right one"
            )
    return head_dim


def head_grid(model: nn.Module, peft_config: LofitConfig) -> dict[int, int]:
    """Number of query heads of each layer that `target_modules` matches: `{layer: heads}`.

    Args:
        model: the base model (already edited or not).
        peft_config: says which modules count; `heads` is ignored.
    """
    grid: dict[int, int] = defaultdict(int)
    modules = dict(model.named_modules())
    for key, module in modules.items():
        if key and check_target_module_exists(peft_config, key) and ".base_layer" not in key:
            if isinstance(module, LofitLayer):
                heads = module.num_heads
            else:
                base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
                parent = modules[key.rpartition(".")[0]]
                heads = _get_in_out_features(base)[0] // find_head_dim(model, parent, base, key, peft_config)
            grid[layer_index(key)] = heads
    return dict(grid)


def register() -> None:
    """Make PEFT (and so transformers and TRL) know LoFiT. Importing `steerbook` or this package does it.

    PEFT's `register_peft_method` takes only members of its closed `PeftType`, so the three tables behind it are filled
    directly. Loading a LoFiT adapter therefore needs `import steerbook` first.
    """
    name = SteerbookPeftType.LOFIT
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(name)  # type: ignore[call-overload]
    if known not in (None, LofitModel):
        raise ImportError(
            f"the PEFT method LOFIT is already taken by {known.__module__}.{known.__qualname__}: was this package "
            "imported under two names?"
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[name] = LofitConfig  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[name] = LofitModel  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[name] = LofitModel.prefix  # type: ignore[index]
