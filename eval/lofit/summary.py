"""From the measurements of every arm and seed to the table, the claims and the figures of a LoFiT run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..statistics import Metric, paired_test, seed_metric
from .scores import head_overlap

Record = Mapping[str, Any]
NAMES = {
    "base": "base",
    "marker": "marker prompt",
    "lofit": "LoFiT",
    "random": "random heads",
    "layer_matched": "random, same layers",
    "offset_norm": "heads by offset norm",
    "iti_heads": "heads by ITI probe",
    "all": "all heads",
    "other": "LoFiT",
    "iti": "ITI",
    "lora": "LoRA r=8",
    "red": "RED",
}


@dataclass(frozen=True)
class Column:
    """One column of the table: a metric of a split, times `scale`."""

    title: str
    split: str
    metric: str
    scale: float = 100.0


def columns(splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Column]:
    """What there is to show for the samples of these splits; the first column is the one that claims speak of."""
    if "mc1" in splits["test"][0]["metrics"]:
        shown = [Column("MC1", "test", "mc1"), Column("MC2", "test", "mc2")]
    else:
        shown = [Column("EM", "test", "em"), Column("EM strict", "test", "em_strict")]
        if "em_shortcut" in splits["test"][0]["metrics"]:  # MQuAKE: 36 % of the answers are the edited object itself
            shown.append(Column("EM of repeating the edit", "test", "em_shortcut"))
    extra = [
        Column("MC1, new relations", "test_relations", "mc1"),
        Column("MC1, control facts", "control", "mc1"),
        Column("unreliable kept", "marked", "mc1"),
    ]
    texts = [
        Column(f"perplexity {split.removeprefix('text').strip('_')}".strip(), split, "nats_per_token", 1.0)
        for split in splits
        if split.startswith("text")
    ]
    return [*shown, *(column for column in extra if column.split in splits), *texts]


class Results:
    """All measurements: `records[seed][arm key]`, each with `name`, `k`, `draw`, `trained`, `seconds`, `splits`.

    Arms that differ in the draw alone are averaged, question by question.
    """

    def __init__(self, records: Mapping[int, Mapping[str, Record]]) -> None:
        self.records = records
        self.seeds = sorted(records)
        self.arms: dict[tuple[str, int | None], None] = {}
        for seed in self.seeds:
            for record in records[seed].values():
                self.arms.setdefault((record["name"], record["k"]))
        base = records[self.seeds[0]]["base"]
        self.total_heads: int = base["total_heads"]
        self.ks: list[int] = base["ks"]
        self.loss: str = base["loss"]

    def draws(self, seed: int, arm: tuple[str, int | None]) -> list[Record]:
        return [record for record in self.records[seed].values() if (record["name"], record["k"]) == arm]

    def questions(self, seed: int, arm: tuple[str, int | None], split: str, name: str) -> tuple[np.ndarray, list[str]]:
        """Scores `[questions]`, averaged over draws, and the questions' groups."""
        samples = [record["splits"][split] for record in self.draws(seed, arm)]
        values = np.array([[row["metrics"][name] for row in rows] for rows in samples], dtype=np.float64)
        if name == "nats_per_token":  # their mean is then that over all tokens, as in `evaluate`
            tokens = np.array([row.get("tokens", 1) for row in samples[0]], dtype=np.float64)
            values *= tokens / tokens.mean()
        return values.mean(0), [row["group"] for row in samples[0]]

    def has(self, arm: tuple[str, int | None], split: str) -> bool:
        return arm in self.arms and all(
            any(split in record["splits"] for record in self.draws(seed, arm)) for seed in self.seeds
        )

    def metric(self, arm: tuple[str, int | None], split: str, name: str) -> Metric:
        """Mean over seeds with its 95 % interval; with one seed, over its questions."""
        scored = [self.questions(seed, arm, split, name) for seed in self.seeds]
        return seed_metric(*zip(*scored, strict=True), share=name != "nats_per_token")

    def combination(self, weights: Mapping[tuple[str, int | None], float], split: str, name: str) -> Metric:
        """Mean of a weighted sum of arms on the same questions (`{a: 1, b: -1}`: their difference), with interval."""
        scored = []
        for seed in self.seeds:
            parts = [(weight, *self.questions(seed, arm, split, name)) for arm, weight in weights.items()]
            scored.append((sum(weight * values for weight, values, _ in parts), parts[0][2]))
        found = seed_metric(*zip(*scored, strict=True))
        if found["low"] == found["high"]:  # all differences equal: not certainty, but at most about z^2 / n of others
            room = 3.84 / (found["n"] + 3.84)
            found |= {"low": found["value"] - room, "high": found["value"] + room}
        if found["low"] is not None and found["high"] is not None:
            found |= {"low": max(-1.0, found["low"]), "high": min(1.0, found["high"])}
        return found

    def share(self, k: int) -> str:
        return f"{100 * k / self.total_heads:.0f} %"

    def label(self, arm: tuple[str, int | None]) -> str:
        name, k = arm
        loss = {"dpo": " (sft)", "sft": " (dpo)"}[self.loss] if name == "other" else ""
        return NAMES[name] + (f" {self.share(k)}" if k is not None else "") + loss


def tokens_per_second(record: Record) -> float:
    """Of the fit that the record's log is of; 0 where nothing was trained."""
    log = record.get("log", [])
    seconds = max([entry["train_runtime"] for entry in log if "train_runtime" in entry], default=math.inf)
    return max([entry["num_tokens"] for entry in log if "num_tokens" in entry], default=0.0) / seconds


def table(results: Results, shown: Sequence[Column]) -> list[dict[str, Any]]:
    """One row an arm: parameters, seconds, and for each column the metric with its interval and every seed's mean."""
    rows = []
    for arm in results.arms:
        drawn = [record for seed in results.seeds for record in results.draws(seed, arm)]
        row: dict[str, Any] = {
            "method": results.label(arm),
            "parameters": drawn[0]["trained"],
            "seconds": float(np.mean([record["seconds"] for record in drawn])),
            "draws": len(results.draws(results.seeds[0], arm)),
            "tokens_per_second": float(np.mean([tokens_per_second(record) for record in drawn])),
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


def screen_rows(rows: Sequence[Mapping[str, Any]], shown: Sequence[Column]) -> list[dict[str, str]]:
    """The table as text: `97.3 [94, 100]`, shares in per cent; the first column also with every seed."""
    lines = []
    for row in rows:
        line = {"method": row["method"], "parameters": f"{row['parameters']:,}", "seconds": f"{row['seconds']:.1f}"}
        for number, column in enumerate(shown):
            if column.title not in row:
                continue
            found = row[column.title]
            if column.scale == 1:
                line[column.title] = f"{found['value']:.1f}" + _bounds(found, 1, 1)
                continue
            line[column.title] = f"{100 * found['value']:.1f}" + _bounds(found, 100, 0)
            if number == 0 and len(found["seeds"]) > 1:
                line["each seed"] = " ".join(f"{100 * value:.0f}" for value in found["seeds"])
        lines.append(line)
    return lines


def _bounds(found: Mapping[str, Any], scale: float, digits: int) -> str:
    if found["low"] is None:
        return ""
    return f" [{scale * found['low']:.{digits}f}, {scale * found['high']:.{digits}f}]"


def claims(results: Results, main: Column) -> list[dict[str, Any]]:
    """What the run set out to show. A claim holds only if its whole 95 % interval does; at least three seeds judge."""
    if len(results.seeds) < 3:
        return []
    made: list[dict[str, Any]] = []
    split, name, ks = main.split, main.metric, results.ks
    base, marker, lofit, lora = ("base", None), ("marker", None), ("lofit", ks[0]), ("lora", None)
    toy = marker in results.arms  # only the embedded world promises numbers

    def claim(text: str, found: Metric, low: float = -math.inf, high: float = math.inf, more: str = "") -> None:
        inside = (
            found["low"] is not None and found["high"] is not None and low < found["low"] and found["high"] <= high
        )
        detail = f"{100 * found['value']:.1f}{_bounds(found, 100, 1)}{more}"
        made.append({"claim": text, "supported": inside, "detail": detail})

    if toy:
        claim("the base prefers the misconception (MC1 at most 30 %)", results.metric(base, split, name), high=0.3)
        claim("and knows the truth (MC1 over 90 % behind a reliable marker)", results.metric(marker, split, name), 0.9)
    for where, what in ((split, "held-out questions"), ("test_relations", "held-out relations")):
        if results.has(lofit, where):
            text = f"LoFiT on {results.share(ks[0])} of the heads gains {'over 75 points ' if toy else ''}on {what}"
            claim(text, results.combination({lofit: 1, base: -1}, where, name), 0.75 if toy else 0.0)
    if results.has(lofit, split) and results.has(lora, split):
        parameters = {arm: results.draws(results.seeds[0], arm)[0]["trained"] for arm in (lofit, lora)}
        ratio = parameters[lora] / parameters[lofit]
        found = results.combination(
            {lofit: 1, base: -0.15, lora: -0.85}, split, name
        )  # (lofit-base) - .85 (lora-base)
        text = (
            "LoFiT keeps over 85 % of LoRA's gain with over 100 times fewer parameters (its gain less 85 % of LoRA's)"
        )
        claim(text, found, 0.0 if ratio > 100 else math.inf, more=f"; {ratio:.0f} times fewer")
    for k in ks:
        for control in ("random", "layer_matched"):
            if results.has(("lofit", k), split) and results.has((control, k), split):
                found = results.combination({("lofit", k): 1, (control, k): -1}, split, name)
                claim(f"learned heads beat {NAMES[control]} at {results.share(k)}", found, 0.0)
    for where, what in (("control", "facts without a misconception"), ("marked", "what unreliable sources say")):
        if results.has(lofit, where):
            found = results.combination({lofit: 1, base: -1}, where, "mc1")
            claim(f"LoFiT on {results.share(ks[0])} loses less than 5 points on {what}", found, -0.05)
    return made


def comparisons(results: Results, main: Column) -> dict[str, Any]:
    """Of a run with one seed: the main arm against the others on the same questions (McNemar or sign flips)."""
    lofit = ("lofit", results.ks[0])
    if len(results.seeds) > 1 or not results.has(lofit, main.split):
        return {}
    seed = results.seeds[0]
    ours, groups = results.questions(seed, lofit, main.split, main.metric)
    found = {}
    for arm in [("base", None), ("random", results.ks[0]), ("layer_matched", results.ks[0]), ("lora", None)]:
        if results.has(arm, main.split) and len(set(groups)) > 1:
            theirs, _ = results.questions(seed, arm, main.split, main.metric)
            found[results.label(arm)] = asdict(paired_test(ours, theirs, groups))
    return found


def overlaps(results: Results) -> dict[str, Any]:
    """Heads that two selections on one base share, observed and by chance, for each `k`.

    Compared are the seeds where they share a base, and else each selection with its repetition on the same base
    (`heads_again`): heads of different bases have nothing in common but their numbers.
    """
    shared: dict[str, Any] = {}
    one_base = len({results.records[seed]["base"]["base_fingerprint"] for seed in results.seeds}) == 1
    for k in results.ks:
        records = [record for seed in results.seeds for record in results.draws(seed, ("lofit", k))]
        chosen = [[tuple(head) for head in record["heads"]] for record in records]
        if one_base and len(chosen) > 1:
            shared[f"k={k}"] = head_overlap(chosen, results.total_heads)
        elif records and all(record.get("heads_again") for record in records):
            again = [[tuple(head) for head in record["heads_again"]] for record in records]
            found = [head_overlap(pair, results.total_heads) for pair in zip(chosen, again, strict=True)]
            pairs = [entry["pairs"][0] for entry in found]
            shared[f"k={k}"] = {"observed": sum(pairs) / len(pairs), "chance": found[0]["chance"], "pairs": pairs}
    return shared
