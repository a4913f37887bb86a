"""What autograd keeps of each layer for its backward pass, in bytes per token, from shapes and flags alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .memory import Launch, Layer, Sizes, Weights

_OUT = re.compile(r"(^|\.)(o_proj|out_proj|c_proj|dense)$")  # of the linear maps of an attention
_DOWN = re.compile(r"(^|\.)(down_proj|c_proj|dense_4h_to_h|fc2)$")  # of those of an MLP
_ATTENTION = re.compile(r"(^|\.)(self_attn|attn|attention)\.")
# Tensors of the inner width that an activation function written in several operations keeps; others keep their input.
_ACTIVATIONS = {"NewGELUActivation": 4, "FastGELUActivation": 4, "QuickGELUActivation": 2}


def model_sizes(model: Any, tokens: int, launch: Launch, *, padded: bool = False, whole_graph: bool = False) -> Sizes:
    """Read them from a transformers model (decoder or vision tower), with or without an adapter; nothing is computed.

    Per token, with width h, a = heads * head_dim, kv the same of keys, inner width i, a number of c bytes in matrix
    products (2 under autocast) and of r in the residual stream:

    - RMSNorm 4 h + 4 (its input in fp32); LayerNorm r h + 8 (its input), 4 h under autocast.
    - attention (sdpa) c (2 a + 2 kv) + 4 heads: queries, output, keys, values, the softmax' logarithms. In a padded
      batch keys and values are repeated for all heads (2 a), and the mask costs c a key. "eager" repeats them, too,
      and keeps the probabilities instead: heads a key, in fp32 and in the products' type where that is another.
    - MLP with a gate 3 c i: gate, up, the activated gate; without one c i for each tensor that the activation keeps.
    - where weights are trained, also the inputs of their matrix products (shared by those that read the same one,
      unless each casts it to another type first), of a norm's weight r h, and c rank for each LoRA.
    - dropout that is switched on: its mask, a byte a number (on a CPU the input's type).

    A layer below the lowest trained one keeps nothing, nor does the lowest one's attention if what is trained comes
    after it (LoFiT, an MLP). Under gradient checkpointing transformers gives the embeddings' output a gradient, and
    all layers keep something.

    Args:
        tokens: longest row.
        padded: whether rows of different lengths share the batch.
    """
    config = model.config
    config = getattr(config, "vision_config", None) or config.get_text_config()
    blocks = _layers(model)
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    everything = {id(parameter): parameter for parameter in model.parameters()}
    outside = [parameter for key, parameter in everything.items() if key not in inside]
    stream = next(p for p in outside if p.is_floating_point()).element_size()
    if launch.half and not launch.autocast:
        stream = 2
    reader = _Reader(config, tokens, stream, 2 if launch.half else stream, launch, padded)
    first = _input_embeddings(model)
    from_below = first is not None and (launch.checkpointing or any(p.requires_grad for p in first.parameters()))
    layers = []
    for block in blocks:
        layers.append(reader.layer(block, from_below))
        from_below = from_below or layers[-1].kept > 0
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tower = getattr(model, "vision_model", model)
    within = {id(module) for block in blocks for module in block.modules()}
    norms = {name: module for name, module in tower.named_modules() if id(module) not in within}
    last = reader.norms(norms)
    return Sizes(
        tuple(layers),
        weights_of(outside),
        config.hidden_size,
        stream,
        reader.compute,
        last if from_below or any(p.requires_grad for p in outside if p.dim() == 1) else 0.0,
        0 if head is None else numbers(head.weight) // config.hidden_size,
        stream if head is None or launch.half and not launch.autocast else head.weight.element_size(),
        head is not None and head.weight.requires_grad,
        head is not None and first is not None and head.weight is first.weight,
    )


def weights_of(parameters: Iterable[nn.Parameter]) -> Weights:
    found = Weights()
    for parameter in parameters:
        count, trained = numbers(parameter), parameter.requires_grad
        size = count * parameter.element_size()
        found += Weights(size, count, trained * count, trained * size, trained * size)
    return found


def numbers(parameter: Any) -> int:
    """How many it has; DeepSpeed's ZeRO-3 leaves an empty tensor of one that it has cut over the processes."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _layers(model: nn.Module) -> nn.ModuleList:
    """The list of layers that are alike: the one with the most parameters (of a CLIP: in its image tower)."""
    tower = getattr(model, "vision_model", model)
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda module: sum(numbers(p) for p in module.parameters()))


def _input_embeddings(model: Any) -> Any:
    return None if hasattr(model, "vision_model") else model.get_input_embeddings()


@dataclass(frozen=True)
class _Reader:
    """The formulas of `model_sizes` for one layer."""

    config: Any
    tokens: int
    stream: int
    compute: int
    launch: Launch
    padded: bool

    def layer(self, block: nn.Module, from_below: bool) -> Layer:
        weights = weights_of(block.parameters())
        linears = {
            name: module for name, module in block.named_modules()
            if not re.search(r"lora_|base_layer", name) and _in_features(module)
        }  # fmt: skip
        down = [module for name, module in linears.items() if not _ATTENTION.search(name) and _DOWN.search(name)]
        inner = _in_features(down[0]) if down else 0
        learned = [name for name, p in block.named_parameters() if p.requires_grad]
        learned += [name for name, module in linears.items() if _scaled(module)]
        whole = from_below or not all(self._after_attention(name) for name in learned)
        kept = working = 0.0
        if whole or learned:
            kept = self._mlp(block, linears, inner) + (self._attention() if whole else 0.0)
            kept += (
                self.norms(dict(block.named_modules())) * (1 if whole else 0.5)
                + self._inputs(linears, _kinds(block) >= {"ReLU"})
                + self._dropout(block)
            )
            # Gradients of an MLP's product, gate and up; the product itself, where it was kept, is gone by then.
            freed = any(p.requires_grad for module in down for p in module.parameters())
            working = (3 - freed) * self.compute * inner + 2 * self.stream * self.config.hidden_size
        narrow = self.launch.autocast and self.stream > self.compute and kept > 0
        casts = sum(self.compute * _matrix(module) for module in linears.values()) if narrow else 0
        return Layer(weights, kept, working, casts)

    @staticmethod
    def _after_attention(name: str) -> bool:
        """Whether a parameter acts on what the attention has made (norms stand at unknown places: before)."""
        path = re.sub(r"\.(base_layer|lora_\w+|lofit_\w+|default|weight|bias).*$", "", name)
        if _ATTENTION.search(path + "."):
            return bool(_OUT.search(path))
        return "norm" not in path and not re.search(r"(^|\.)ln_", path)

    def _attention(self) -> float:
        config = self.config
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        groups = getattr(config, "num_key_value_heads", None) or heads
        eager = getattr(config, "_attn_implementation", "sdpa") == "eager"
        kept = 2 * width * self.compute
        kept += 2 * self.compute * (width if self.padded or eager else width // heads * groups)
        if eager:
            return kept + heads * self.tokens * (4 if self.compute == 4 else 4 + self.compute)
        return kept + 4 * heads + self.padded * self.compute * self.tokens

    def _mlp(self, block: nn.Module, linears: dict[str, nn.Module], inner: int) -> float:
        if any("gate" in name for name in linears):
            return 3 * self.compute * inner
        kinds = _kinds(block)
        return self.compute * inner * next((n for kind, n in _ACTIVATIONS.items() if kind in kinds), 1)

    def norms(self, modules: Mapping[str, Any]) -> float:
        """Of those among them that are norms."""
        kept = 0.0
        for name, module in modules.items():
            kind = type(module).__name__
            if "Norm" not in kind or not hasattr(module, "weight"):
                continue
            width = numbers(module.weight)
            if width == getattr(self.config, "head_dim", 0) and re.search(r"(q|k)_norm$", name):
                width *= (
                    self.config.num_attention_heads if name.endswith("q_norm") else self.config.num_key_value_heads
                )
            if "LayerNorm" in kind:
                kept += (4 if self.launch.autocast else self.stream) * width + 8
            else:
                kept += 4 * width + 4 + module.weight.requires_grad * self.stream * width
        return kept

    def _inputs(self, linears: dict[str, Any], relu: bool) -> float:
        """Of matrix products with trained weights. A ReLU keeps its output, which is the input of the next one."""
        kept, shared = 0.0, {(False, True)} if relu else set()
        for name, module in linears.items():
            attention = bool(_ATTENTION.search(name))
            made = bool((_OUT if attention else _DOWN).search(name))  # its input comes from attention or MLP
            size = self.compute if made else self.stream
            rank, drop, factor = _lora(module)
            if _scaled(module):
                kept += self.compute * rank
            weight = factor if factor is not None else getattr(module, "weight", None)
            if weight is None or not weight.requires_grad:
                continue
            kept += self.compute * rank
            width = _in_features(module)
            own = 2 if self.launch.half and not self.launch.autocast else weight.element_size()
            if drop:
                kept += width * (1 if self.launch.accelerator else own)
            if drop or (factor is not None and own != size) or (self.launch.autocast and size != self.compute):
                kept += width * (self.compute if self.launch.half else own)
            elif (attention, made) not in shared:
                shared.add((attention, made))
                kept += 0 if attention and made else width * size  # the attention keeps its output in any case
        return kept

    def _dropout(self, block: nn.Module) -> float:
        active = [
            name for name, module in block.named_modules()
            if isinstance(module, nn.Dropout) and module.p > 0 and "lora_" not in name and "attn_drop" not in name
        ]  # fmt: skip
        return len(active) * self.config.hidden_size * (1 if self.launch.accelerator else self.stream)


def _in_features(module: Any) -> int:
    """Of a linear map, plain, quantised, GPT-2's or an adapter's around one; 0 for other modules."""
    base: Any = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    return int(getattr(base, "in_features", 0) or getattr(base, "nx", 0))


def _matrix(module: Any) -> int:
    base: Any = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    return numbers(base.weight)


def _kinds(module: nn.Module) -> set[str]:
    return {type(part).__name__ for part in module.modules()}


def _scaled(module: Any) -> bool:
    """Whether it has a frozen LoRA with learned coefficients between its factors (aTLAS, `LowRankComposer`)."""
    factor = _lora(module)[2]
    return bool(getattr(module, "lora_variant", None)) and factor is not None and not factor.requires_grad


def _lora(module: Any) -> tuple[int, float, nn.Parameter | None]:
    """Rank, dropout and A of a LoRA around a linear map; 0, 0 and None without one."""
    factors = list(getattr(module, "lora_A", {}).values())
    if not factors:
        return 0, 0.0, None
    drops = [getattr(drop, "p", 0.0) for drop in module.lora_dropout.values()]
    return sum(numbers(f.weight) // _in_features(f) for f in factors), max(drops, default=0.0), factors[0].weight
