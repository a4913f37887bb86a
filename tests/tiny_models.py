"""Tiny random models of every architecture the tuner knows, and LoFiT's edit once more, written as in the paper."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from steerbook.trainers.lofit import LofitLayer

VOCAB = 48
LAYERS = 3
IDS = torch.tensor([[1, 7, 9, 4, 33, 12, 5, 21, 2, 40], [1, 3, 3, 8, 30, 31, 6, 44, 20, 11]])
HEADS = [(1, 0), (1, 2), (2, 3)]  # none in layer 0

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
_GQA = {**_COMMON, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
_MHA = {**_COMMON, "num_attention_heads": 4}


@dataclass(frozen=True)
class Architecture:
    """How to make one, where its attention output projections are, and how its heads are cut."""

    make: Callable[[], PreTrainedModel]
    projection: str
    heads: int
    head_dim: int
    has_bias: bool


def _llama_like(model: type, config: type, head_dim: int = 12, **changes: object) -> Architecture:
    def make() -> PreTrainedModel:
        return model(config(**{**_GQA, "head_dim": head_dim, **changes}))

    return Architecture(make, "model.layers.{}.self_attn.o_proj", 4, head_dim, False)


ARCHITECTURES = {
    "llama": _llama_like(LlamaForCausalLM, LlamaConfig),  # 4 * 12 = 48 numbers, hidden size 32
    "mistral": _llama_like(MistralForCausalLM, MistralConfig, sliding_window=None),
    "qwen2": _llama_like(Qwen2ForCausalLM, Qwen2Config),
    "qwen3": _llama_like(Qwen3ForCausalLM, Qwen3Config, head_dim=10),
    "gemma3_text": _llama_like(Gemma3ForCausalLM, Gemma3TextConfig, head_dim=6, sliding_window=4),
    "phi3": Architecture(
        lambda: Phi3ForCausalLM(Phi3Config(**{**_GQA, "original_max_position_embeddings": 64})),
        "model.layers.{}.self_attn.o_proj",
        4,
        8,
        False,
    ),
    "gpt2": Architecture(lambda: GPT2LMHeadModel(GPT2Config(**_MHA)), "transformer.h.{}.attn.c_proj", 4, 8, True),
    "gpt_neox": Architecture(
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_MHA, intermediate_size=48)),
        "gpt_neox.layers.{}.attention.dense",
        4,
        8,
        True,
    ),
    "opt": Architecture(
        lambda: OPTForCausalLM(OPTConfig(**_MHA, ffn_dim=48, word_embed_proj_dim=32)),
        "model.decoder.layers.{}.self_attn.out_proj",
        4,
        8,
        True,
    ),
}


def tiny(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model in eval mode. Biases and norms are random too: zeros and ones would hide mistakes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ARCHITECTURES[name].make()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """The Llama above with other settings."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**_GQA, "head_dim": 12, **changes})).eval()


def char_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, no BOS; 44 of them and four special ones are exactly VOCAB."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789", *" :?.,'!-"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def lofit_layers(model: torch.nn.Module) -> list[LofitLayer]:
    """In order of depth."""
    return [module for module in model.modules() if isinstance(module, LofitLayer)]


def randomise(model: torch.nn.Module, adapter: str = "default", seed: int = 5, std: float = 0.4) -> None:
    """Large random scales and offsets, so that an edit in the wrong place or order is far above any tolerance."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lofit_layers(model):
        for rows in (layer.lofit_scale, layer.lofit_offset):
            if adapter in rows:
                rows[adapter].data = std * torch.randn(rows[adapter].shape, generator=generator)


Edits = dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]


def random_edits(heads: list[tuple[int, int]], head_dim: int, component: str, seed: int = 5) -> Edits:
    """`{(layer, head): (A, v)}`; what the component does not have is zero."""
    generator = torch.Generator().manual_seed(seed)
    edits = {}
    for head in heads:
        a, v = 0.4 * torch.randn(2, head_dim, generator=generator)
        edits[head] = (a if component != "offset" else 0 * a, v if component != "scale" else 0 * v)
    return edits


def write_edits(model: torch.nn.Module, name: str, edits: Edits, adapter: str = "default") -> None:
    """Put them into the adapter, row by row in the order of the heads."""
    path = ARCHITECTURES[name].projection
    modules = {key.removeprefix("base_model.model."): module for key, module in model.named_modules()}
    for index in range(LAYERS):
        heads = sorted(head for layer, head in edits if layer == index)
        layer = modules[path.format(index)]
        for row, head in enumerate(heads):
            for rows, vector in zip((layer.lofit_scale, layer.lofit_offset), edits[index, head], strict=True):
                if adapter in rows:
                    rows[adapter].data[row] = vector


@contextmanager
def hooked(model: PreTrainedModel, name: str, *several: Edits) -> Iterator[None]:
    """The untouched model with `z_i <- (1 + A_i) * z_i + v_i`, head by head, by hooks on the projections' inputs."""
    architecture = ARCHITECTURES[name]
    handles = []
    for edits in several:
        for (index, head), (a, v) in edits.items():

            def edit(module, args, at=head * architecture.head_dim, a=a, v=v):
                z = args[0]
                width = architecture.head_dim
                head_output = z[..., at : at + width]
                return (torch.cat([z[..., :at], (1 + a) * head_output + v, z[..., at + width :]], dim=-1),)

            projection = model.get_submodule(architecture.projection.format(index))
            handles.append(projection.register_forward_pre_hook(edit))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
