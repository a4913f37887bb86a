"""What the arms of an aTLAS run share: base, vectors, rows, and the ways to make one arm of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...files import write_json
from ..multitask import MultiTaskConfig
from .arguments import ArmArguments, arm_key
from .coefficients import save_coefficients
from .composer import Composer
from .low_rank import LowRankComposer
from .stages import Fit, fine_tune, fit_coefficients
from .task_vector import TaskVector
from .trainer import AtlasConfig

ALPHAS = [round(0.05 * step, 2) for step in range(21)]  # the paper's search: 21 points from 0 to 1


@dataclass(frozen=True)
class Arm:
    """One model to measure, valid until the iterator moves on.

    Attributes:
        task: the one that the arm is about (a fine-tuned single, a new task, a task to forget); else None.
        n: rows of each task that it was fitted on, where that varies.
        dev: scores on dev rows, by which settings and figures are made.
        vectors: the names of the coefficients' rows.
        composer, coefficients: how it was composed, and the values [n, m].
    """

    section: str
    name: str
    model: Any
    seconds: float = 0.0
    trained: int = 0
    task: str | None = None
    n: int | None = None
    alpha: float | None = None
    dev: dict[str, float] = field(default_factory=dict)
    log: list[dict[str, float]] = field(default_factory=list)
    composer: Composer | LowRankComposer | None = None
    coefficients: torch.Tensor | None = None
    vectors: list[str] = field(default_factory=list)

    def keep_vectors(self, names: Sequence[str]) -> None:
        """Compose only these of the vectors, with their learned coefficients."""
        assert self.composer is not None and self.coefficients is not None
        kept = torch.tensor([float(name in names) for name in self.vectors], device=self.coefficients.device)
        with torch.no_grad():
            rows = kept.reshape(-1, *[1] * (self.coefficients.dim() - 1))
            self.composer.coefficients.copy_(self.coefficients * rows)
        self.composer.compose()

    def pairs(self, tasks: Sequence[str], labels: Callable[[Any, str], list]) -> list[list[list]]:
        """`labels(model, tasks[i])` where only the vectors of the tasks i and j are composed, [n][n] lists; for the
        disentanglement error at the learned coefficients (paper, section 4.3)."""
        found: list[list[list]] = []
        for task in tasks:
            found.append([])
            for other in tasks:
                self.keep_vectors([task, other])
                found[-1].append(labels(self.model, task))
        self.keep_vectors(self.vectors)
        return found

    def record(self, folder: Path, **facts: Any) -> None:
        """Write `measured.json` (this arm and `facts`) and the composition into the arm's folder within `folder`."""
        names = ("section", "name", "task", "n", "alpha", "trained", "seconds", "dev", "log", "vectors")
        record = {name: getattr(self, name) for name in names} | facts
        (folder / self.key).mkdir(parents=True, exist_ok=True)
        if self.composer is not None:
            record["coefficients"] = flat(self.composer).tolist()
            record["block_names"] = self.composer.block_names
            save_coefficients(folder / self.key / "coefficients.json", self.composer, sources=self.vectors)
        write_json(folder / self.key / "measured.json", record)

    @property
    def key(self) -> str:
        return arm_key(self.section, self.name, self.task, self.n)


@dataclass
class Bench:
    """What all arms of one seed share.

    Attributes:
        base: wrapped or composed for each arm and bare again after it.
        known: tasks to compose for; one is new if it is in `fit` and not among them.
        vectors, lora_vectors: name (of the task, where it belongs to one) -> vector; the latter may be empty.
        fit, dev: rows with `task`.
        score: mean accuracy over tasks, and mean nats per token over tasks, of a model on rows.
        done: keys of arms that need not be made again.
        fit_coefficients, fine_tune: how (those of `stages.py`, or others with their signatures).
    """

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    known: list[str]
    vectors: Mapping[str, TaskVector]
    lora_vectors: Mapping[str, TaskVector]
    fit: Dataset
    dev: Dataset
    args: AtlasConfig
    tuning: MultiTaskConfig
    arguments: ArmArguments
    out_dir: Path
    score: Callable[[Any, Dataset], tuple[float, float]]
    done: Collection[str] = ()
    fit_coefficients: Callable[..., Fit] = fit_coefficients
    fine_tune: Callable[..., tuple[Any, Fit]] = fine_tune
    _all: list[int] = field(default_factory=list)  # of the first bench; those made of it may have fewer vectors

    def __post_init__(self) -> None:
        self._all = self._all or [id(vector) for vector in self.vectors.values()]

    @property
    def new(self) -> list[str]:
        """The tasks without a vector."""
        return sorted(set(self.fit["task"]) - set(self.known))

    def wanted(self, section: str, name: str, task: str | None = None, n: int | None = None) -> bool:
        return name in self.arguments.arms and arm_key(section, name, task, n) not in self.done

    def composer(self, vectors: Sequence[TaskVector] | None = None) -> Composer | LowRankComposer:
        """What the flags describe, of all vectors or of these; LoRA ones stay factors."""
        given = list(self.vectors.values()) if vectors is None else vectors
        if _factors(self.vectors.values()):
            return LowRankComposer(self.base, given, self.arguments.low_rank_mode)
        return self.arguments.composer(self.base, given, self.args.seed, self._stream_file(given))

    def isotropic(self, vectors: Sequence[TaskVector] | None = None) -> Composer:
        """One coefficient a vector."""
        given = list(self.vectors.values()) if vectors is None else vectors
        same = self.arguments.blocks != "matrices"  # one coefficient a vector: for the other tensors as well
        file = self._stream_file(given) if same else None
        return self.arguments.composer(self.base, given, self.args.seed, file, isotropic=True)

    def _stream_file(self, vectors: Sequence[TaskVector]) -> Path | None:
        """All vectors' lies in the run; that of some of them is temporary."""
        whole = [id(vector) for vector in vectors] == self._all
        return self.out_dir / "vectors_by_block.safetensors" if whole else None

    def fixed(self, vectors: Sequence[TaskVector]) -> Composer | LowRankComposer:
        """For one given coefficient (`set_all`); LoRA vectors stay factors, so that the base may be quantised."""
        if _factors(vectors):
            return LowRankComposer(self.base, vectors)
        return self.isotropic(vectors)

    def tasks(self, rows: Dataset, tasks: Collection[str]) -> Dataset:
        return rows.filter(lambda task: task in tasks, input_columns="task")

    def first(self, rows: Dataset, n: int) -> Dataset:
        """The first `n` rows of each task: small sets are parts of the larger ones."""
        seen: dict[str, int] = {}
        kept = []
        for index, task in enumerate(rows["task"]):
            seen[task] = seen.get(task, 0) + 1
            if seen[task] <= n:
                kept.append(index)
        return rows.select(kept)

    def learned(
        self, section: str, name: str, rows: Dataset, task: str | None = None, n: int | None = None,
        composer: Composer | LowRankComposer | None = None, start: float = 0.0,
        look: Callable[[Any], dict[str, float]] | None = None, names: list[str] | None = None, **changes: Any,
    ) -> Iterator[Arm]:  # fmt: skip
        """One arm with coefficients fitted on `rows`: one a vector for "isotropic", else as the flags say."""
        if not self.wanted(section, name, task, n):
            return
        if name == "isotropic" and self.arguments.isotropic_learning_rate is not None:
            changes = {**changes, "learning_rate": self.arguments.isotropic_learning_rate}
        composer = composer or (self.isotropic() if name == "isotropic" else self.composer())
        if start:
            with torch.no_grad():
                composer.coefficients.fill_(start)
            composer.compose()
        out = self.out_dir / arm_key(section, name, task, n)
        fit = self.fit_coefficients(composer, self.tokenizer, rows, self.args, out, **changes)
        names = names or list(self.lora_vectors if isinstance(composer, LowRankComposer) else self.vectors)
        dev = look(composer.model) if look else {}
        yield Arm(section, name, composer.model, fit.seconds, fit.trained, task, n, dev=dev, log=fit.log,
                  composer=composer, coefficients=composer.coefficients.detach().clone(), vectors=names)  # fmt: skip
        composer.remove()

    def tuned(
        self, section: str, name: str, rows: Dataset, learning_rate: float, task: str | None = None,
        n: int | None = None, lora: bool = False, **changes: Any,
    ) -> Iterator[Arm]:  # fmt: skip
        """One arm of ordinary fine-tuning on `rows`: all weights, or a LoRA."""
        if not self.wanted(section, name, task, n):
            return
        adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
        out = self.out_dir / arm_key(section, name, task, n)
        changes = {"learning_rate": learning_rate, **changes}
        model, fit = self.fine_tune(self.base, self.tokenizer, rows, self.tuning, out, adapter, **changes)
        yield Arm(section, name, model, fit.seconds, fit.trained, task, n, log=fit.log)

    def searched(
        self, section: str, name: str, vectors: Sequence[TaskVector], look: Callable[[Any], dict[str, float]],
        choose: Callable[[list[dict[str, float]]], dict[str, float]], task: str | None = None, sign: float = 1.0,
    ) -> Iterator[Arm]:  # fmt: skip
        """One arm with a single alpha for the sum of `vectors`, chosen among 21 by their scores on dev."""
        if not self.wanted(section, name, task):
            return
        start = time.perf_counter()
        composer = self.fixed(vectors)
        curve = []
        for alpha in ALPHAS:
            set_all(composer, sign * alpha)
            curve.append({"alpha": alpha, **look(composer.model)})
        best = choose(curve)
        set_all(composer, sign * best["alpha"])
        yield Arm(
            section, name, composer.model, time.perf_counter() - start, 1, task, None, best["alpha"], best, curve
        )
        composer.remove()


def _factors(vectors: Iterable[TaskVector]) -> bool:
    """Whether all are LoRA ones."""
    return all(len(vector.low_rank) == len(vector) for vector in vectors)


def flat(composer: Composer | LowRankComposer) -> torch.Tensor:
    """[n, m]: the coefficients; the mean over partitions, the product of two factors' ones."""
    if isinstance(composer, LowRankComposer):
        return composer.weights.detach()
    values = composer.coefficients.detach()
    return values.mean(2) if composer.partitions > 1 else values


def set_all(composer: Composer | LowRankComposer, value: float) -> None:
    with torch.no_grad():
        composer.coefficients.fill_(value)
    composer.compose()
