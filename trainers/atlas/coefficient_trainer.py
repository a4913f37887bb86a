"""What training coefficients asks of a Trainer, whatever the model sees: an optimizer of n * m numbers, weights that
are composed anew after each of its steps, gradients that hooks have filled."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer

from ..training import NonFiniteError
from .composer import Composer
from .low_rank import LowRankComposer
from .one_pass import OnePassAdamW

WEIGHTS = "coefficients.safetensors"
UNIT_EPSILON = 1e-8 * 65536  # spec 1.7: what Adam's 1e-8 amounts to behind a gradient scaler that is never undone


@dataclass
class CoefficientArguments:
    """The paper's few-shot values (its appendix; spec 1.6). Put it first among a config's bases."""

    learning_rate: float = field(default=0.1, metadata={"help": "The paper's 1e-1 (negation and addition: 1e-3)."})
    weight_decay: float = field(default=0.1, metadata={"help": "The paper's 0.1: pulls coefficients to the base."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The paper's: cosine to 0, no warm-up."})
    num_train_epochs: float = field(default=10.0, metadata={"help": "The paper's 10."})
    optimizer: Literal["adamw", "paper"] = field(
        default="adamw",
        metadata={
            "help": "adamw: AdamW on gradients clipped to --max_grad_norm. paper: what the released code does in "
            "effect, AdamW on the gradient's direction alone (with --adam_epsilon 6.55e-4 unless another is given)."
        },
    )
    one_pass: bool = field(
        default=False,
        metadata={
            "help": "Move and compose each block within the backward pass, so that every vector is read once a step "
            "(spec 5.3 B). Needs --max_grad_norm 0, no accumulation, one process."
        },
    )
    norm_penalty: Literal[0, 1, 2] = field(
        default=0, metadata={"help": "p > 0 adds 0.5 * the mean over blocks of the coefficients' p-norm."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        optim = str(getattr(self.optim, "value", self.optim))  # type: ignore[attr-defined]
        if not optim.startswith("adamw_torch"):
            raise ValueError(f"--optim {optim} has no effect on coefficients: see --optimizer")
        if self.optimizer == "paper" and self.adam_epsilon == 1e-8:  # type: ignore[has-type]
            self.adam_epsilon = UNIT_EPSILON
        whole = {
            "max_grad_norm": self.max_grad_norm or 0,  # type: ignore[attr-defined]
            "norm_penalty": self.norm_penalty,
            "gradient_accumulation_steps": self.gradient_accumulation_steps - 1,  # type: ignore[attr-defined]
            "optimizer": self.optimizer == "paper",
        }
        for name, used in whole.items():
            if self.one_pass and used:
                raise ValueError(
                    f"one_pass moves a block before the others have a gradient, which {name}={getattr(self, name)} "
                    "needs: --max_grad_norm 0 --norm_penalty 0 --optimizer adamw --gradient_accumulation_steps 1"
                )


class CoefficientTrainer(Trainer):
    """Mixin before a Trainer of `composer.model`; `composer` is set before that Trainer's own `__init__`.

    Checkpoints hold the coefficients alone; resuming one continues bit for bit. Under DDP every process holds the
    whole model and n * m numbers are exchanged a step; the model is not wrapped.
    """

    composer: Composer | LowRankComposer
    optimizer: Any
    lr_scheduler: Any

    def _take_over_engines(self) -> None:
        """After the Trainer's `__init__`: what DDP, FSDP2 and DeepSpeed may do. ValueError for what they cannot."""
        for parameter in self.composer.model.parameters():
            parameter.grad = None
        if self.is_deepspeed_enabled:
            raise ValueError(
                "aTLAS contracts each weight's gradient during the backward pass, which DeepSpeed keeps to itself; "
                "use DDP or FSDP2 (accelerate_configs/ddp.yaml, fsdp2.yaml)"
            )
        if self.is_fsdp_enabled and self.args.save_strategy != "no":
            raise ValueError(
                "checkpoints of aTLAS under FSDP2 are not supported; its fits are short: --save_strategy no"
            )
        one = isinstance(self.composer, Composer) and self.args.world_size == 1 and not self.is_fsdp_enabled
        if self.args.one_pass and not one:
            raise ValueError("one_pass is for dense vectors and one process; leave out --one_pass")
        if not self.is_fsdp_enabled:  # weights take no optimiser step: there is nothing for DDP to synchronise
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def _composed_part(self) -> nn.Module:
        """The module that the composer knows, after FSDP2 has taken the model over."""
        return self.model

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if not self.is_fsdp_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        # accelerate shards a model only together with an optimizer of its weights; this one never steps.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if isinstance(self.composer, LowRankComposer):
            raise ValueError("LoRA vectors are composed with one process or under DDP, not yet under FSDP2")
        self.composer.rebind(self._composed_part())
        self.optimizer = self.lr_scheduler = None
        self.optimizer = self.accelerator.prepare_optimizer(self.create_optimizer())
        self.create_scheduler(num_training_steps=max_steps)
        for name in ("optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        return prepared

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            settings: dict[str, Any] = {
                "lr": self.args.learning_rate,
                "betas": (self.args.adam_beta1, self.args.adam_beta2),
                "eps": self.args.adam_epsilon,
                "weight_decay": self.args.weight_decay,
            }
            if self.args.one_pass:
                assert isinstance(self.composer, Composer)  # see _take_over_engines
                self.optimizer = OnePassAdamW(self.composer, **settings)
            else:
                self.optimizer = torch.optim.AdamW([self.composer.coefficients], **settings)
            self.optimizer.register_step_post_hook(self._after_step)
        return self.optimizer

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.composer.coefficients.grad = None
        if not self.args.one_pass:
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
        if self.args.optimizer == "paper":
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
            counted["vectors"] = ",".join(self.composer.vector_ids)
            save_file({"coefficients": self.composer.coefficients.detach().cpu()}, folder / WEIGHTS, counted)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with safe_open(Path(resume_from_checkpoint) / WEIGHTS, framework="pt") as file:
            saved, counted = file.get_tensor("coefficients"), file.metadata() or {}
        if saved.shape != self.composer.coefficients.shape:
            raise ValueError(
                f"{resume_from_checkpoint} holds coefficients {list(saved.shape)}, not "
                f"{list(self.composer.coefficients.shape)}: other vectors or blocks"
            )
        if counted.get("vectors") != ",".join(self.composer.vector_ids):
            raise ValueError(f"{resume_from_checkpoint} holds coefficients of other task vectors, or in another order")
        with torch.no_grad():
            self.composer.coefficients.copy_(saved)
        if isinstance(self.composer, Composer):  # stochastic rounding draws by this number; compose() adds one to it
            self.composer.compositions = int(counted.get("compositions", 1)) - 1
        self.composer.compose()


def penalty_gradient(coefficients: Tensor, p: int) -> Tensor:
    """Gradient of 0.5 * mean over blocks of the p-norm over vectors (spec 1.6); 0 where the coefficients are 0."""
    with torch.enable_grad():
        leaf = coefficients.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(0.5 * leaf.norm(p, dim=0).mean(), leaf)
    return gradient
