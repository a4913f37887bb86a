"""From the measurements of every arm and seed to the table, the claims and the figures of a LoFiT run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .. import results as shared
from ..results import Arm, Column, Record, claim
from .scores import head_overlap

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


class Results(shared.Results):
    """All measurements: `records[seed][arm key]`, each with `name`, `k`, `draw`, `trained`, `seconds`, `splits`.

    Arms that differ in the draw alone are averaged, question by question.
    """

    def __init__(self, records: Mapping[int, Mapping[str, Record]]) -> None:
        super().__init__(records)
        base = records[self.seeds[0]]["base"]
        self.total_heads: int = base["total_heads"]
        self.ks: list[int] = base["ks"]
        self.loss: str = base["loss"]

    def arm(self, record: Record) -> Arm:
        return record["name"], record["k"]

    def share(self, k: int) -> str:
        return f"{100 * k / self.total_heads:.0f} %"

    def label(self, arm: Arm) -> str:
        name, k = arm
        loss = {"dpo": " (sft)", "sft": " (dpo)"}[self.loss] if name == "other" else ""
        return NAMES[name] + (f" {self.share(k)}" if k is not None else "") + loss


def claims(results: Results, main: Column) -> list[dict[str, Any]]:
    """What the run set out to show. A claim holds only if its whole 95 % interval does; at least three seeds judge."""
    if len(results.seeds) < 3:
        return []
    made: list[dict[str, Any]] = []
    split, name, ks = main.split, main.metric, results.ks
    base, marker, lofit, lora = ("base", None), ("marker", None), ("lofit", ks[0]), ("lora", None)
    toy = marker in results.arms  # only the embedded world promises numbers

    if toy:
        wrong, right = (results.metric(arm, split, name) for arm in (base, marker))
        made.append(claim("the base prefers the misconception (MC1 at most 30 %)", wrong, high=0.3))
        made.append(claim("and knows the truth (MC1 over 90 % behind a reliable marker)", right, 0.9))
    for where, what in ((split, "held-out questions"), ("test_relations", "held-out relations")):
        if results.has(lofit, where):
            text = f"LoFiT on {results.share(ks[0])} of the heads gains {'over 75 points ' if toy else ''}on {what}"
            made.append(claim(text, results.combination({lofit: 1, base: -1}, where, name), 0.75 if toy else 0.0))
    if results.has(lofit, split) and results.has(lora, split):
        parameters = {arm: results.draws(results.seeds[0], arm)[0]["trained"] for arm in (lofit, lora)}
        ratio = parameters[lora] / parameters[lofit]
        found = results.combination(
            {lofit: 1, base: -0.15, lora: -0.85}, split, name
        )  # (lofit-base) - .85 (lora-base)
        text = (
            "LoFiT keeps over 85 % of LoRA's gain with over 100 times fewer parameters (its gain less 85 % of LoRA's)"
        )
        made.append(claim(text, found, 0.0 if ratio > 100 else math.inf, more=f"; {ratio:.0f} times fewer"))
    for k in ks:
        for control in ("random", "layer_matched"):
            if results.has(("lofit", k), split) and results.has((control, k), split):
                found = results.combination({("lofit", k): 1, (control, k): -1}, split, name)
                made.append(claim(f"learned heads beat {NAMES[control]} at {results.share(k)}", found, 0.0))
    for where, what in (("control", "facts without a misconception"), ("marked", "what unreliable sources say")):
        if results.has(lofit, where):
            found = results.combination({lofit: 1, base: -1}, where, "mc1")
            made.append(claim(f"LoFiT on {results.share(ks[0])} loses less than 5 points on {what}", found, -0.05))
    return made


def comparisons(results: Results, main: Column) -> dict[str, Any]:
    """Of a run with one seed: the main arm against the others on the same questions (McNemar or sign flips)."""
    k = results.ks[0]
    return results.paired(("lofit", k), [("base", None), ("random", k), ("layer_matched", k), ("lora", None)], main)


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
