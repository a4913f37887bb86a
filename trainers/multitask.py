"""`trl.SFTTrainer` for several tasks at once: each task's loss is a mean of its own, over the whole optimiser step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from .training import FiniteTrainer, HouseArguments, own_forward


@dataclass
class MultiTaskArguments(HouseArguments):
    """What `MultiTaskTrainer` adds. Put it before TRL's config."""

    train_eos: bool = field(
        default=True, metadata={"help": "Whether the end-of-text token that TRL appends to completions carries loss."}
    )


@dataclass
class MultiTaskConfig(MultiTaskArguments, SFTConfig):  # type: ignore[misc]
    """`SFTConfig` for `MultiTaskTrainer`."""

    max_length: int | None = field(default=512, metadata={"help": "Longest sequence in tokens (TRL: 1024)."})


class MultiTaskTrainer(FiniteTrainer, SFTTrainer):
    """The loss is `sum_t weight_t * mean_t`, where `mean_t` is the mean nats per completion token of task t's rows.

    The mean is over all rows of the task in the optimiser step, whatever the micro-batches and processes they lie in,
    so 8 x 1, 4 x 2 and two processes give equal steps. A task without rows in a step adds nothing.

    Args: as `trl.SFTTrainer`, `args` with the fields of `MultiTaskArguments`, and
        train_dataset: with a text column `task` (without it, everything is one task); what `tokenised` made of rows
            is taken as it is.
        task_weights: weight of each task's mean; default 1 for each.

    Logs `loss/<task>` and `tokens/<task>` beside TRL's own values.

    Raises:
        ValueError: packing (rows of several tasks would share a sequence), or weights for tasks without rows.
    """

    _metrics: dict[str, dict[str, list[float]]]
    data_collator: Any

    def __init__(
        self,
        model: Any,
        args: Any,
        train_dataset: Dataset,
        *,
        task_weights: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if args.packing:
            raise ValueError("packing puts rows of several tasks into one sequence; switch it off (--packing false)")
        if "task" not in train_dataset.column_names:
            train_dataset = train_dataset.add_column("task", ["all"] * len(train_dataset))
        self.tasks = sorted(set(train_dataset["task"]))
        weights = dict.fromkeys(self.tasks, 1.0) if task_weights is None else dict(task_weights)
        if set(weights) != set(self.tasks):
            raise ValueError(f"task_weights names {sorted(weights)}, but the rows are of {self.tasks}")
        if "labels" in train_dataset.column_names:
            args = copy.copy(args)
            args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        super().__init__(model, args=args, train_dataset=train_dataset, **kwargs)
        self.task_weights = torch.tensor([weights[task] for task in self.tasks])
        unscored = None if args.train_eos else self.processing_class.eos_token_id
        self.data_collator = _TaskCollator(self.data_collator, self.tasks, unscored)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by what the whole step holds
        self._step_tokens: Tensor | None = None
        self._seen = torch.zeros(2, len(self.tasks), dtype=torch.float64, device=self.args.device)  # nats, tokens

    def token_nats(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Nats of every completion token of the batch, and the row each belongs to; both [tokens]."""
        outputs = model(**{**inputs, "use_cache": False}, fused_lm_head=True)  # use_cache would join packed rows
        seen = outputs.label_mask.bool()
        return -outputs.log_probs[seen], row_of_each(seen)

    def mean_losses(self, nats: Tensor, tasks: Tensor, rows: Tensor, whole: Tensor) -> Tensor:
        """What this batch adds to each task's mean [tasks]; of its tokens: nats, tasks (numbers of `self.tasks`) and
        rows [tokens]; `whole`: tokens of each task in the optimiser step [tasks]."""
        return nats.new_zeros(len(self.tasks)).index_add(0, tasks, nats) / whole.clamp(min=1)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        mode = "train" if self.model.training else "eval"
        tasks = inputs.pop("task_id")
        nats, rows = self.token_nats(model, inputs)
        of_token = tasks[rows]
        here = torch.bincount(of_token, minlength=len(self.tasks))
        whole = here if mode == "eval" or self._step_tokens is None else self._step_tokens
        loss = (self.task_weights.to(nats.device) * self.mean_losses(nats, of_token, rows, whole)).sum()
        if mode == "train":
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
            attended = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
            self._total_train_tokens += int(self.summed(torch.as_tensor(attended, device=nats.device)))
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        self._seen[0].index_add_(0, of_token, nats.detach().double())
        self._seen[1] += here
        if mode == "eval" or self.accelerator.sync_gradients:
            self._log_tasks(mode)
        return (loss, {"loss": loss}) if return_outputs else loss

    def summed(self, values: Tensor) -> Tensor:
        """The sum over processes; of a single one the tensor itself (accelerate's `reduce` takes 0.5 % of a step)."""
        return values if self.accelerator.num_processes == 1 else self.accelerator.reduce(values, "sum")

    def _log_tasks(self, mode: str) -> None:
        """Means over all that was seen since the last call: an optimiser step, or a batch in evaluation."""
        sums, counts = self.summed(self._seen).tolist()
        self._seen.zero_()
        for task, total, count in zip(self.tasks, sums, counts, strict=True):
            if count:
                self._metrics[mode][f"loss/{task}"].append(total / count)
                self._metrics[mode][f"tokens/{task}"].append(count)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.zeros(len(self.tasks), dtype=torch.long, device=device)
        for batch in batches:
            seen = (batch["labels"][:, 1:] != -100).to(device)
            counts.index_add_(0, batch["task_id"].to(device), seen.sum(1))
        self._step_tokens = self.summed(counts)
        return batches, items

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "task" not in self._signature_columns:
            self._signature_columns.append("task")


def tokenised(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, args: SFTConfig) -> Dataset:
    """The rows with `input_ids` and `labels` beside their columns, as TRL makes them: once for many short fits."""
    if not isinstance(rows[0]["prompt"], str):
        with own_forward(model):
            return MultiTaskTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer).train_dataset
    ids, starts = completion_tokens(tokenizer, rows["prompt"][:], rows["completion"][:])
    labels = [[-100] * start + row[start:] for row, start in zip(ids, starts, strict=True)]
    for name, column in (("input_ids", ids), ("labels", labels)):
        rows = rows.add_column(name, [row[: args.max_length] for row in column])
    return rows


def completion_tokens(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], completions: Sequence[str]
) -> tuple[list[list[int]], list[int]]:
    """Of each row its tokens, the end-of-text token behind the completion, and the place where that begins: as TRL's
    `SFTTrainer` tokenises them, but all in one call, where TRL takes a second for 1,500 rows."""
    end = tokenizer.eos_token
    ended = [text if text.endswith(end) else text + end for text in completions]
    alone = tokenizer(list(prompts))["input_ids"]
    whole = tokenizer([prompt + text for prompt, text in zip(prompts, ended, strict=True)])["input_ids"]
    return whole, [len(commonprefix(pair)) for pair in zip(alone, whole, strict=True)]


def row_of_each(seen: Tensor) -> Tensor:
    """Of every true place of `seen` [rows, width] the number of its row [places]."""
    return torch.arange(len(seen), device=seen.device)[:, None].expand_as(seen)[seen]


class _TaskCollator:
    """Another collator's batch, with `task_id` [rows], and without loss on the token `unscored`, which at the end of
    a row is left out: nothing would come of reading it."""

    def __init__(
        self, inner: Callable[[list[dict[str, Any]]], dict[str, Any]], tasks: list[str], unscored: int | None
    ) -> None:
        self.inner, self.numbers = inner, {task: number for number, task in enumerate(tasks)}
        self.unscored = unscored

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        numbers = [self.numbers[example["task"]] for example in examples]
        rows = [{k: v for k, v in example.items() if k != "task"} for example in examples]
        for row in rows:
            if self.unscored is not None and row["labels"][-1] == self.unscored:
                row |= {key: row[key][:-1] for key in ("input_ids", "labels")}
        batch = self.inner(rows)
        if self.unscored is not None:
            batch["labels"] = batch["labels"].masked_fill(batch["labels"] == self.unscored, -100)
        return {**batch, "task_id": torch.tensor(numbers)}
