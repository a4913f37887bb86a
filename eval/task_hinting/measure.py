"""All that is measured of one model: `splits`, samples for the report, and what attention looks at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..choices import CausalLM
from ..sharding import shared_out
from .attention import attention_masses
from .probes import probe
from .scores import Rows, Telling, teacher_forced
from .text import Row, collateral, evaluate

LOOKS = 100  # test rows of each length are enough to see what attention does


def measure_tokens(
    model: CausalLM,
    tests: Mapping[int, Any],
    batch_size: int,
    *,
    hints: Mapping[str, Mapping[int, Any]],
    sorts: bool,
    probed: Rows | None = None,
    telling: Telling | None = None,
) -> dict[str, Any]:
    """Of a model from scratch, on test rows (`Rows`) by length, which the processes of a job share.

    Args:
        hints: test rows of the hints that it was trained on, which make splits `HINT_N`.
        sorts: the main task is sorting, for which there are read-outs of attention and
        probed: rows, none of the tests', that linear probes are fitted on.
    """
    named = _named(tests, hints)

    def scored(rows: Any) -> list[Any]:
        def work(places: Sequence[int]) -> list[Any]:
            return teacher_forced(model, _taken(rows, list(places)), batch_size, telling)

        return shared_out(range(len(rows.ids)), work)

    splits = {name: scored(rows) for name, rows in named.items()}
    looked = {n: _taken(rows, slice(LOOKS)) for n, rows in tests.items() if sorts and n > 1}
    found: dict[str, Any] = {"splits": splits}
    found["attention"] = {n: attention_masses(model, rows, telling=telling) for n, rows in looked.items()}
    if looked and probed is not None:
        found["probes"] = probe(model, probed, looked, telling=telling)
    return found


def measure_texts(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tests: Mapping[int, Sequence[Row]],
    unrelated: Sequence[Row],
    batch_size: int,
    *,
    hints: Mapping[str, Mapping[int, Sequence[Row]]],
    progress: bool = False,
) -> dict[str, Any]:
    """Of a pretrained model, on test rows of text by length (`hints`: as in `measure_tokens`), and unrelated texts."""
    scoring: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    named = _named(tests, hints)
    splits = {name: evaluate(model, tokenizer, rows, **scoring)["samples"] for name, rows in named.items()}
    return {"splits": {**splits, "collateral": collateral(model, tokenizer, unrelated, **scoring)}}


def _named(tests: Mapping[int, Any], hints: Mapping[str, Mapping[int, Any]]) -> dict[str, Any]:
    return {f"{task}_{n}": rows for task, found in {"test": tests, **hints}.items() for n, rows in found.items()}


def _taken(rows: Any, places: Any) -> Rows:
    return type(rows)(*(part[places] for part in rows))
