"""TRL's trainers with LoFiT's L1 penalty, counted once per optimiser step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from ..training import FiniteTrainer, HouseArguments
from .layer import LofitLayer


@dataclass
class LofitArguments(HouseArguments):
    """The defaults of LoFiT's released scripts (Llama-2-7B, TruthfulQA) where TRL's differ."""

    l1_lambda: float = field(
        default=0.0,
        metadata={
            "help": "Weight of sum|scale| over all heads. The paper fits scales with 5e-4 to 5e-3, offsets with 0."
        },
    )
    learning_rate: float = field(
        default=1e-2, metadata={"help": "The paper's for offsets: 8e-3 to 2e-2 (scales: 5e-4 to 5e-3)."}
    )
    num_train_epochs: float = field(default=5.0, metadata={"help": "The paper's 5."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "The paper's 8, no accumulation."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "The paper's: linear to 0, no warm-up."})
    optim: str = field(default="adamw_torch", metadata={"help": "The paper's AdamW, without weight decay."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.l1_lambda < float("inf"):
            raise ValueError(f"l1_lambda={self.l1_lambda!r} must be a finite number >= 0")


@dataclass
class LofitSFTConfig(LofitArguments, SFTConfig):  # type: ignore[misc]
    """`SFTConfig` with LoFiT's defaults and `l1_lambda`. Loss on the completion only (prompt/completion data)."""

    max_length: int | None = field(default=512, metadata={"help": "Longest sequence in tokens (TRL: 1024)."})


@dataclass
class LofitDPOConfig(LofitArguments, DPOConfig):  # type: ignore[misc]
    """`DPOConfig` with LoFiT's defaults and `l1_lambda`."""

    beta: float = field(default=0.5, metadata={"help": "The paper's DPO temperature (TRL: 0.1)."})
    max_length: int | None = field(default=512, metadata={"help": "Longest sequence in tokens (TRL: 1024)."})


class _LofitTrainer(FiniteTrainer):
    """The penalty, and fp32 adapter parameters whatever the base is."""

    args: LofitSFTConfig | LofitDPOConfig
    _metrics: dict[str, dict[str, list[float]]]

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        for parameter in _lofit_parameters(self.model).values():
            parameter.data = parameter.data.float()  # whatever the base's type: in bf16 1 + scale would be 1
        self._layers = [module for module in self.model.modules() if isinstance(module, LofitLayer)]
        scales = any("lofit_scale" in name and p.requires_grad for name, p in _lofit_parameters(self.model).items())
        if self.args.l1_lambda > 0 and not scales:
            raise ValueError(
                f"l1_lambda={self.args.l1_lambda:g} penalises scales, but this model trains none; use "
                "LofitConfig(component='scale' or 'both'), or l1_lambda=0 to fit offsets"
            )
        if self.args.l1_lambda > 0 and self.args.fp16:
            raise ValueError(
                "l1_lambda needs bf16 or fp32: fp16's loss scaling would not reach the penalty's gradient"
            )

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        steps = self.current_gradient_accumulation_steps
        for layer in self._layers:
            layer.l1_coefficient = self.args.l1_lambda / steps
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        finally:
            for layer in self._layers:
                layer.l1_coefficient = 0.0
        if self.args.l1_lambda > 0:
            norms = [layer.l1.cpu() for layer in self._layers if layer.l1 is not None]
            self._metrics["train"]["l1_penalty"].append(self.args.l1_lambda * float(sum(norms)))
        return loss


class LofitSFTTrainer(_LofitTrainer, SFTTrainer):
    """`trl.SFTTrainer` whose gradient also holds that of `l1_lambda * sum|lofit_scale|`.

    The penalty enters in the layer's backward pass, divided by the accumulation steps: exactly once per optimiser step
    under accumulation, several processes, ZeRO-2 and ZeRO-3 (the latter two checked by hand, see
    tests/distributed_lofit.py), and before clipping, as in the paper's code. The reported losses are the task's alone;
    `l1_penalty` is logged beside them.

    Args: as `trl.SFTTrainer`; `args` is a `LofitSFTConfig`, `peft_config` a `LofitConfig`.
    """

    _tag_names = ["trl", "sft", "lofit"]
    _name = "LoFiT"


class LofitDPOTrainer(_LofitTrainer, DPOTrainer):
    """`trl.DPOTrainer` with the same penalty (see `LofitSFTTrainer`); the reference policy is the untouched base.

    Args: as `trl.DPOTrainer`; `args` is a `LofitDPOConfig`, `peft_config` a `LofitConfig`. Given a `PeftModel`, TRL
        would take a copy of its adapter as reference; here the reference is the base all the same.
    """

    _tag_names = ["trl", "dpo", "lofit"]
    _name = "LoFiT"

    def __init__(self, model: Any, ref_model: Any = None, args: LofitDPOConfig | None = None, **kwargs: Any) -> None:
        wrapped = isinstance(model, PeftModel) and ref_model is None
        if wrapped and args is not None and args.precompute_ref_log_probs:
            raise ValueError(
                "precompute_ref_log_probs with a PeftModel would use its adapter as the reference; pass the base "
                "model and peft_config=LofitConfig(...) instead"
            )
        super().__init__(model, ref_model, args, **kwargs)
        if wrapped:
            self.model.delete_adapter("ref")  # TRL then computes the reference with adapters disabled


def _lofit_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lofit_scale" in name or "lofit_offset" in name}
