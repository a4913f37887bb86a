"""From the measurements of every arm and seed to the tables of an aTLAS run.

A record (`seed_*/<arm_key>/measured.json`) holds

- `section`, `name`, `task` (None: all tasks), `n` (rows a task, or shots; None: all), `trained`, `seconds`,
  `peak_memory_bytes`, `splits` and `log`;
- `splits`: `test`, samples of `scores.evaluate` on rows of tasks (of a negation: on all tasks, of which `task` is the
  target and the others the control), and where measured `control`, samples of texts;
- `log`: of training; of the alpha search of the addition `{"alpha", "accuracy"}` for every alpha, on dev rows;
- `alpha`: what the search chose;
- `dev`: `accuracy` of `isotropic` and `atlas` in the addition; of a negation `control` and `base_control`, the mean
  accuracy on the other tasks and that of the base, and `control_share`, what share of that it had to leave;
- `coefficients` `[vectors, blocks]` (over partitions the mean, of two factors the product), with `block_names` and
  `vectors` (the rows' names), or None; `disentanglement` (need not be there), the matrix of `scores.disentanglement`,
  and `disentanglement_tasks`, its rows.

Records that differ in the task alone are one arm: its scores are means over their tasks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import results as shared
from ..results import Arm, Column, Record, Records

NAMES = {
    "base": "base",
    "alpha": "best single alpha",
    "sum": "sum, alpha = 1",
    "finetune": "fine-tuning",
    "lora": "LoRA",
    "isotropic": "learned isotropic",
    "atlas": "aTLAS",
    "atlas_lora": "aTLAS on LoRA vectors",
    "ties": "TIES",
    "dare": "DARE",
    "adamerging": "AdaMerging",
    "lorahub": "LoraHub",
    "tuned": "fine-tuned singles",
    "joint": "joint fine-tuning",
    "layernorm": "LayerNorm tuning, UFM",
    "entropy": "aTLAS, entropy",
    "ufm": "aTLAS, UFM",
    "random": "random vectors",
    "feature": "vectors by feature",
    "gradient": "vectors by gradient",
    "blockwise": "vectors by gradient, by block",
}
SECTIONS = {
    "addition": "All tasks at once",
    "data": "All tasks at once, by rows to fit on",
    "fewshot": "New tasks from few rows",
    "negation": "Forgetting one task (target), keeping the others (control)",
    "adaptation": "New tasks from unlabelled images",
    "budget": "New tasks from few rows, with a few of the vectors",
}
CONTROL_TEXTS = Column("control perplexity", "control", "nats_per_token", 1.0)
UPRIGHT = Column("upright digits", "upright", "accuracy")  # of the embedded images: what is no task's own
COLUMNS = {
    "addition": [
        Column("accuracy", "test", "accuracy"),
        Column("normalised", "test", "normalised"),
        CONTROL_TEXTS,
        UPRIGHT,
        Column("disentanglement error", "disentanglement", "error"),
    ],
    "data": [Column("accuracy", "test", "accuracy")],
    "fewshot": [Column("accuracy", "test", "accuracy"), CONTROL_TEXTS],
    "negation": [Column("target", "test", "target"), Column("control", "test", "control"), CONTROL_TEXTS],
    "adaptation": [Column("accuracy", "test", "accuracy"), UPRIGHT],
    "budget": [Column("accuracy", "test", "accuracy")],
}
ALPHA, ISOTROPIC, ATLAS, TUNED = (("addition", name, None) for name in ("alpha", "isotropic", "atlas", "tuned"))


def arm_key(section: str, name: str, task: str | None = None, n: int | None = None) -> str:
    """The folder of an arm's record. Raises ValueError for a section or name that the report does not know."""
    if section not in SECTIONS or name not in NAMES:
        raise ValueError(f"no arm {name!r} of section {section!r}; known: {', '.join(NAMES)}; {', '.join(SECTIONS)}")
    return "_".join([section, name, *([task] if task else []), *([f"n{n}"] if n is not None else [])])


def read_records(folder: Path, seeds: Sequence[int]) -> Records:
    """What `seed_*/*/measured.json` hold, the arms in the tables' order."""
    sections, names = list(SECTIONS), list(NAMES)

    def order(record: Record) -> tuple[Any, ...]:
        return sections.index(record["section"]), record["n"] or 0, names.index(record["name"]), record["task"] or ""

    return shared.read_records(folder, seeds, order)


class Results(shared.Results):
    """All measurements; an arm is (section, name, n). Scores are means over tasks, whatever their sizes:

    - `accuracy`; `normalised`: relative to the fine-tuned singles of the same seed;
    - `target`, `control` (negation): on the rows of the record's task, and on the rows of the other tasks;
    - `nats_per_token`: over all tokens; `error`: disentanglement.
    """

    unbounded = ("nats_per_token", "normalised")

    def __init__(self, records: Mapping[int, Mapping[str, Record]]) -> None:
        super().__init__(records)
        forgotten = [r["task"] for arms in records.values() for r in arms.values() if r["section"] == "negation"]
        self.targets = sorted({task for task in forgotten if task is not None})

    def arm(self, record: Record) -> Arm:
        return record["section"], record["name"], record["n"]

    def label(self, arm: Arm) -> str:
        section, name, n = arm
        counted = {"data": "rows a task", "budget": "of them"}.get(section, "shots")
        return NAMES[name] + ("" if n is None else f", {n} {counted}")

    def of(self, section: str) -> list[Arm]:
        return [arm for arm in self.arms if arm[0] == section]

    def sizes(self, section: str) -> list[int]:
        """The numbers of rows that the section's arms were fitted on."""
        return sorted({n for _, _, n in self.of(section) if n is not None})

    def draws(self, seed: int, arm: Arm) -> list[Record]:
        return sorted(super().draws(seed, arm), key=lambda record: record["task"] or "")

    def has(self, arm: Arm, split: str) -> bool:
        if split == "disentanglement":
            return arm in self.arms and all(
                any(record.get(split) for record in self.draws(seed, arm)) for seed in self.seeds
            )
        return super().has(arm, split)

    def questions(self, seed: int, arm: Arm, split: str, name: str) -> tuple[np.ndarray, list[str]]:
        """Scores `[rows]`, weighted so that their plain mean is that over tasks, and the rows' groups."""
        if name == "error":
            matrix = np.array(self.draws(seed, arm)[0]["disentanglement"], dtype=np.float64)
            pairs = [(i, j) for i in range(len(matrix)) for j in range(len(matrix)) if i != j]
            return np.array([matrix[pair] for pair in pairs]), [str(pair) for pair in pairs]
        pools = [pool for record in self.draws(seed, arm) for pool in self._pools(record, split, name)]
        rows = [sample for pool in pools for sample in pool]
        groups = [sample["group"] for sample in rows]
        if name == "nats_per_token":
            tokens = np.array([sample["tokens"] for sample in rows], dtype=np.float64)
            return np.array([sample["nats"] for sample in rows]) / tokens.mean(), groups
        tuned = self.task_accuracies(seed, TUNED) if name == "normalised" else {}
        values = []
        for pool in pools:
            sizes = Counter(sample["task"] for sample in pool)
            for sample in pool:
                weight = len(rows) / (len(pools) * len(sizes) * sizes[sample["task"]])
                values.append(weight * sample["correct"] / (tuned[sample["task"]] if tuned else 1.0))
        return np.array(values, dtype=np.float64), groups

    def task_accuracies(self, seed: int, arm: Arm) -> dict[str, float]:
        """Task -> accuracy on its test rows."""
        marks: dict[str, list[bool]] = {}
        for record in self.draws(seed, arm):
            for sample in record["splits"]["test"]:
                marks.setdefault(sample["task"], []).append(sample["correct"])
        return {task: float(np.mean(values)) for task, values in marks.items()}

    def _pools(self, record: Record, split: str, name: str) -> list[list[Mapping[str, Any]]]:
        """The samples that one mean over tasks is taken of; of a negation, one pool for every target."""
        samples = record["splits"][split]
        if name not in ("target", "control"):
            return [samples]
        # The base is one and the same for all targets.
        targets = self.targets if record["task"] is None else [record["task"]]
        return [[s for s in samples if (s["task"] == target) == (name == "target")] for target in targets]


def columns(results: Results, section: str) -> list[Column]:
    """What there is to show of a section; the first column is the one that claims speak of."""
    arms = results.of(section)
    shown = [column for column in COLUMNS[section] if any(results.has(arm, column.split) for arm in arms)]
    # Where a single fails on all of its own task, nothing can be relative to it.
    if not results.has(TUNED, "test") or not all(
        all(results.task_accuracies(seed, TUNED).values()) for seed in results.seeds
    ):
        shown = [column for column in shown if column.metric != "normalised"]
    return shown


def per_task(results: Results) -> dict[str, dict[str, float]]:
    """Method -> task -> accuracy in the addition, mean over seeds."""
    found: dict[str, dict[str, float]] = {}
    for arm in results.of("addition"):
        if results.has(arm, "test"):
            each = [results.task_accuracies(seed, arm) for seed in results.seeds]
            found[results.label(arm)] = {task: float(np.mean([one[task] for one in each])) for task in each[0]}
    return found


def chosen_alphas(results: Results, section: str) -> dict[str, list[float]]:
    """Task (or `all`) -> the alpha that the search chose under each seed."""
    found: dict[str, list[float]] = {}
    for seed in results.seeds:
        for record in results.draws(seed, (section, "alpha", None)):
            found.setdefault(record["task"] or "all", []).append(record["alpha"])
    return found
