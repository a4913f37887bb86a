"""Which arms an aTLAS run has, and with which settings: the flags of `arms.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from .composer import Composer
from .task_vector import TaskVector

SECTIONS = ("addition", "data", "fewshot", "negation", "budget")
ARMS = ("tuned", "sum", "alpha", "isotropic", "atlas", "atlas_lora", "lorahub", "ties", "dare", "adamerging", "joint",
        "finetune", "lora", "random", "feature", "gradient", "blockwise")  # fmt: skip


@dataclass
class ArmArguments:
    """How vectors are composed, and which methods run beside that. The trainer's flags are the coefficients'."""

    known: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]] = (SECTIONS, ARMS)

    sections: list[str] = field(
        default_factory=lambda: ["addition"], metadata={"help": f"What to compare: {', '.join(SECTIONS)}."}
    )
    arms: list[str] = field(
        default_factory=lambda: list(ARMS), metadata={"help": f"Which methods to run: {', '.join(ARMS)}."}
    )
    blocks: Literal["tensor", "matrices", "module", "layer", "fused_qkv", "isotropic"] = field(
        default="tensor", metadata={"help": "What shares a coefficient; tensor: the paper's."}
    )
    include: list[str] | None = field(default=None, metadata={"help": "Compose only parameters matching a pattern."})
    exclude: list[str] | None = field(
        default=None, metadata={"help": "Leave out parameters matching a pattern. Unset: embeddings and head."}
    )
    placement: Literal["resident", "stream"] = field(
        default="resident", metadata={"help": "stream: read vectors from one file, tile by tile (memory)."}
    )
    rounding: Literal["nearest", "stochastic"] = field(
        default="nearest", metadata={"help": "stochastic: for bf16 weights, where small steps are else lost."}
    )
    partitions: int = field(default=1, metadata={"help": "Coefficients a block and vector (aTLAS x K)."})
    low_rank_mode: Literal["per_product", "per_factor"] = field(
        default="per_product", metadata={"help": "LoRA vectors: a coefficient for each product, or for each factor."}
    )
    isotropic_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of one coefficient a vector. Unset: --learning_rate."}
    )
    joint_learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of fine-tuning all weights."})
    shot_learning_rate: float = field(default=1e-5, metadata={"help": "The same on few rows of a new task."})
    shot_coefficient_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of coefficients there. Unset: --learning_rate."}
    )
    shot_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of coefficients there. Unset: --weight_decay."}
    )
    lora_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of a LoRA (r=4) on few rows."})
    lora_vector_learning_rate: float = field(default=0.1, metadata={"help": "Learning rate over LoRA vectors."})
    adamerging_learning_rate: float = field(default=1e-3, metadata={"help": "AdaMerging's."})
    ties_density: float = field(default=0.2, metadata={"help": "Share of entries that TIES keeps."})
    dare_density: float = field(default=0.5, metadata={"help": "Share of entries that DARE keeps."})
    search_budget: int = field(default=60, metadata={"help": "Evaluations of the LoraHub-style search."})
    search_rows: int = field(default=20, metadata={"help": "Fit rows of each task that this search evaluates on."})
    data_sizes: list[int] = field(default_factory=lambda: [2, 8, 32, 256], metadata={"help": "Fit rows of each task."})
    shots: list[int] = field(default_factory=lambda: [4, 16], metadata={"help": "Fit rows of each new task."})
    budgets: list[int] = field(default_factory=lambda: [2, 4], metadata={"help": "Vectors to choose for a new task."})
    shot_steps: int = field(default=60, metadata={"help": "Steps of every fit on a new task."})
    data_steps: int = field(default=60, metadata={"help": "Steps of every fit of the section data."})
    other_steps: int | None = field(
        default=None, metadata={"help": "Steps of the addition's other arms. Unset: --max_steps."}
    )
    forget: list[str] | None = field(default=None, metadata={"help": "Tasks to negate, one after the other."})
    negation_steps: int = field(default=80, metadata={"help": "Steps of negation."})
    negation_every: int = field(default=10, metadata={"help": "Steps between looks at the control tasks (dev)."})
    negation_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of negation (the paper's)."})
    negation_cap: float | None = field(default=None, metadata={"help": "See --forget_cap."})
    negation_retain: float = field(default=1.0, metadata={"help": "See --retain_weight."})
    control_share: float = field(
        default=0.95, metadata={"help": "Negation must keep this share of the other tasks' accuracy on dev."}
    )

    def __post_init__(self) -> None:
        for flag, given, known in (("sections", self.sections, self.known[0]), ("arms", self.arms, self.known[1])):
            unknown = sorted(set(given) - set(known))
            if unknown:
                raise ValueError(f"--{flag}: unknown {unknown[0]!r}; known: {', '.join(known)}")
        for name in ("ties_density", "dare_density", "control_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be above 0 and at most 1")
        for name in ("data_sizes", "shots", "budgets"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: give numbers, at least 1")

    def few(self) -> dict[str, Any]:
        """What is set for coefficients on few rows of a new task, as the trainer's fields."""
        given = {"learning_rate": self.shot_coefficient_rate, "weight_decay": self.shot_weight_decay}
        return {"max_steps": self.shot_steps} | {name: value for name, value in given.items() if value is not None}

    def composer(
        self, model: nn.Module, vectors: Sequence[TaskVector], seed: int, stream_file: Path | None = None,
        isotropic: bool = False,
    ) -> Composer:  # fmt: skip
        """The composer that the flags describe, or one that differs from it in having one coefficient a vector."""
        return Composer(
            model, vectors, "isotropic" if isotropic else self.blocks, self.exclude, placement=self.placement,
            include=self.include or (), stream_file=stream_file if self.placement == "stream" else None,
            rounding=self.rounding, partitions=1 if isotropic else self.partitions, seed=seed,
        )  # fmt: skip


def arm_key(section: str, name: str, task: str | None = None, n: int | None = None) -> str:
    """`fewshot_atlas_smax_n4`: the arm's folder and its key in the results."""
    return "_".join([section, name, *([task] if task else []), *([f"n{n}"] if n is not None else [])])
