"""aTLAS and what one would try instead, each on the same base, vectors and rows: one generator of arms a question."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset

from .arguments import arm_key
from .baselines import dare_vector, search_weights, ties_vector
from .bench import Arm, Bench, set_all
from .budget import budget
from .low_rank import LowRankComposer
from .stages import KeepBest


def best_accuracy(curve: list[dict[str, float]]) -> dict[str, float]:
    """The point of highest accuracy, the first of equals."""
    return max(curve, key=lambda point: point["accuracy"])


def addition(bench: Bench) -> Iterator[Arm]:
    """One model for all tasks at once (paper, section 4.2)."""
    a, vectors = bench.arguments, list(bench.vectors.values())
    fit, dev = bench.tasks(bench.fit, bench.known), bench.tasks(bench.dev, bench.known)

    steps: dict[str, Any] = {} if a.other_steps is None else {"max_steps": a.other_steps}

    def look(model: Any) -> dict[str, float]:
        return {"accuracy": bench.score(model, dev)[0]}

    if arm_key("addition", "base") not in bench.done:
        yield Arm("addition", "base", bench.base, dev=look(bench.base))
    for task in bench.known:
        if task in bench.vectors and bench.wanted("addition", "tuned", task):
            composer = bench.fixed([bench.vectors[task]])
            set_all(composer, 1.0)
            yield Arm("addition", "tuned", composer.model, task=task)
            composer.remove()
    if bench.wanted("addition", "sum"):
        composer = bench.fixed(vectors)
        set_all(composer, 1.0)
        yield Arm("addition", "sum", composer.model)
        composer.remove()
    yield from bench.searched("addition", "alpha", vectors, look, best_accuracy)
    yield from bench.learned("addition", "isotropic", fit, look=look, **steps)
    yield from bench.learned("addition", "atlas", fit, look=look)
    for name, merged in (
        ("ties", lambda: ties_vector(vectors, a.ties_density)),
        ("dare", lambda: dare_vector(vectors, a.dare_density, bench.args.seed)),
    ):
        if bench.wanted("addition", name):
            yield from bench.searched("addition", name, [merged()], look, best_accuracy)
    # AdaMerging (Yang et al., 2024): layer-wise coefficients from 0.3, by the entropy of unlabelled rows.
    adamerging: dict[str, Any] = {
        **steps,
        "learning_rate": a.adamerging_learning_rate,
        "weight_decay": 0.0,
        "entropy_below": 1.0,
    }
    yield from bench.learned("addition", "adamerging", fit, start=0.3, **adamerging)
    if bench.lora_vectors:
        yield from _over_lora_vectors(bench, fit, steps)
    yield from bench.tuned("addition", "joint", fit, a.joint_learning_rate, **steps)


def _over_lora_vectors(bench: Bench, fit: Dataset, steps: dict[str, Any]) -> Iterator[Arm]:
    a, vectors = bench.arguments, list(bench.lora_vectors.values())
    if bench.wanted("addition", "atlas_lora"):
        composer = LowRankComposer(bench.base, vectors, a.low_rank_mode)
        rate: dict[str, Any] = {**steps, "learning_rate": a.lora_vector_learning_rate}
        yield from bench.learned("addition", "atlas_lora", fit, composer=composer, **rate)
    if not bench.wanted("addition", "lorahub"):
        return
    start = time.perf_counter()
    composer = LowRankComposer(bench.base, vectors)
    few = bench.first(fit, a.search_rows)

    def loss(weights: list[float]) -> float:
        with torch.no_grad():
            composer.coefficients.copy_(torch.tensor(weights)[:, None].expand_as(composer.coefficients))
        return bench.score(composer.model, few)[1]

    weights, seen = search_weights(loss, len(vectors), a.search_budget)
    loss(weights)
    log = [{"step": float(step), "loss": value} for step, value in enumerate(seen, 1)]
    seconds = time.perf_counter() - start
    yield Arm("addition", "lorahub", composer.model, seconds, len(vectors), log=log, composer=composer,
              coefficients=composer.coefficients.detach().clone(), vectors=list(bench.lora_vectors))  # fmt: skip
    composer.remove()


def data(bench: Bench) -> Iterator[Arm]:
    """The same from few rows to many, beside fine-tuning all weights on them."""
    fit = bench.tasks(bench.fit, bench.known)
    a = bench.arguments
    for n in a.data_sizes:
        few: dict[str, Any] = {"rows": bench.first(fit, n), "n": n, "max_steps": a.data_steps}
        yield from bench.learned("data", "atlas", **few)
        yield from bench.tuned("data", "joint", learning_rate=a.joint_learning_rate, **few)


def fewshot(bench: Bench) -> Iterator[Arm]:
    """New tasks from few rows, by composing the vectors of the others (paper, section 5.1)."""
    a = bench.arguments
    for task in bench.new:
        rows = bench.tasks(bench.fit, [task])
        if arm_key("fewshot", "base", task) not in bench.done:
            yield Arm("fewshot", "base", bench.base, task=task)
        for n in a.shots:
            few: dict[str, Any] = {"rows": bench.first(rows, n), "task": task, "n": n}
            tuning: dict[str, Any] = {**few, "max_steps": a.shot_steps}
            yield from bench.tuned("fewshot", "finetune", learning_rate=a.shot_learning_rate, **tuning)
            yield from bench.tuned("fewshot", "lora", learning_rate=a.lora_learning_rate, lora=True, **tuning)
            yield from bench.learned("fewshot", "isotropic", **few, **a.few())
            yield from bench.learned("fewshot", "atlas", **few, **a.few())


def negation(bench: Bench) -> Iterator[Arm]:
    """Forget one task and keep the others: accuracy as low as it gets while theirs stays within the rule on dev."""
    a = bench.arguments
    for target in a.forget or ():
        others = [task for task in bench.known if task != target]
        dev = {"target": bench.tasks(bench.dev, [target]), "control": bench.tasks(bench.dev, others)}
        before = bench.score(bench.base, dev["control"])[0]
        floor = a.control_share * before

        rule = {"base_control": before, "control_share": a.control_share}

        def look(model: Any, dev: dict[str, Dataset] = dev, rule: dict[str, float] = rule) -> dict[str, float]:
            return {name: bench.score(model, rows)[0] for name, rows in dev.items()} | rule

        def choose(curve: list[dict[str, float]], floor: float = floor) -> dict[str, float]:
            return min((point for point in curve if point["control"] >= floor), key=lambda point: point["target"])

        vector = [bench.vectors[target]]
        if arm_key("negation", "base", target) not in bench.done:
            yield Arm("negation", "base", bench.base, task=target, dev=look(bench.base))
        yield from bench.searched("negation", "alpha", vector, look, choose, target, -1.0)
        if not bench.wanted("negation", "atlas", target):
            continue
        composer = bench.composer(vector)

        def judge(model: Any, look: Callable[[Any], dict[str, float]] = look, floor: float = floor) -> float | None:
            seen = look(model)
            return seen["target"] if seen["control"] >= floor else None

        yield from bench.learned(
            "negation", "atlas", bench.tasks(bench.fit, bench.known), target, composer=composer, look=look,
            keep=KeepBest(composer, judge, a.negation_every), names=[target], forget_tasks=[target],
            forget_cap=a.negation_cap, retain_weight=a.negation_retain, max_steps=a.negation_steps,
            learning_rate=a.negation_learning_rate,
        )  # fmt: skip


SECTIONS = {"addition": addition, "data": data, "fewshot": fewshot, "negation": negation, "budget": budget}
