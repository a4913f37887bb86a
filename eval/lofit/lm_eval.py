"""The LoFiT row's multiple-choice rows as a task of EleutherAI's ``lm_eval`` (extra ``lm-eval``), offline.

    result = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer),
        tasks=[truthfulqa_task(rows)],
        task_manager=TaskManager(include_defaults=False),  # else lm_eval reads all of its own tasks: 17 s
        bootstrap_iters=0,
    )
    result["results"]["truthfulqa_mc"]["mc1,none"]

The numbers equal those of ``steerbook.eval.lofit.evaluate``. They differ from lm_eval's own ``truthfulqa_mc1`` and
``_mc2`` in the prompt (that of the rows), in a tie (no win here), and where all answers are so unlikely that their MC2
is 0 / 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .scores import multiple_choice

METRICS = ("mc1", "mc2", "mc3")


def truthfulqa_task(rows: Iterable[Mapping[str, Any]], name: str = "truthfulqa_mc") -> dict[str, Any]:
    """A task for ``lm_eval.simple_evaluate(tasks=[...])`` from rows with prompt, best, true and false."""
    rows = [{key: row[key] for key in ("id", "prompt", "best", "true", "false")} for row in rows]
    if not rows:
        raise ValueError("no rows to make a task of; give at least one")

    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(rows)}

    return {
        "task": name,
        "custom_dataset": dataset,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": _prompt,
        "doc_to_choice": _choices,
        "doc_to_target": 0,
        "target_delimiter": "",  # a choice brings its own space
        "process_results": _score,
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in METRICS],
        "num_fewshot": 0,
    }


def _prompt(doc: Mapping[str, Any]) -> str:
    return doc["prompt"]


def _choices(doc: Mapping[str, Any]) -> list[str]:
    return [doc["best"], *doc["true"], *doc["false"]]


def _score(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    best, *scores = [logprob for logprob, _ in results]
    return multiple_choice(best, scores[: len(doc["true"])], scores[len(doc["true"]) :])
