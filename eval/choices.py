"""Exact log-probabilities of answers given a prompt, for any causal language model.

The prompt is computed once: tokens common to all prompts (a few-shot primer) once per call, the rest of a prompt once
per question, and all of its answers in one batch on a copy of that key-value cache. Rows are never padded on the left
or in the middle: prompts are batched with prompts of the same token length and answers are padded on the right, where
a causal model cannot see the padding. So no attention mask is needed, and models with rotary or learned positions or
with sliding windows stay exact.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias, TypeGuard

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

CausalLM: TypeAlias = PreTrainedModel | PeftModel


@dataclass(frozen=True)
class _Question:
    index: int
    context: list[int]  # the tokens that all choices of the question share and none scores; at least one
    tails: list[list[int]]  # for each choice, the tokens after ``context``
    skips: list[int]  # for each choice, how many tokens of its tail still belong to the prompt


def choice_logprobs(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    *,
    max_rows: int = 64,
    progress: bool = False,
) -> list[list[float]]:
    """Summed ``log p(tokens of the choice | prompt)`` in nats for each choice of each prompt.

    The text scored is ``prompt + choice``, joined with nothing and tokenised as one plain text (with BOS where the
    tokenizer adds one, without EOS). Scored are the tokens after the longest common token prefix of the prompt and the
    joined text, at least one; where a choice merges with the end of its prompt, the merged token counts as the
    choice's. Softmax in fp32.

    ``max_rows`` bounds the rows of a forward pass, and with it memory: two times ``max_rows`` caches of the longest
    prompt. The model's mode is restored; no random numbers are drawn. A model whose cache cannot be copied row by row
    without loss (recurrent states, static or quantised caches, prompt tuning) is scored on whole sequences: the same
    numbers, slower.

    Raises ValueError for mismatched lengths, an empty choice, a prompt without a single token, or a text longer than
    the model's positions.
    """
    if max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")
    questions = _tokenize(tokenizer, prompts, choices)
    _check_length(model, questions)
    scores: list[list[float]] = [[] for _ in questions]
    total = sum(len(question.tails) for question in questions)
    with evaluating(model), tqdm(total=total, disable=not progress, desc="choices", unit="choice") as bar:
        scorer = _Scorer(model, max_rows, bar)
        for question, found in scorer.run(questions):
            scores[question.index] = found
    return scores


@contextmanager
def evaluating(model: CausalLM) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module has the mode it had.

    ``no_grad``, not ``inference_mode``: a rotary table recomputed inside would then be unusable in later training.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def model_device(model: CausalLM) -> torch.device:
    """Where token ids have to be; right also for a model spread over several devices."""
    return next(model.get_input_embeddings().parameters()).device


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of plain texts, with what the tokenizer puts in front (BOS) and without what it appends (EOS)."""
    if not texts:
        return []
    ids = tokenizer(list(texts), add_special_tokens=True, return_attention_mask=False)["input_ids"]
    plain = tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    extra = len(ids[0]) - len(plain)
    appended = next((n for n in range(extra + 1) if ids[0][extra - n : len(ids[0]) - n] == plain), 0)
    return [row[: len(row) - appended] for row in ids]


def right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """A tensor ``[rows, longest]``, filled with 0: any token will do where nothing looks at it."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.long, device=device)


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """fp32 log-probability of each target; logits ``[..., vocabulary]``, targets and result ``[...]``."""
    logits = logits.float()
    return logits.gather(-1, targets[..., None]).squeeze(-1) - logits.logsumexp(-1)


def keeps_logits(model: CausalLM) -> bool:
    """Whether `logits_to_keep` spares the vocabulary-sized matrix where no logits are needed. Nearly all take it."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in inspect.signature(type(base).forward).parameters


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens both begin with."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next(i for i in range(length) if a[i] != b[i])


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], choices: Sequence[Sequence[str]]
) -> list[_Question]:
    if len(prompts) != len(choices):
        raise ValueError(f"{len(prompts)} prompts but {len(choices)} lists of choices; give one list for each prompt")
    for index, options in enumerate(choices):
        if isinstance(options, str) or not options or not all(options):
            raise ValueError(f"prompt {index}: choices must be a list of non-empty texts, got {options!r}")
    # One call, because a fast tokenizer works through a batch outside Python.
    joined = [prompt + choice for prompt, options in zip(prompts, choices, strict=True) for choice in options]
    ids = encode(tokenizer, [*joined, *prompts])
    rows = iter(ids[: len(joined)])
    questions = []
    for index, (prompt, options) in enumerate(zip(ids[len(joined) :], choices, strict=True)):
        full = [next(rows) for _ in options]
        starts = [min(common_prefix(prompt, row), len(row) - 1) for row in full]
        shared = min(starts)
        if shared < 1:
            raise ValueError(
                f"prompt {index} ({prompts[index]!r}) leaves no token in front of its choices; give a longer prompt "
                "or a tokenizer that prepends BOS"
            )
        questions.append(
            _Question(index, full[0][:shared], [row[shared:] for row in full], [start - shared for start in starts])
        )
    return questions


def _check_length(model: CausalLM, questions: Sequence[_Question]) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for question in questions:
        length = len(question.context) + max(map(len, question.tails))
        if limit is not None and length > limit:
            raise ValueError(
                f"prompt {question.index} with its longest choice is {length} tokens; the model takes {limit}"
            )


class _Scorer:
    def __init__(self, model: CausalLM, max_rows: int, bar: tqdm) -> None:
        self.model, self.max_rows, self.bar = model, max_rows, bar
        self.device = model_device(model)
        self.keeps_logits = keeps_logits(model)

    def run(self, questions: list[_Question]) -> Iterator[tuple[_Question, list[float]]]:
        if not questions:
            return
        # Prompt tuning puts virtual tokens in front of every call, with or without a cache.
        if isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning:
            yield from self.whole(questions)
            return
        contexts = [question.context[:-1] for question in questions]  # a question keeps a token of its own
        primer = common_prefix(min(contexts), max(contexts))  # the first and last in order differ where any two do
        cache = None
        if primer:
            _, cache = self.extend(None, [contexts[0][:primer]])
            if not expandable(cache):
                yield from self.whole(questions)
                return
        for group in self.groups(questions):
            start = None if cache is None else select_rows(cache, torch.zeros(len(group), dtype=torch.long))
            logits, grown = self.extend(start, [question.context[primer:] for question in group])
            if not expandable(grown):
                yield from self.whole(group)
                continue
            yield from self.answers(group, logits, grown)

    def groups(self, questions: list[_Question]) -> Iterator[list[_Question]]:
        """At most ``max_rows`` questions of one context length, those with long choices together."""
        ordered = sorted(questions, key=lambda q: (len(q.context), max(map(len, q.tails))))
        for _, alike in groupby(ordered, key=lambda q: len(q.context)):
            group = list(alike)
            yield from (group[start : start + self.max_rows] for start in range(0, len(group), self.max_rows))

    def extend(self, cache: DynamicCache | None, rows: list[list[int]]) -> tuple[torch.Tensor, Any]:
        """Logits at the last token, ``[rows, vocabulary]``, and the cache with the given tokens added."""
        keep = {"logits_to_keep": 1} if self.keeps_logits else {}
        ids = torch.tensor(rows, dtype=torch.long, device=self.device)
        output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **keep)
        return output.logits[:, -1], output.get("past_key_values")

    def answers(
        self, group: list[_Question], logits: torch.Tensor, cache: DynamicCache
    ) -> Iterator[tuple[_Question, list[float]]]:
        """The context's logits score every first token; each further one is predicted by those before it."""
        firsts = logits.float().log_softmax(-1)
        found: dict[tuple[int, int], float] = {}
        longer = []
        for place, question in enumerate(group):
            first = firsts[place, [tail[0] for tail in question.tails]].tolist()
            for choice, (value, skip) in enumerate(zip(first, question.skips, strict=True)):
                found[place, choice] = 0.0 if skip else value
            longer += [(place, choice) for choice, tail in enumerate(question.tails) if len(tail) > 1]
        self.bar.update(len(found) - len(longer))
        longer.sort(key=lambda row: len(group[row[0]].tails[row[1]]))
        for start in range(0, len(longer), self.max_rows):
            part = longer[start : start + self.max_rows]
            tails = [group[place].tails[choice] for place, choice in part]
            past = select_rows(cache, torch.tensor([place for place, _ in part]))
            ids = right_padded([tail[:-1] for tail in tails], self.device)
            output = self.model(input_ids=ids, past_key_values=past, use_cache=True)
            skips = [group[place].skips[choice] - 1 for place, choice in part]
            for row, value in zip(part, self.sums(output.logits, [tail[1:] for tail in tails], skips), strict=True):
                found[row] += value
        for place, question in enumerate(group):
            yield question, [found[place, choice] for choice in range(len(question.tails))]

    def whole(self, questions: list[_Question]) -> Iterator[tuple[_Question, list[float]]]:
        """Without a cache: every choice with its whole prompt, padded on the right, alike lengths together."""
        rows = [(place, choice) for place, question in enumerate(questions) for choice in range(len(question.tails))]
        rows.sort(key=lambda row: len(questions[row[0]].context) + len(questions[row[0]].tails[row[1]]))
        found: dict[tuple[int, int], float] = {}
        for start in range(0, len(rows), self.max_rows):
            part = rows[start : start + self.max_rows]
            first = min(len(questions[place].context) for place, _ in part)
            texts = [questions[place].context + questions[place].tails[choice] for place, choice in part]
            ids = right_padded([text[:-1] for text in texts], self.device)
            keep = ids.shape[1] - first + 1
            output = self.model(
                input_ids=ids, use_cache=False, **({"logits_to_keep": keep} if self.keeps_logits else {})
            )
            skips = [len(questions[place].context) - first + questions[place].skips[choice] for place, choice in part]
            # From the right, because prompt tuning adds positions on the left.
            sums = self.sums(output.logits[:, -keep:], [text[first:] for text in texts], skips)
            found.update(zip(part, sums, strict=True))
        for place, question in enumerate(questions):
            yield question, [found[place, choice] for choice in range(len(question.tails))]

    def sums(self, logits: torch.Tensor, tails: list[list[int]], skips: list[int]) -> list[float]:
        """Logits ``[rows, longest tail, vocabulary]``; the sum over each tail from its skip on."""
        targets = right_padded(tails, self.device)
        place = torch.arange(targets.shape[1], device=self.device)
        first = torch.tensor(skips, device=self.device)[:, None]
        last = torch.tensor([len(tail) for tail in tails], device=self.device)[:, None]
        logprobs = token_logprobs(logits, targets).masked_fill((place < first) | (place >= last), 0.0)
        self.bar.update(len(tails))
        return logprobs.sum(1).tolist()


def expandable(cache: Any) -> TypeGuard[DynamicCache]:
    """Whether the rows of a cache are nothing but keys and values, so that copying rows is exact.

    True for full and for sliding-window attention. Other layer classes, subclasses too, may carry further states.
    """
    return type(cache) is DynamicCache and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    )


def select_rows(cache: DynamicCache, rows: torch.Tensor) -> DynamicCache:
    """A cache with the given rows. The tensors are new and the old cache stays as it is: its layers grow by
    concatenation, never in place, so copies of the layer objects are enough."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.batch_select_indices(rows)
    return selected
