"""TRL's SFTTrainer on coefficients: the loss of several tasks, backward through the composed weights, AdamW on n * m
numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from ..multitask import MultiTaskArguments, MultiTaskTrainer
from .coefficient_trainer import CoefficientArguments, CoefficientTrainer
from .composer import Composer
from .low_rank import LowRankComposer


@dataclass
class AtlasConfig(CoefficientArguments, MultiTaskArguments, SFTConfig):  # type: ignore[misc]
    """`SFTConfig` with the paper's few-shot values (its appendix; spec 1.6) where TRL's differ."""

    per_device_train_batch_size: int = field(default=8, metadata={"help": "Rows of a micro-batch."})
    max_length: int | None = field(default=512, metadata={"help": "Longest sequence in tokens (TRL: 1024)."})
    forget_tasks: list[str] | None = field(
        default=None, metadata={"help": "Negation: tasks whose loss is raised while that of the others is kept low."}
    )
    forget_cap: float | None = field(
        default=None,
        metadata={"help": "Nats per token beyond which nothing more is forgotten; unset: the paper's -CE."},
    )
    retain_weight: float = field(default=1.0, metadata={"help": "Weight of the mean loss of the tasks to keep."})
    entropy_below: float | None = field(
        default=None,
        metadata={
            "help": "Test-time adaptation: lower the entropy of the first token after each prompt, on rows where it "
            "is below this share of the largest possible one (SAR: 0.4). Completions are not looked at."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.forget_cap is not None and not self.forget_cap > 0:
            raise ValueError(f"forget_cap={self.forget_cap!r} must be above 0")
        if not 0 < self.retain_weight < math.inf:
            raise ValueError(f"retain_weight={self.retain_weight!r} must be a finite number above 0")


class AtlasTrainer(CoefficientTrainer, MultiTaskTrainer):
    """Learn a composer's coefficients.

    Addition and few-shot: the loss is the sum over tasks of each task's mean. Negation (`args.forget_tasks`): minus
    the mean of each task to forget, capped or not, plus `retain_weight` times the mean over the other tasks. Test-time
    adaptation (`args.entropy_below`): the mean entropy after the prompts, of rows that are certain enough already.

    Args:
        composer: a `Composer` or `LowRankComposer`; its model is trained in place.
        args: an `AtlasConfig`.
        train_dataset: prompt/completion rows (or messages) with a column `task`.
        processing_class: the tokenizer.

    Checkpoints hold the coefficients alone; resuming one continues bit for bit. Under DDP every process holds the
    whole model and n * m numbers are exchanged a step; the model is not wrapped.

    Raises:
        NonFiniteError: loss or gradient became NaN or infinite.
        ValueError: a task to forget without rows, or no other task.
    """

    _tag_names = ["trl", "sft", "atlas"]
    _name = "aTLAS"
    args: AtlasConfig

    def __init__(
        self,
        composer: Composer | LowRankComposer,
        args: AtlasConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        callbacks: Sequence[Any] | None = None,
    ) -> None:
        self.composer = composer
        if args.entropy_below is not None:
            train_dataset = prompts_only(train_dataset, processing_class)
        tasks = sorted(set(train_dataset["task"])) if "task" in train_dataset.column_names else ["all"]
        super().__init__(
            composer.model,
            args,
            train_dataset,
            task_weights=task_weights(tasks, args.forget_tasks, args.retain_weight),
            processing_class=processing_class,
            callbacks=None if callbacks is None else list(callbacks),
        )
        self._take_over_engines()

    def token_nats(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if self.args.entropy_below is None:
            return super().token_nats(model, inputs)
        seen = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        last = inputs["attention_mask"].sum(1) - 1  # rows are padded on the right
        logits = model(**seen, use_cache=False).logits
        entropies = torch.distributions.Categorical(logits=logits[torch.arange(len(last)), last].float()).entropy()
        reliable = entropies.detach() < self.args.entropy_below * math.log(logits.shape[-1])
        return torch.where(reliable, entropies, torch.zeros_like(entropies)), torch.arange(
            len(last), device=last.device
        )

    def mean_losses(self, nats: Tensor, tasks: Tensor, rows: Tensor, whole: Tensor) -> Tensor:
        if self.args.forget_cap is not None:
            forgotten = self.task_weights.to(nats.device)[tasks] < 0
            nats = torch.where(forgotten, nats.clamp(max=self.args.forget_cap), nats)
        return super().mean_losses(nats, tasks, rows, whole)


def prompts_only(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Tokenised prompts; the label on the last token only marks that each row counts once in its task's mean."""

    def tokenise(row: dict[str, Any]) -> dict[str, Any]:
        if isinstance(row["prompt"], str):
            ids = tokenizer(row["prompt"])["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        return {"input_ids": ids, "labels": [-100] * (len(ids) - 1) + ids[-1:]}

    kept = [name for name in rows.column_names if name == "task"]
    return rows.map(tokenise, remove_columns=[name for name in rows.column_names if name not in kept])


def task_weights(tasks: Sequence[str], forget: Sequence[str] | None, retain_weight: float) -> Mapping[str, float]:
    """Weight of each task's mean loss: 1 for addition; -1 for tasks to forget, the others sharing `retain_weight`."""
    if not forget:
        return dict.fromkeys(tasks, 1.0)
    unknown, kept = sorted(set(forget) - set(tasks)), sorted(set(tasks) - set(forget))
    if unknown or not kept:
        raise ValueError(f"forget_tasks={list(forget)}, but the rows are of {list(tasks)}: name some of them, not all")
    return {task: -1.0 if task in forget else retain_weight / len(kept) for task in tasks}
