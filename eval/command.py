"""The command every row's evaluation has: score a saved model or PEFT adapter on rows of a file.

python -m steerbook.eval.ROW --model DIR --rows FILE [--out FILE]
python -m steerbook.eval.ROW --url http://127.0.0.1:8000/v1 --model NAME --rows FILE [--tokenizer DIR]

A served model (`--url`) is only asked for texts; what needs its probabilities refuses it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ..console import clear_errors
from ..data_builders import rows as data_rows
from ..endpoint import Endpoint
from ..files import write_json
from .choices import CausalLM
from .report import format_interval, results_table

TIMEOUT = 600.0  # seconds: a server has all requests at once, and the last ones wait for the others


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file that a data builder wrote (jsonl, json, csv, parquet); each must have an `id`."""
    rows = [row.values for row in data_rows.read_rows(path)]
    for number, row in enumerate(rows, 1):
        if "id" not in row:
            raise ValueError(f"{path.name} row {number} has no id, only the columns {', '.join(row)}")
    return rows


def json_object(text: str) -> dict[str, Any]:
    """A flag's value as a JSON object, for argparse, which names the flag."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"no JSON: {text!r} ({error})") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"a JSON object is needed, got {text!r}")
    return found


def load_model(name: str, base: str | None = None) -> tuple[CausalLM, PreTrainedTokenizerBase]:
    """A causal model (folder or Hub id), or a PEFT adapter (folder) on `base` or what its configuration names."""
    adapter = (Path(name) / "adapter_config.json").is_file()
    config = PeftConfig.from_pretrained(name) if adapter else None
    base = base or (config.base_model_name_or_path if config else name)
    if base is None:
        raise ValueError(f"{name}: adapter_config.json names no base model; pass it with --base")
    model: Any = AutoModelForCausalLM.from_pretrained(base, revision=config.revision if config else None, dtype="auto")
    if hasattr(model.config.get_text_config(), "length_softmax"):
        raise ValueError(
            f"{name} was trained with a softmax of its own, which from_pretrained leaves out: load it with `load` of "
            "steerbook.trainers.task_hinting, and score it with `evaluate` of steerbook.eval.task_hinting"
        )
    if adapter:
        model = PeftModel.from_pretrained(model, name)
    tokenizer = AutoTokenizer.from_pretrained(name if (Path(name) / "tokenizer_config.json").is_file() else base)
    words = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)  # slow tokenizers have none
    if isinstance(words, WordLevel) and words.unk_token not in tokenizer.get_vocab():
        raise ValueError(
            f"{name} was made from scratch for rows of tokens and reads no text: score it with `teacher_forced` of "
            "steerbook.eval.task_hinting"
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def served_model(options: argparse.Namespace) -> tuple[Endpoint, PreTrainedTokenizerBase | None]:
    """What `--url`, `--model` and `--tokenizer` say."""
    if options.base:
        raise ValueError("--base is for adapters that are loaded here; with --url, --model names what the server has")
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer) if options.tokenizer else None
    return Endpoint(options.url, options.model, timeout=TIMEOUT), tokenizer


def run(row: str, evaluate: Callable[..., Any], arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, score with `evaluate` of the row (a folder of `eval/`), show the metrics, write them down.

    What cannot be read or scored ends the program with a message instead of a traceback.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m steerbook.eval.{row}", description="Score a saved model or PEFT adapter on rows of a file."
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of a model, or folder of a PEFT adapter")
    parser.add_argument("--url", help="of a server that has --model, up to /v1 (key: OPENAI_API_KEY)")
    parser.add_argument("--tokenizer", help="folder or Hub id; of a served model, where tokens are counted")
    parser.add_argument("--base", help="the base of an adapter, where it is not at the place that the adapter names")
    parser.add_argument("--rows", required=True, type=Path, help="file of rows of one kind (jsonl, parquet, ...)")
    parser.add_argument("--out", type=Path, help="where to write metrics and samples as JSON")
    parser.add_argument("--batch_size", type=int, default=64, help="texts at once; of a server, requests")
    options = parser.parse_args(arguments)
    if not options.rows.is_file():
        parser.error(f"--rows: no file at {options.rows}")

    with clear_errors(ValueError, OSError):
        rows = read_rows(options.rows)
        if options.tokenizer and not options.url:
            raise ValueError("--tokenizer is for served models (--url); one that is loaded here brings its own")
        model, tokenizer = served_model(options) if options.url else load_model(options.model, options.base)
        result = evaluate(model, tokenizer, rows, batch_size=options.batch_size, progress=True)
    lines = [{"metric": k, "value": format_interval(v), "rows": str(v["n"])} for k, v in result["metrics"].items()]
    results_table(lines, ["metric", "value", "rows"], f"{Path(options.model).name} on {options.rows.name}")
    if options.out:
        write_json(options.out, result)
