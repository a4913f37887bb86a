"""Small causal transformers from scratch, on stock transformers classes, and a tokenizer of named tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)


@dataclass
class ScratchConfig:
    """A decoder with an untied head (spec 1.6, 3.1): SmolLM3, whose layers may go without rotary positions; GPT-2 for
    learned ones. (GPT-NeoX names its head otherwise in files, and a resumed Trainer leaves it untrained.)

    Attributes:
        positions: "none" (order only through the causal mask), "rope", or "learned" absolute ones.
        table: positions of "learned": a longer row is an error.
        initializer_range: standard deviation of the initial weights (transformers' 0.02 is made for larger widths).
    """

    positions: Literal["none", "rope", "learned"] = "none"
    layers: int = 2
    hidden_size: int = 32
    heads: int = 2
    intermediate_size: int = 64
    table: int = 64
    initializer_range: float = 0.06

    def __post_init__(self) -> None:
        if self.positions not in ("none", "rope", "learned"):
            raise ValueError(f"unknown positions {self.positions!r}; known: none, rope, learned")
        if self.hidden_size % self.heads:
            raise ValueError(f"--hidden_size {self.hidden_size} is not a multiple of --heads {self.heads}")


def scratch_model(vocabulary: int, config: ScratchConfig, seed: int, longest: int) -> PreTrainedModel:
    """An untrained model in fp32, a function of its arguments alone.

    Args:
        vocabulary: how many tokens there are; 0 is padding and 1 the end.
        longest: tokens of the longest row that it will ever see.

    Raises:
        ValueError: learned positions for fewer tokens.
    """
    common = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
              "tie_word_embeddings": False, "initializer_range": config.initializer_range}  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.positions == "learned":
            if longest > config.table:
                raise ValueError(
                    f"learned positions for {config.table} tokens, and the longest test row has {longest}: raise "
                    f"--table to {longest} (rows beyond the trained ones stay untrained), or use other --positions"
                )
            return GPT2LMHeadModel(
                GPT2Config(
                    n_embd=config.hidden_size,
                    n_inner=config.intermediate_size,
                    n_layer=config.layers,
                    n_head=config.heads,
                    n_positions=config.table,
                    resid_pdrop=0.0,
                    embd_pdrop=0.0,
                    attn_pdrop=0.0,
                    **common,
                )  # fmt: skip
            ).float()
        return SmolLM3ForCausalLM(
            SmolLM3Config(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.heads,
                no_rope_layers=[int(config.positions == "rope")] * config.layers,
                max_position_embeddings=max(longest, 64),
                **common,
            )  # fmt: skip
        ).float()


def named_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """Token i is called `vocabulary[i]`; texts are names between spaces. 0 is padding and 1 the end."""
    tokenizer = Tokenizer(models.WordLevel({name: token for token, name in enumerate(vocabulary)}, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=vocabulary[0],
        eos_token=vocabulary[1],
        clean_up_tokenization_spaces=False,
    )
