"""What every arm of every seed has measured, put together: means and differences over seeds, table, claims."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from rich.console import Console

from .statistics import Metric, paired_test, seed_metric

Record = Mapping[str, Any]
Records = dict[int, dict[str, dict[str, Any]]]
Arm: TypeAlias = tuple[Any, ...]


def read_records(folder: Path, seeds: Sequence[int], order: Callable[[Record], Any]) -> Records:
    """What `seed_*/*/measured.json` hold: `records[seed][arm's folder]`, sorted by `order`, the table's."""
    records: Records = {}
    for seed in seeds:
        files = (folder / f"seed_{seed}").glob("*/measured.json")
        found = [(file.parent.name, json.loads(file.read_text(encoding="utf-8"))) for file in files]
        records[seed] = dict(sorted(found, key=lambda item: order(item[1])))
    return records


@dataclass(frozen=True)
class Column:
    """One column of the table: a metric of a split, times `scale`."""

    title: str
    split: str
    metric: str
    scale: float = 100.0


class Results(ABC):
    """All measurements: `records[seed][folder]`, each with `trained`, `seconds` and `splits[split]`, its samples.

    Records of one seed that belong to one arm (several draws, say) are taken together, row by row.
    """

    unbounded: tuple[str, ...] = ("nats_per_token",)  # metrics that are no shares between 0 and 1

    def __init__(self, records: Mapping[int, Mapping[str, Record]]) -> None:
        self.records = records
        self.seeds = sorted(records)
        self.arms: dict[Arm, None] = {}
        for seed in self.seeds:
            for record in records[seed].values():
                self.arms.setdefault(self.arm(record))

    @abstractmethod
    def arm(self, record: Record) -> Arm:
        """The arm that a record belongs to."""

    @abstractmethod
    def label(self, arm: Arm) -> str:
        """Its name in the table."""

    def draws(self, seed: int, arm: Arm) -> list[Record]:
        return [record for record in self.records[seed].values() if self.arm(record) == arm]

    def questions(self, seed: int, arm: Arm, split: str, name: str) -> tuple[np.ndarray, list[str]]:
        """Scores `[questions]`, averaged over draws, and the questions' groups."""
        samples = [record["splits"][split] for record in self.draws(seed, arm)]
        values = np.array([[row["metrics"][name] for row in rows] for rows in samples], dtype=np.float64)
        if name == "nats_per_token":  # their mean is then that over all tokens, as in `evaluate`
            tokens = np.array([row.get("tokens", 1) for row in samples[0]], dtype=np.float64)
            values *= tokens / tokens.mean()
        return values.mean(0), [row["group"] for row in samples[0]]

    def has(self, arm: Arm, split: str) -> bool:
        return arm in self.arms and all(
            any(split in record["splits"] for record in self.draws(seed, arm)) for seed in self.seeds
        )

    def metric(self, arm: Arm, split: str, name: str) -> Metric:
        """Mean over seeds with its 95 % interval; with one seed, over its questions."""
        values, groups = zip(*(self.questions(seed, arm, split, name) for seed in self.seeds), strict=True)
        bounded = name not in self.unbounded
        # Rows of tasks of unequal size carry weights, and can exceed 1 though their mean does not.
        found = seed_metric(values, groups, share=bounded and max(scores.max() for scores in values) <= 1)
        if bounded and found["low"] is not None and found["high"] is not None:
            found |= {"low": max(0.0, found["low"]), "high": min(1.0, found["high"])}
        return found

    def combination(self, weights: Mapping[Arm, float], split: str, name: str) -> Metric:
        """Mean of a weighted sum of arms on the same questions (`{a: 1, b: -1}`: their difference), with interval.

        Raises ValueError for arms that were measured on different questions.
        """
        scored = []
        for seed in self.seeds:
            parts = [(weight, *self.questions(seed, arm, split, name)) for arm, weight in weights.items()]
            if any(groups != parts[0][2] for _, _, groups in parts):
                names = ", ".join(self.label(arm) for arm in weights)
                raise ValueError(f"seed {seed}: {names} were measured on different rows of {split}")
            scored.append((sum(weight * values for weight, values, _ in parts), parts[0][2]))
        found = seed_metric(*zip(*scored, strict=True))
        if found["low"] == found["high"]:  # all differences equal: not certainty, but at most about z^2 / n of others
            room = 3.84 / (found["n"] + 3.84)
            found |= {"low": found["value"] - room, "high": found["value"] + room}
        if found["low"] is not None and found["high"] is not None:
            found |= {"low": max(-1.0, found["low"]), "high": min(1.0, found["high"])}
        return found

    def paired(self, main: Arm, others: Iterable[Arm], column: Column) -> dict[str, Any]:
        """Of a run with one seed: the main arm against others on the same questions (McNemar or sign flips)."""
        if len(self.seeds) > 1 or not self.has(main, column.split):
            return {}
        ours, groups = self.questions(self.seeds[0], main, column.split, column.metric)
        found = {}
        for arm in others:
            if self.has(arm, column.split) and len(set(groups)) > 1:
                theirs, _ = self.questions(self.seeds[0], arm, column.split, column.metric)
                found[self.label(arm)] = asdict(paired_test(ours, theirs, groups))
        return found


def table(results: Results, shown: Sequence[Column], arms: Iterable[Arm] | None = None) -> list[dict[str, Any]]:
    """One row an arm: parameters, seconds, and for each column the metric with its interval and every seed's mean."""
    rows = []
    for arm in results.arms if arms is None else arms:
        drawn = [record for seed in results.seeds for record in results.draws(seed, arm)]
        row: dict[str, Any] = {
            "method": results.label(arm),
            "parameters": drawn[0]["trained"],
            "seconds": float(np.mean([record["seconds"] for record in drawn])),
            "draws": len(results.draws(results.seeds[0], arm)),
            "tokens_per_second": float(np.mean([tokens_per_second(record) for record in drawn])),
            "peak_memory_bytes": max(record["peak_memory_bytes"] for record in drawn),
        }
        for column in shown:
            if results.has(arm, column.split):
                found = results.metric(arm, column.split, column.metric)
                seeds = [results.questions(s, arm, column.split, column.metric)[0].mean() for s in results.seeds]
                row[column.title] = {**found, "seeds": [float(value) for value in seeds]}
                if column.metric == "nats_per_token":  # shown and stored as perplexity
                    row[column.title] = {
                        key: value if key == "n" or value is None else np.exp(value).tolist()
                        for key, value in row[column.title].items()
                    }
        rows.append(row)
    return rows


def tokens_per_second(record: Record) -> float:
    """Of the fit that the record's log is of; 0 where nothing was trained."""
    log = record.get("log", [])
    seconds = max([entry["train_runtime"] for entry in log if "train_runtime" in entry], default=math.inf)
    return max([entry["num_tokens"] for entry in log if "num_tokens" in entry], default=0.0) / seconds


def screen_rows(rows: Sequence[Mapping[str, Any]], shown: Sequence[Column]) -> list[dict[str, str]]:
    """The table as text: `97.3 [94, 100]`, shares in per cent; the first column also with every seed."""
    lines = []
    for row in rows:
        line = {
            "method": row["method"],
            "parameters": f"{row['parameters']:,}",
            "seconds": f"{row['seconds']:.1f}" if row["seconds"] else "",
        }
        line["MB"] = f"{row['peak_memory_bytes'] / 1e6:,.0f}"
        for number, column in enumerate(shown):
            if column.title not in row:
                continue
            found = row[column.title]
            if column.scale == 1:
                line[column.title] = f"{found['value']:.1f}" + bounds(found, 1, 1)
                continue
            line[column.title] = f"{100 * found['value']:.1f}" + bounds(found, 100, 0)
            if number == 0:
                line["each seed"] = each_seed(found)
        lines.append(line)
    return lines


def each_seed(found: Mapping[str, Any]) -> str:
    """The seeds' means in per cent; nothing for a single seed."""
    return " ".join(f"{100 * value:.0f}" for value in found["seeds"]) if len(found["seeds"]) > 1 else ""


def bounds(found: Mapping[str, Any], scale: float, digits: int) -> str:
    if found["low"] is None:
        return ""
    return f" [{scale * found['low']:.{digits}f}, {scale * found['high']:.{digits}f}]"


def claim(text: str, found: Metric, low: float = -math.inf, high: float = math.inf, more: str = "") -> dict[str, Any]:
    """A claim for the report: supported only if the whole 95 % interval lies above `low` and not above `high`."""
    inside = found["low"] is not None and found["high"] is not None and low < found["low"] and found["high"] <= high
    return {"claim": text, "supported": inside, "detail": f"{100 * found['value']:.1f}{bounds(found, 100, 1)}{more}"}


def show_verdicts(console: Console, results: Mapping[str, Any], main: str) -> None:
    """Print the claims and the paired tests (of `main` against others) of a `results.json`."""
    for made in results.get("claims", []):
        mark = "[green]supported    [/]" if made["supported"] else "[red]not supported[/]"
        console.print(f"{mark} {made['claim']}: {made['detail']}")
    if not results.get("claims"):
        console.print("Claims are judged from three seeds on: --seeds 0 1 2")
    for other, test in results.get("metrics", {}).get("paired", {}).items():
        console.print(
            f"{main} less {other}: {100 * test['difference']:.1f} points [{100 * test['low']:.0f}, "
            f"{100 * test['high']:.0f}], p = {test['p_value']:.3g} ({test['method']})"
        )


def training_curve(log: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Logged losses; of a run too short to log any, its mean."""
    points = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    return points or [(entry["step"], entry["train_loss"]) for entry in log if "train_loss" in entry]


def sample_lines(records: Mapping[int, Mapping[str, Record]]) -> Iterable[dict[str, Any]]:
    """The lines of `samples.jsonl`: every sample with its seed, arm and split."""
    for seed, arms in records.items():
        for arm, record in arms.items():
            for split, samples in record["splits"].items():
                for sample in samples:
                    yield {"seed": seed, "arm": arm, "split": split, **sample}
