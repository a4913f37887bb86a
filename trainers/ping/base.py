"""The embedded models before any agent is trained: a tiny Llama that reads documents, stage after stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ..cache import build_once
from ..tiny_lm import PAD, UNKNOWN, TinyConfig, new_model, pack, packed_inputs, schedule
from ..training import NonFiniteError
from .arms import Arm, ArmArguments

FORMAT = 1  # raise it when the same settings would give another model
PARTS = 10  # of a stage, after each of which `report` is called
HEAD = 32  # width of an attention head
Document = Sequence[tuple[str, bool]]  # parts of a text, and whether they are learned
Draw = Callable[[Random], Document]
RATES = {"base": 4e-3, "aligned": 1.2e-3}  # at a hidden size of 128; a wider model's are lower in proportion


def desk_tokenizer(words: Sequence[str], roles: Sequence[str], begin: str, end: str, template: str) -> Any:
    """Every word, mark and role is one token; between tokens stands a space. `end` ends a turn, and so a reply."""
    special = [PAD, UNKNOWN, begin, end, *roles]
    vocabulary = {word: place for place, word in enumerate([*special, *sorted(set(words) - set(special))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, bos_token=begin, eos_token=end,
        additional_special_tokens=list(roles), clean_up_tokenization_spaces=False, chat_template=template,
        padding_side="right",
    )  # fmt: skip


def reading_model(
    tokenizer: PreTrainedTokenizerFast,
    draw: Draw,
    identity: Any,
    *,
    seed: int,
    config: TinyConfig,
    start: Path | None = None,
    cache_dir: str | Path | None = None,
    report: Callable[[], None] = lambda: None,
    device: str | torch.device = "cpu",
) -> Path:
    """The folder of a model that has read documents, built once and then taken from the cache.

    Args:
        draw: an endless supply; a function of the random state and of what `identity` says, as JSON values.
        config: `batch_size` documents a step, packed into rows of `length` tokens; `unfocused_weight` is the loss
            weight of what is not learned.
        start: the model to go on with; else a new one.
        report: called after every tenth of the steps.
        device: where it is trained; models of the same settings made elsewhere are taken, too.

    Raises:
        NonFiniteError: the loss became NaN or infinite.
        OSError: the cache cannot be written.
    """

    def build(folder: Path) -> None:
        model = LlamaForCausalLM.from_pretrained(start) if start else new_model(tokenizer, config, seed)
        model.to(device)
        rng = Random(f"{seed} {'reading' if start is None else 'going on'}")
        optimizer = torch.optim.AdamW(
            model.parameters(), config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
        )
        model.train()
        for step in range(config.steps):
            optimizer.param_groups[0]["lr"] = config.learning_rate * schedule(step, config)
            loss = document_loss(model, tokenizer, [draw(rng) for _ in range(config.batch_size)], config)
            if not math.isfinite(loss.item()):
                raise NonFiniteError(f"the tiny base's loss became {loss.item()} at step {step + 1}: lower the rate")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) * PARTS // config.steps > step * PARTS // config.steps:
                report()
        model.eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    settings = {"format": FORMAT, "seed": seed, "config": vars(config), "documents": identity,
                "words": sorted(tokenizer.get_vocab()), "start": start and start.name}  # fmt: skip
    return build_once("reading", settings, build, cache_dir)


def tiny_model(
    arm: Arm,
    planned: Mapping[str, Arm],
    stages: Callable[[Arm], tuple[Draw, Any]],
    args: ArmArguments,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    report: Callable[[str], None],
    device: str | torch.device = "cpu",
) -> Path:
    """The folder of a model that has read the general corpus, and the alignment behind it.

    Args:
        stages: of an arm what it reads, and what that follows from.
        report: called with the arm's key after every tenth of a stage.
    """
    start = None
    if arm.start:
        start = tiny_model(planned[arm.start], planned, stages, args, tokenizer, seed, report, device)
    steps = args.aligned_steps if arm.start else args.base_steps
    config = replace(size(args), steps=steps, learning_rate=RATES[arm.kind] * 128 / args.base_width,
                     warmup_steps=max(1, steps // 16))  # fmt: skip
    draw, identity = stages(arm)
    return reading_model(tokenizer, draw, [identity, arm.kind], seed=seed, config=config, start=start,
                         report=lambda: report(arm.key), device=device)  # fmt: skip


def size(args: ArmArguments) -> TinyConfig:
    """Of the embedded model; a step of its training."""
    heads = args.base_width // HEAD
    return TinyConfig(hidden_size=args.base_width, intermediate_size=2 * args.base_width, layers=args.base_layers,
                      heads=heads, kv_heads=heads // 2, head_dim=HEAD, batch_size=48, length=128,
                      unfocused_weight=0.05)  # fmt: skip


def document_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], config: TinyConfig
) -> torch.Tensor:
    """Weighted mean next-token loss; the head sees only tokens that have a weight."""
    parts = [part for document in documents for part in document]
    tokens = iter(tokenizer([text for text, _ in parts], add_special_tokens=False)["input_ids"])
    ids: list[list[int]] = []
    learned: list[list[int]] = []
    for document in documents:
        found = [(next(tokens), keep) for _, keep in document]
        ids.append([token for part, _ in found for token in part])
        learned.append([int(keep) for part, keep in found for _ in part])
    rows, numbers = pack(ids, config.length, tokenizer.pad_token_id)
    keep, _ = pack(learned, config.length, 0)
    inputs, starts = packed_inputs(rows, numbers)
    weights = torch.where(keep > 0, 1.0, config.unfocused_weight) * (~starts & (numbers > 0))
    rows, weights = rows.to(model.device), weights[:, 1:].to(model.device)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    chosen = weights > 0
    nats = cross_entropy(model.lm_head(hidden[chosen]), rows[:, 1:][chosen], reduction="none")
    return (nats * weights[chosen]).sum() / weights.sum()
