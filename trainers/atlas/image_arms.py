"""The arms of a run on images: those of `arms.py`, new tasks by leaving their vector out, adapting without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from datasets import Dataset

from . import arms
from .arguments import ArmArguments, arm_key
from .bench import Arm, Bench

IMAGE_SECTIONS = ("addition", "data", "fewshot", "adaptation")
IMAGE_ARMS = ("tuned", "sum", "alpha", "isotropic", "atlas", "ties", "dare", "adamerging", "joint", "finetune",
              "layernorm", "entropy", "ufm")  # fmt: skip


@dataclass
class ImageArmArguments(ArmArguments):
    """`ArmArguments` for images: `shots` and `data_sizes` count images of each class."""

    known: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]] = (IMAGE_SECTIONS, IMAGE_ARMS)

    sections: list[str] = field(
        default_factory=lambda: ["addition", "fewshot", "adaptation"],
        metadata={"help": f"What to compare: {', '.join(IMAGE_SECTIONS)}."},
    )
    arms: list[str] = field(
        default_factory=lambda: list(IMAGE_ARMS), metadata={"help": f"Which methods to run: {', '.join(IMAGE_ARMS)}."}
    )
    data_sizes: list[int] = field(default_factory=lambda: [1, 4, 16], metadata={"help": "Fit images of each class."})
    shots: list[int] = field(default_factory=lambda: [1, 4, 16], metadata={"help": "Fit images of each class."})
    targets: list[str] | None = field(
        default=None,
        metadata={"help": "Tasks to take as new ones, by leaving their own vector out. Unset: each in turn."},
    )
    adaptation_steps: int = field(default=60, metadata={"help": "Steps of every adaptation without labels."})
    adaptation_learning_rate: float = field(default=1e-3, metadata={"help": "Of coefficients there (the paper's)."})
    norms_learning_rate: float = field(default=1e-3, metadata={"help": "Of LayerNorms there."})
    strong_crop: float = field(
        default=0.5, metadata={"help": "UFM: the strong view shows at least this share of the area (the paper's)."}
    )
    entropy_share: float = field(default=0.4, metadata={"help": "See --entropy_below; of the arm entropy (SAR's)."})


@dataclass
class ImageBench(Bench):
    """A `Bench` whose rows are images.

    Attributes:
        unlabelled: rows to adapt to, whose labels are not looked at.
        few_shot: places of some rows of each class, from the rows' labels and a number.
    """

    arguments: ImageArmArguments
    unlabelled: Dataset | None = None
    few_shot: Callable[[Sequence[int], int], list[int]] | None = None

    def first(self, rows: Dataset, n: int) -> Dataset:
        """`n` rows of each class of each task."""
        assert self.few_shot is not None
        tasks, labels = rows["task"][:], rows["label"][:]
        kept = []
        for task in dict.fromkeys(tasks):
            own = [place for place, name in enumerate(tasks) if name == task]
            kept += [own[place] for place in self.few_shot([labels[place] for place in own], n)]
        return rows.select(kept)

    def without(self, target: str) -> ImageBench:
        """The same as if `target` had no vector."""
        others = [task for task in self.known if task != target]
        vectors = {name: vector for name, vector in self.vectors.items() if name != target}
        return replace(self, known=others, vectors=vectors, fit=self.tasks(self.fit, [*others, target]))


def targets(bench: ImageBench) -> list[str]:
    """The tasks that are new in turn. ValueError for one that is not there, or with no other vector left."""
    named = bench.arguments.targets or list(dict.fromkeys(bench.fit["task"][:]))
    unknown = sorted(set(named) - set(bench.fit["task"][:]))
    if unknown:
        raise ValueError(f"--targets: unknown {unknown[0]!r}; tasks: {', '.join(dict.fromkeys(bench.fit['task'][:]))}")
    for target in named:
        if set(bench.vectors) <= {target}:
            raise ValueError(f"--targets {target}: without its own vector there is none left to compose")
    return named


def fewshot(bench: ImageBench) -> Iterator[Arm]:
    """New tasks from few images of each class, by composing the vectors of the others (paper, section 5.1)."""
    for target in targets(bench):
        yield from arms.fewshot(bench.without(target))


def adaptation(bench: ImageBench) -> Iterator[Arm]:
    """New tasks from the very images that are to be classified, without labels (paper, section 5.3)."""
    a = bench.arguments
    assert bench.unlabelled is not None
    for target in targets(bench):
        left = bench.without(target)
        rows = left.tasks(bench.unlabelled, [target])
        rows = rows.remove_columns("label").add_column("label", [0] * len(rows))  # nobody can look
        shared: dict[str, Any] = {"rows": rows, "task": target, "max_steps": a.adaptation_steps}
        ufm: dict[str, Any] = {"ufm": True, "crop_scale": a.strong_crop}
        if arm_key("adaptation", "base", target) not in bench.done:
            yield Arm("adaptation", "base", bench.base, task=target)
        yield from left.tuned(
            "adaptation", "layernorm", learning_rate=a.norms_learning_rate, norms=True, **shared, **ufm
        )
        rate: dict[str, Any] = {"learning_rate": a.adaptation_learning_rate}
        yield from left.learned("adaptation", "entropy", entropy_below=a.entropy_share, **shared, **rate)
        yield from left.learned("adaptation", "ufm", **shared, **rate, **ufm)


SECTIONS: dict[str, Callable[[Any], Iterator[Arm]]] = {
    "addition": arms.addition,
    "data": arms.data,
    "fewshot": fewshot,
    "adaptation": adaptation,
}
