"""TRL's SFTTrainer on coefficients: the loss of several tasks, backward through the composed weights, AdamW on n * m
numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from ..multitask import MultiTaskTrainer
from ..training import HouseArguments, NonFiniteError
from .composer import Composer

WEIGHTS = "coefficients.safetensors"
UNIT_EPSILON = 1e-8 * 65536  # spec 1.7: what Adam's 1e-8 amounts to behind a gradient scaler that is never undone


@dataclass
class AtlasConfig(HouseArguments, SFTConfig):  # type: ignore[misc]
    """`SFTConfig` with the paper's few-shot values (its appendix; spec 1.6) where TRL's differ."""

    learning_rate: float = field(default=0.1, metadata={"help": "The paper's 1e-1 (negation and addition: 1e-3)."})
    weight_decay: float = field(default=0.1, metadata={"help": "The paper's 0.1: pulls coefficients to the base."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The paper's: cosine to 0, no warm-up."})
    num_train_epochs: float = field(default=10.0, metadata={"help": "The paper's 10."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Rows of a micro-batch."})
    max_length: int | None = field(default=512, metadata={"help": "Longest sequence in tokens (TRL: 1024)."})
    gradient: Literal["clip", "unit"] = field(
        default="clip",
        metadata={
            "help": "clip: to --max_grad_norm. unit: the paper's released code in effect, the gradient's direction "
            "alone (with --adam_epsilon 6.55e-4 unless another is given)."
        },
    )
    norm_penalty: Literal[0, 1, 2] = field(
        default=0, metadata={"help": "p > 0 adds 0.5 * the mean over blocks of the coefficients' p-norm."}
    )
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
        if self.gradient == "unit" and self.adam_epsilon == 1e-8:
            self.adam_epsilon = UNIT_EPSILON
        if self.forget_cap is not None and not self.forget_cap > 0:
            raise ValueError(f"forget_cap={self.forget_cap!r} must be above 0")
        if not 0 < self.retain_weight < math.inf:
            raise ValueError(f"retain_weight={self.retain_weight!r} must be a finite number above 0")


class AtlasTrainer(MultiTaskTrainer):
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
        composer: Composer,
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
        for slot_parameter in composer.model.parameters():
            slot_parameter.grad = None
        if self.is_deepspeed_enabled:
            raise ValueError(
                "aTLAS contracts each weight's gradient during the backward pass, which DeepSpeed keeps to itself; "
                "use DDP or FSDP2 (accelerate_configs/ddp.yaml, fsdp2.yaml)"
            )
        if self.is_fsdp_enabled and args.save_strategy != "no":
            raise ValueError(
                "checkpoints of aTLAS under FSDP2 are not supported; its fits are short: --save_strategy no"
            )
        if not self.is_fsdp_enabled:  # weights take no optimiser step: there is nothing for DDP to synchronise
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def token_nats(self, model: Any, inputs: dict[str, Any], tasks: Tensor) -> tuple[Tensor, Tensor]:
        if self.args.entropy_below is None:
            return super().token_nats(model, inputs, tasks)
        seen = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        last = inputs["attention_mask"].sum(1) - 1  # rows are padded on the right
        logits = model(**seen, use_cache=False).logits
        entropies = torch.distributions.Categorical(logits=logits[torch.arange(len(last)), last].float()).entropy()
        reliable = entropies.detach() < self.args.entropy_below * math.log(logits.shape[-1])
        return torch.where(reliable, entropies, torch.zeros_like(entropies)), tasks

    def token_loss(self, nats: Tensor, tasks: Tensor) -> Tensor:
        if self.args.forget_cap is None:
            return nats
        forgotten = self.task_weights.to(nats.device)[tasks] < 0
        return torch.where(forgotten, nats.clamp(max=self.args.forget_cap), nats)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if not self.is_fsdp_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        # accelerate shards a model only together with an optimizer of its weights; this one never steps.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.composer.rebind(self.model)
        self.optimizer = self.lr_scheduler = None
        self.optimizer = self.accelerator.prepare_optimizer(self.create_optimizer())
        self.create_scheduler(num_training_steps=max_steps)
        for name in ("optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        return prepared

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(
                [self.composer.coefficients],
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                weight_decay=self.args.weight_decay,
            )
            self.optimizer.register_step_post_hook(self._after_step)
        return self.optimizer

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.composer.coefficients.grad = None
        self.composer.compose()

    def _clip_grad_norm(self, model: Any) -> None:
        """Done in `_get_grad_norm`, which the Trainer also calls when nothing is clipped."""

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        coefficients = self.composer.coefficients
        self.composer.reduce_gradients()
        if coefficients.grad is None:
            raise ValueError("no row of this step has a completion token; nothing can be learned from it")
        if self.args.norm_penalty:
            coefficients.grad += penalty_gradient(coefficients, self.args.norm_penalty)
        norm = float(coefficients.grad.norm())
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"the gradient became {norm} at step {self.state.global_step + 1} (learning rate "
                f"{self.args.learning_rate:g}). Lower --learning_rate or bound the forgetting (--forget_cap)."
            )
        if self.args.gradient == "unit":
            coefficients.grad /= norm or 1.0
        elif self.args.max_grad_norm and norm > self.args.max_grad_norm:
            coefficients.grad *= self.args.max_grad_norm / (norm + 1e-6)  # as torch's clip_grad_norm_
        return norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not torch.isfinite(self.composer.coefficients).all():
            raise NonFiniteError(f"coefficients became NaN after step {self.state.global_step}; nothing was saved")
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            counted = {"compositions": str(getattr(self.composer, "compositions", 0))}
            save_file({"coefficients": self.composer.coefficients.detach().cpu()}, folder / WEIGHTS, counted)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with safe_open(Path(resume_from_checkpoint) / WEIGHTS, framework="pt") as file:
            saved, counted = file.get_tensor("coefficients"), file.metadata() or {}
        if saved.shape != self.composer.coefficients.shape:
            raise ValueError(
                f"{resume_from_checkpoint} holds coefficients {list(saved.shape)}, not "
                f"{list(self.composer.coefficients.shape)}: other vectors or blocks"
            )
        with torch.no_grad():
            self.composer.coefficients.copy_(saved)
        if isinstance(self.composer, Composer):  # stochastic rounding draws by this number; compose() adds one to it
            self.composer.compositions = int(counted.get("compositions", 1)) - 1
        self.composer.compose()


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


def penalty_gradient(coefficients: Tensor, p: int) -> Tensor:
    """Gradient of 0.5 * mean over blocks of the p-norm over vectors (spec 1.6); 0 where the coefficients are 0."""
    with torch.enable_grad():
        leaf = coefficients.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(0.5 * leaf.norm(p, dim=0).mean(), leaf)
    return gradient
