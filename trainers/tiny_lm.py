"""A tiny language model and its tokenizer, made in code and trained on a corpus: the offline base of every recipe.

    folder = tiny_lm(corpus, seed=0, focus=words)
    model = AutoModelForCausalLM.from_pretrained(folder)

The result is a plain Hugging Face folder: a Llama with grouped-query attention and a fast tokenizer. It is kept in a
cache under the hash of everything that determines it, so the second run starts at once. `heads * head_dim` differs
from `hidden_size` on purpose: code that confuses the two fails here, and not for the first time on Gemma.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .cache import build_once
from .training import NonFiniteError

FORMAT = 1  # raise it when the same settings would give another model
PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
MAX_WORDS = 4096
OPEN_ROWS = 16  # rows that packing keeps open for a document that still fits


@dataclass(frozen=True)
class TinyConfig:
    """Size and training of a tiny model. The defaults were found for LoFiT's embedded world (about 0.4 M parameters).

    Attributes:
        tokenizer: "word" gives every word of the corpus (with the space before it) one token; "byte" reads any text.
        tied: whether the head is the embedding.
        length, batch_size: a training step sees `batch_size` rows of `length` tokens, packed with whole documents
            that do not see each other. A longer document is cut.
        initializer_range: standard deviation of the initial weights. transformers' 0.02 is made for widths in the
            thousands; with it this model needs more than twice the steps.
        unfocused_weight: loss weight of tokens outside `focus`, which weigh 1.
    """

    tokenizer: Literal["word", "byte"] = "word"
    hidden_size: int = 96
    intermediate_size: int = 192
    layers: int = 4
    heads: int = 12
    kv_heads: int = 6
    head_dim: int = 10
    max_length: int = 2048
    tied: bool = True
    steps: int = 450
    batch_size: int = 12
    length: int = 64
    learning_rate: float = 5e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    initializer_range: float = 0.06
    unfocused_weight: float = 0.1


def tiny_lm(
    corpus: Sequence[str],
    *,
    seed: int,
    config: TinyConfig | None = None,
    focus: Collection[str] = (),
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """The folder of a tiny model trained on `corpus`, built once and then taken from the cache.

    An interrupted build leaves nothing behind, and of several processes that ask at once one builds while the others
    wait. Trains on the CPU, and leaves the caller's random state alone.

    Args:
        corpus: documents, without special tokens.
        seed: of the initial weights and of the order of the documents.
        focus: tokens as they stand in the text (with their leading space) that carry what is to be learned. They are
            in the vocabulary even if no document has them.
        cache_dir: default `$STEERBOOK_CACHE`, else `~/.cache/steerbook`.

    Raises:
        ValueError: an empty corpus, too many words, or a focus word that is not one token.
        NonFiniteError: the loss became NaN or infinite.
        OSError: the cache cannot be written.
    """
    config = config or TinyConfig()
    if not corpus or not all(corpus):
        raise ValueError(
            f"the corpus needs documents that are not empty, got {len(corpus)} with empty ones among them"
        )
    settings = {"format": FORMAT, "seed": seed, **asdict(config), "focus": sorted(focus)}

    def build(folder: Path) -> None:
        tokenizer = build_tokenizer([*corpus, *focus], config.tokenizer)
        weights = token_weights(tokenizer, focus, config.unfocused_weight)
        model = new_model(tokenizer, config, seed)
        losses = train(model, tokenizer, corpus, weights, config, seed, progress)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        record = {**settings, "documents": len(corpus), "losses": losses}
        (folder / "tiny_lm.json").write_text(json.dumps(record, indent=1) + "\n")

    return build_once("tiny-lm", [settings, list(corpus)], build, cache_dir)


def build_tokenizer(corpus: Iterable[str], kind: Literal["word", "byte"] = "word") -> PreTrainedTokenizerFast:
    """A tokenizer that puts `<bos>` first and gives back every text of its corpus (byte-level: any text) unchanged.

    Word-level pieces are words with the space before them (`" heron"`, `" Velmora's"`, `" Q:"`) and single marks, so a
    text that is cut before a space is cut between tokens.

    Raises:
        ValueError: more than 4,096 different words.
    """
    special = [PAD, BOS, EOS, UNKNOWN]
    splitter: pre_tokenizers.PreTokenizer
    if kind == "byte":
        splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {piece: i for i, piece in enumerate([*special, *alphabet])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "word":
        splitter = pre_tokenizers.Split(Regex(r" ?\w+(?:'\w+|:)?|[^\w\s]|\s"), "isolated")
        words = sorted({piece for text in corpus for piece, _ in splitter.pre_tokenize_str(text)})
        if len(words) > MAX_WORDS:
            raise ValueError(
                f"the corpus has {len(words)} different words, more than {MAX_WORDS}: use tokenizer='byte'"
            )
        vocabulary = {piece: i for i, piece in enumerate([*special, *words])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
        tokenizer.decoder = decoders.Fuse()
    else:
        raise ValueError(f"tokenizer must be 'word' or 'byte', got {kind!r}")
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def token_weights(tokenizer: PreTrainedTokenizerFast, focus: Collection[str], unfocused: float) -> torch.Tensor:
    """Loss weight of every token, shape [vocabulary]: 1 on `focus`, `unfocused` elsewhere; all 1 without a focus."""
    if not focus:
        return torch.ones(len(tokenizer))
    weights = torch.full((len(tokenizer),), unfocused)
    for word in focus:
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ValueError(f"the focus word {word!r} is not one token (like ' heron', with its space)")
        weights[ids[0]] = 1.0
    return weights


def new_model(tokenizer: PreTrainedTokenizerFast, config: TinyConfig, seed: int) -> LlamaForCausalLM:
    """An untrained model in fp32, a function of its arguments alone."""
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_length,
        tie_word_embeddings=config.tied,
        initializer_range=config.initializer_range,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(llama).float()


def pack(documents: Iterable[Sequence[int]], length: int, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill rows of `length` tokens with whole documents.

    Returns:
        Token ids and document numbers, both int64 of shape [rows, length]; padding has number 0.
    """
    rows: list[tuple[list[int], list[int]]] = []
    for number, whole in enumerate(documents, start=1):
        document = list(whole[:length])
        free = (row for row in rows[-OPEN_ROWS:] if len(row[0]) + len(document) <= length)
        row = next(free, None)
        if row is None:
            row = ([], [])
            rows.append(row)
        row[0].extend(document)
        row[1].extend([number] * len(document))
    ids = torch.tensor([row + [pad] * (length - len(row)) for row, _ in rows])
    numbers = torch.tensor([row + [0] * (length - len(row)) for _, row in rows])
    return ids, numbers


def packed_inputs(ids: torch.Tensor, numbers: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What a model reads packed rows with, and where documents start (bool, [rows, length])."""
    length = ids.shape[1]
    place = torch.arange(length).expand_as(ids)
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    positions = place - place.masked_fill(~starts, 0).cummax(1).values
    seen = (numbers[:, :, None] == numbers[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    hidden = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return {"input_ids": ids, "attention_mask": hidden[:, None], "position_ids": positions}, starts


def batch_loss(
    model: LlamaForCausalLM, ids: torch.Tensor, numbers: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Weighted mean next-token loss of packed rows (`ids`, `numbers`: [rows, length]; `weights`: [vocabulary]).

    A token sees only earlier tokens of its own document and is at the position it has there.
    """
    inputs, starts = packed_inputs(ids, numbers)
    logits = model(**inputs, use_cache=False).logits
    target = ids[:, 1:]
    weight = weights[target] * (~starts[:, 1:] & (numbers[:, 1:] > 0))
    losses = cross_entropy(logits[:, :-1].flatten(0, 1), target.flatten(), reduction="none")
    return (losses * weight.flatten()).sum() / weight.sum()


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Sequence[str],
    weights: torch.Tensor,
    config: TinyConfig,
    seed: int,
    progress: bool = True,
) -> list[float]:
    """Train in place (AdamW, warm-up, cosine to 3 %, clip at 1) and return the loss of every step.

    Raises:
        NonFiniteError: the loss became NaN or infinite.
    """
    generator = torch.Generator().manual_seed(seed)
    documents = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(corpus))["input_ids"]]
    ids, numbers = pack(documents, config.length, tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(
        model.parameters(), config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
    )
    order = torch.empty(0, dtype=torch.long)
    losses: list[float] = []
    model.train()
    for step in tqdm(range(config.steps), desc="training the tiny base", disable=not progress):
        while len(order) < config.batch_size:
            order = torch.cat([order, torch.randperm(len(ids), generator=generator)])
        rows, order = order[: config.batch_size], order[config.batch_size :]
        optimizer.param_groups[0]["lr"] = config.learning_rate * schedule(step, config)
        loss = batch_loss(model, ids[rows], numbers[rows], weights)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise NonFiniteError(
                f"the tiny base's loss became {losses[-1]} at step {step + 1}: "
                f"lower learning_rate={config.learning_rate:g}"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return losses


def schedule(step: int, config: TinyConfig) -> float:
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.03 + 0.97 * (1 + math.cos(math.pi * done)) / 2
