"""Rows of a stream as text, in the tokens of a pretrained model's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..multitask import completion_tokens

EOS = 1  # in a stream's rows


class TextStep(NamedTuple):
    """The rows of one optimiser step, padded at their ends."""

    ids: Tensor  # [rows, width]
    targets: Tensor  # which carry loss, bool [rows, width]
    lengths: Tensor  # items of the problem [rows]
    tasks: Tensor  # number of the task [rows]


class TextStream:
    """What `HintingTrainer` trains a pretrained model on, made of `data_builders.task_hinting.make_stream`.

    Tokenised as TRL tokenises prompt and completion (`completion_tokens`); loss on the completion and the end of text.
    A hint behind the main task's own mark only goes on from where it stands: there the end of text carries loss where
    the main task's answer ends as well, and is the whole answer behind the last item. (TRL would end every completion,
    and so contradict the main task.)

    Raises:
        ValueError: a tokenizer without an end-of-text token, or tasks with several questions a row (`queries`).
    """

    def __init__(self, stream: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-text token, which an answer ends with")
        if any(task.queries > 1 for task in stream.tasks):
            raise ValueError("a text asks one question: make the stream with queries=1")
        self.stream, self.tokenizer = stream, tokenizer
        self.tasks, self.rows = stream.tasks, stream.rows

    @property
    def identity(self) -> dict[str, Any]:
        """All that its rows follow from, but for the tokenizer."""
        return {**self.stream.identity, "text": True}

    def step(self, number: int) -> TextStep:
        """The rows of step `number`, counted from 0."""
        made = self.stream.step(number)
        prompts, completions, ended = [], [], []
        for place, ids, targets in zip(made.tasks.tolist(), made.ids.tolist(), made.targets.tolist(), strict=True):
            answer = [token for token, target in zip(ids, targets, strict=True) if target]
            prompt, completion = self.stream.family.text(self.tasks[place].name, ids, targets)
            shared = self.tasks[place].shared
            prompts.append(prompt)
            completions.append("" if shared and answer == [EOS] else completion)
            ended.append(not shared or answer[-1] == EOS)
        whole, begun = completion_tokens(self.tokenizer, prompts, completions)
        width = max(map(len, whole))
        pad = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in whole])
        starts, ends = torch.tensor(begun)[:, None], torch.tensor([len(row) for row in whole])[:, None]
        place = torch.arange(width)
        targets = (place >= starts) & (place < ends - ~torch.tensor(ended)[:, None] * 1)
        return TextStep(ids, targets, torch.as_tensor(made.lengths), torch.as_tensor(made.tasks))


def check_positions(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, str]]) -> None:
    """ValueError for a model with fewer positions than the longest of rows (`prompt`, `completion`) has tokens."""
    whole, _ = completion_tokens(tokenizer, [row["prompt"] for row in rows], [row["completion"] for row in rows])
    longest, limit = max(map(len, whole)), getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ValueError(
            f"the longest test row has {longest} tokens, and the model takes {limit}: shorten --test_lengths"
        )
