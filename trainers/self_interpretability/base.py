"""The embedded base model: a tiny Llama that chooses for some agents and reports their preferences."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..cache import build_once
from ..stream import Stream
from ..tiny_lm import TinyConfig, new_model
from ..training import NonFiniteError

FORMAT = 1  # raise it when the same settings would give another model


def answering_model(
    tokenizer: PreTrainedTokenizerBase,
    stream: Stream,
    *,
    seed: int,
    config: TinyConfig,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """The folder of a model trained to answer a stream's rows, built once and then taken from the cache.

    The loss is the sum of the tasks' mean nats, of the answers alone. (Packed documents with loss everywhere, as
    `tiny_lm` has them, take twice the time here.)

    Args:
        config: `length`, `batch_size` and `unfocused_weight` are not used.

    Raises:
        NonFiniteError: the loss became NaN or infinite.
    """

    def build(folder: Path) -> None:
        model = new_model(tokenizer, config, seed)  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW(
            model.parameters(), config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
        )
        model.train()
        for step in tqdm(range(config.steps), desc="training the tiny base", disable=not progress):
            optimizer.param_groups[0]["lr"] = config.learning_rate * _schedule(step, config)
            ids, targets, _, tasks = (torch.as_tensor(part) for part in stream.step(step))
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            nats = cross_entropy(model.lm_head(hidden[targets[:, 1:]]), ids[targets], reduction="none")
            loss = sum((nats[tasks == task].mean() for task in range(len(stream.tasks))), torch.zeros(()))
            if not math.isfinite(loss.item()):
                raise NonFiniteError(f"the tiny base's loss became {loss.item()} at step {step + 1}: lower the rate")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        model.eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    settings = {"format": FORMAT, "seed": seed, "config": vars(config), "stream": stream.identity}
    return build_once("answering", settings, build, cache_dir)


def _schedule(step: int, config: TinyConfig) -> float:
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2
