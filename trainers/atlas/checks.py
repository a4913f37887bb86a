"""What an aTLAS run is asked to do and cannot: said before any time is spent."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Any

from ..whole import engine
from .arguments import ArmArguments
from .sources import vector_digest
from .task_vector import TaskVector

WHOLE = ("isotropic", "ties", "dare", "joint", "finetune")  # arms that compose or train dense weights


def check_flags(training: Any, toy: bool) -> None:
    """ValueError for flags of the trainer that a recipe sets itself, arm by arm, and for launches that it cannot use
    (`toy`: in an embedded world)."""
    instead = {
        "forget_tasks": "--sections negation --forget TASK forgets one",
        "entropy_below": "the arm adamerging trains on entropies",
    }
    for flag, way in instead.items():
        if getattr(training, flag) is not None:
            raise ValueError(f"--{flag} has no effect here: {way}")
    check_launch(training, toy)


def check_launch(training: Any, toy: bool) -> None:
    """ValueError for several processes in an embedded world, and for an engine."""
    if toy and training.world_size > 1:
        raise ValueError(
            f"{training.world_size} processes: an embedded world makes its task vectors in one process, and runs its "
            "seeds side by side there; start one, or give --base"
        )
    if (by := engine(training)) is not None:
        why = {"DeepSpeed": "keeps the gradients that coefficients are contracted from to itself",
               "FSDP": "cuts the model whose composition this recipe measures between its fits"}[by]  # fmt: skip
        raise ValueError(
            f"{by} {why}: launch the recipe with one process or DDP (accelerate_configs/ddp.yaml), or for FSDP2 train "
            "with AtlasTrainer in a script of yours"
        )


def check_sections(
    arms: ArmArguments, fit: Mapping[str, int], known: Collection[str], given: Collection[str], vectors: int,
    quantised: bool,
) -> None:  # fmt: skip
    """ValueError for a section that these tasks do not allow.

    Args:
        fit: task -> its rows to fit on; those not `known` are new tasks.
        given: the known tasks that have a vector of their own.
        vectors: how many there are in all.
    """
    sections, forget = arms.sections, arms.forget or []
    if "negation" in sections:
        if not forget:
            raise ValueError("--sections negation needs --forget: the tasks to negate, one after the other")
        unknown = sorted(set(forget) - set(given))
        if unknown:
            there = ", ".join(sorted(given)) or "none"
            raise ValueError(f"--forget {unknown[0]}: no task with a vector of its own; there are {there}")
        if len(known) < 2:
            raise ValueError("--sections negation needs a task to keep beside the one to forget; give two in --tasks")
    for section in {"fewshot", "budget"} & set(sections):
        if set(fit) == set(known):
            raise ValueError(f"--sections {section} needs --new_tasks name=PATH: tasks without a vector")
    if "budget" in sections and quantised:
        raise ValueError(
            "--sections budget takes gradients of the base's weights, which a quantised base does not have"
        )
    if "budget" in sections and max(arms.budgets) > vectors:
        raise ValueError(f"--budgets {max(arms.budgets)}: there are {vectors} task vectors to choose from")
    asked = {"data": ("data_sizes", known), "fewshot": ("shots", set(fit) - set(known))}
    for section, (flag, tasks) in asked.items():
        for task in sorted(tasks) if section in sections else ():
            if max(getattr(arms, flag)) > fit[task]:
                raise ValueError(
                    f"--{flag} {max(getattr(arms, flag))}: the task {task} has only {fit[task]} rows to fit on"
                )


def check_vectors(arms: ArmArguments, vectors: Mapping[str, TaskVector], quantised: bool) -> str:
    """A key of the vectors' contents, all of which are read once.

    Raises:
        ValueError: NaN or infinity in a vector, or a vector that is zero; flags or arms that such vectors do not
            allow.
    """
    low_rank = all(len(vector.low_rank) == len(vector) for vector in vectors.values())
    if quantised and not low_rank:
        dense = ", ".join(name for name, vector in vectors.items() if len(vector.low_rank) < len(vector))
        raise ValueError(
            f"a quantised base has no weights to compose dense vectors into ({dense}): give LoRA adapters, or leave "
            "out --load_in_4bit and --load_in_8bit"
        )
    if quantised and (odd := [arm for arm in arms.arms if arm in WHOLE]):
        rest = " ".join(arm for arm in arms.arms if arm not in WHOLE)
        raise ValueError(f"a quantised base does not allow the arms {', '.join(odd)}; leave them out: --arms {rest}")
    usual = ArmArguments()
    for flag in ("blocks", "include", "exclude", "placement", "partitions"):
        value = getattr(arms, flag)
        if low_rank and value and value != getattr(usual, flag):
            raise ValueError(
                f"--{flag} {value} has no effect: these vectors are all LoRA ones, which stay factors and have a "
                "coefficient for each matrix"
            )
    whole = hashlib.sha256()
    for number, (name, vector) in enumerate(vectors.items(), 1):
        whole.update(f"{name} {vector_digest(vector, number)}".encode())
    return whole.hexdigest()
