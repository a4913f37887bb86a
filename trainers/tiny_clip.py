"""A tiny CLIP, made in code and trained on captioned images: the offline base of the vision recipes.

    folder = tiny_clip(images, texts, seed=0)
    model = CLIPModel.from_pretrained(folder)

The result is a plain Hugging Face folder (model, tokenizer, image processor), kept in a cache under the hash of
everything that determines it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

from .cache import build_once
from .training import NonFiniteError

FORMAT = 1  # raise it when the same settings would give another model
SPECIAL = ["<pad>", "<bos>", "<unk>", "<eos>"]  # an EOS of number 2 would mean a checkpoint of old to CLIPTextModel
GREY = 0.5  # mean and standard deviation that pixels are normalised with


@dataclass(frozen=True)
class TinyClipConfig:
    """Size and training of a tiny CLIP. The defaults were found for 8 x 8 digits."""

    image_size: int = 8
    patch_size: int = 4
    hidden_size: int = 48
    layers: int = 4
    heads: int = 4
    text_hidden_size: int = 32
    text_layers: int = 1
    projection: int = 32
    max_tokens: int = 16
    steps: int = 300
    batch_size: int = 128
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    weight_decay: float = 0.05
    initializer_range: float = 0.08


def tiny_clip(
    images: Sequence[Any],
    texts: Sequence[Sequence[str]],
    *,
    seed: int,
    config: TinyClipConfig | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """The folder of a tiny CLIP, trained on the CPU to tell which text is whose; the caller's random state stays.

    Args:
        images: PIL images.
        texts: of every image, the texts that fit it; images with the same texts count as of one kind.
        seed: of the initial weights and of the order of the images.
        cache_dir: default `$STEERBOOK_CACHE`, else `~/.cache/steerbook`.

    Raises:
        ValueError: no images, another number of texts, an image without text.
        NonFiniteError: the loss became NaN or infinite.
        OSError: the cache cannot be written.
    """
    config = config or TinyClipConfig()
    if not images or len(images) != len(texts) or not all(texts):
        raise ValueError(f"{len(images)} images with {len(texts)} lists of texts: give each image at least one text")
    digest = hashlib.sha256()
    for image in images:
        digest.update(f"{image.size} {image.mode}".encode() + image.tobytes())
    settings = {"format": FORMAT, "seed": seed, **asdict(config)}
    kinds = list(dict.fromkeys(tuple(own) for own in texts))

    def build(folder: Path) -> None:
        tokenizer = word_tokenizer([text for own in kinds for text in own])
        processor = image_processor(config.image_size)
        model = new_clip(tokenizer, config, seed)
        pixels = processor(list(images), return_tensors="pt")["pixel_values"]
        numbers = torch.tensor([kinds.index(tuple(own)) for own in texts])
        losses = train(model, tokenizer, pixels, numbers, kinds, config, seed, progress)
        for part in (model, tokenizer, processor):
            part.save_pretrained(folder)
        (folder / "tiny_clip.json").write_text(json.dumps({**settings, "losses": losses}, indent=1) + "\n")

    return build_once(
        "tiny-clip", [settings, kinds, [list(own) for own in texts], digest.hexdigest()], build, cache_dir
    )


def word_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Words and marks of these texts, `<bos>` in front and `<eos>` behind, as CLIP's text tower needs them."""
    splitter = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    vocabulary = {piece: number for number, piece in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    ends = [(name, vocabulary[name]) for name in ("<bos>", "<eos>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>", eos_token="<eos>",
        clean_up_tokenization_spaces=False, padding_side="right",
    )  # fmt: skip


def image_processor(size: int) -> CLIPImageProcessorPil:
    """CLIP's, for images of this size."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=[GREY] * 3,
        image_std=[GREY] * 3,
    )  # fmt: skip


def new_clip(tokenizer: PreTrainedTokenizerFast, config: TinyClipConfig, seed: int) -> CLIPModel:
    """An untrained model in fp32, a function of its arguments alone."""
    shared = {"num_attention_heads": config.heads, "projection_dim": config.projection, "hidden_act": "quick_gelu",
              "initializer_range": config.initializer_range}  # fmt: skip
    vision = shared | {
        "image_size": config.image_size, "patch_size": config.patch_size, "hidden_size": config.hidden_size,
        "intermediate_size": 2 * config.hidden_size, "num_hidden_layers": config.layers,
    }  # fmt: skip
    text = shared | {
        "vocab_size": len(tokenizer), "max_position_embeddings": config.max_tokens,
        "hidden_size": config.text_hidden_size, "intermediate_size": 2 * config.text_hidden_size,
        "num_hidden_layers": config.text_layers, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=config.projection)).float()


def train(
    model: CLIPModel,
    tokenizer: PreTrainedTokenizerFast,
    pixels: torch.Tensor,
    kinds: torch.Tensor,
    texts: Sequence[Sequence[str]],
    config: TinyClipConfig,
    seed: int,
    progress: bool = True,
) -> list[float]:
    """Train in place on pixels [n, 3, size, size] of kinds [n], whose texts `texts` lists; the loss of every step.

    CLIP's contrastive loss, both ways, in a batch with one text of each kind: an image may fit one text, a text all
    images of its kind.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
    )
    order = torch.empty(0, dtype=torch.long)
    losses: list[float] = []
    model.train()
    for step in tqdm(range(config.steps), desc="training the tiny base", disable=not progress):
        while len(order) < config.batch_size:
            order = torch.cat([order, torch.randperm(len(pixels), generator=generator)])
        rows, order = order[: config.batch_size], order[config.batch_size :]
        said = [own[int(draw.integers(len(own)))] for own in texts]
        tokens = tokenizer(said, padding=True, return_tensors="pt")
        logits = model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels[rows]
        ).logits_per_image
        fits = torch.nn.functional.one_hot(kinds[rows], len(texts)).to(logits)
        there = fits.sum(0) > 0  # kinds with an image in this batch
        of_text = -(logits.log_softmax(0) * fits).sum(0)[there] / fits.sum(0)[there]
        loss = (cross_entropy(logits, kinds[rows]) + of_text.mean()) / 2
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise NonFiniteError(
                f"the tiny base's loss became {losses[-1]} at step {step + 1}: lower learning_rate="
                f"{config.learning_rate:g}"
            )
        optimizer.param_groups[0]["lr"] = config.learning_rate * _schedule(step, config)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return losses


def _schedule(step: int, config: TinyClipConfig) -> float:
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.03 + 0.97 * (1 + math.cos(math.pi * done)) / 2
