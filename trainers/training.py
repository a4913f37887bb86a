"""What every trainer here does alike: choose device and precision, and stop when numbers stop being numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, is_bf16_available
from peft import PeftModel
from safetensors import SafetensorError
from transformers import Trainer

from .quantised import is_quantised, keep_4bit


class NonFiniteError(FloatingPointError):
    """Loss or weights became NaN or infinite."""


@dataclass
class HouseArguments:
    """Defaults that differ from TRL's. Put it before TRL's config: `class XConfig(HouseArguments, SFTConfig)`."""

    bf16: bool | None = field(
        default=None,
        metadata={"help": "bf16 autocast; None: on where an accelerator supports it, off on CPU (TRL: on)."},
    )
    dataloader_pin_memory: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "None: only with an accelerator (transformers: always, with a warning on CPU)."},
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={
            "help": "TRL: on. Small adapters need few activations, and checkpointing recomputes the frozen part."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "transformers: on, which logs a NaN loss as 0. Here a NaN loss stops the run."},
    )

    def __post_init__(self) -> None:
        if self.trust_remote_code:  # type: ignore[attr-defined]
            raise ValueError("trust_remote_code is not allowed: a recipe never runs code that comes with a model")
        accelerator = torch.accelerator.is_available() and not self.use_cpu  # type: ignore[attr-defined]
        if self.bf16 is None:
            self.bf16 = accelerator and not self.fp16 and is_bf16_available()  # type: ignore[attr-defined]
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = accelerator
        if "activation_checkpointing" in self.__dataclass_fields__:  # transformers' new name; the old one alone warns
            if getattr(self, "activation_checkpointing") is None:  # noqa: B009
                self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()  # type: ignore[misc]
        state = self.distributed_state  # type: ignore[attr-defined]
        if state is not None and state.num_processes > 1 and state.distributed_type == DistributedType.NO:
            raise ValueError(
                f"{state.num_processes} processes were started that would train copies of their own, in silence: "
                "accelerate finds no accelerator for this configuration. On CPUs start them with torchrun, --use_cpu "
                "true (plain data parallelism), or with zero2.yaml or zero3.yaml and --ddp_backend gloo"
            )


def anew(args: Any, **changes: Any) -> Any:
    """Training arguments with other values; ValueError for a field that they do not have.

    Every trainer needs its own: it fills in DeepSpeed's configuration, which a copy would share.
    """
    for name in changes:
        if name not in type(args).__dataclass_fields__:
            raise ValueError(f"{name!r} is not a field of {type(args).__name__}")
    return replace(args, **changes)


def bare(model: Any) -> Any:
    """The model inside a `PeftModel`, or the model."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def own_forward(model: torch.nn.Module) -> Iterator[None]:
    """Within the block TRL may put its fused head around the model's forward; afterwards the model has its own again,
    so that it can be copied and trained once more."""
    before = vars(model).get("forward")
    try:
        yield
    finally:
        vars(model).pop("forward", None)
        if before is not None:
            vars(model)["forward"] = before


class FiniteTrainer(Trainer):
    """Mixin before a TRL trainer: a non-finite loss or gradient step ends the run with the step and the way out.

    The loss is checked after every micro-batch (the Trainer's own NaN filter, which is off here, costs the same), the
    trained weights before anything is saved, so a checkpoint never holds NaN (under ZeRO-3, where no process has whole
    ones, they are checked at the end).

    An adapter of a quantised base is trained in fp32: TRL rounds it to bf16, whose steps are 1/256 of a value, and
    then AdamW's updates at usual learning rates are mostly lost.

    Raises:
        ValueError: see `keep_4bit`.
    """

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        given = {}
        if isinstance(model, PeftModel) and is_quantised(model):
            given = {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}
        super().__init__(model, *args, **kwargs)
        if is_quantised(self.model):
            keep_4bit(self.model)
            for name, one in self.model.named_parameters():
                if one.requires_grad:
                    one.data = given.get(name, one.data.float()).to(one.device)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"the loss became {loss.item()} at step {self.state.global_step + 1} "
                f"(learning rate {self.args.learning_rate:g}). Lower --learning_rate, check --max_grad_norm, or train "
                "in fp32 (--bf16 false), in another --output_dir. What was saved before is untouched."
            )
        return loss

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        check_finite(self.model, self.state.global_step)
        with clear_disk_errors(self.args.output_dir):
            super().save_model(*args, **kwargs)


def check_finite(model: torch.nn.Module, step: int) -> None:
    """NonFiniteError for a trained parameter that holds NaN or infinite values."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise NonFiniteError(
                f"{name} holds NaN or infinite values after step {step}; nothing was saved. "
                "Lower --learning_rate and start in another --output_dir; what was saved before is untouched."
            )


@contextmanager
def clear_disk_errors(folder: str | Path) -> Iterator[None]:
    """OSError with the folder's name for what safetensors raises where a disk is full, among others."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"cannot save to {folder}: {error}") from error


def save_tuned(model: Any, tokenizer: Any, folder: Path, save: Callable[[Any, Path], None] | None = None) -> None:
    """A model (as `save` does it, else plainly), or an adapter alone, and its tokenizer; without PEFT's template card,
    which names folders."""
    with clear_disk_errors(folder):
        if isinstance(model, PeftModel) or save is None:
            model.save_pretrained(folder)
        else:
            save(model, folder)
        tokenizer.save_pretrained(folder)
    if isinstance(model, PeftModel):
        (folder / "README.md").unlink(missing_ok=True)
