"""The command every row's evaluation has: score a saved model or PEFT adapter on rows of a file.

python -m steerbook.eval.ROW --model DIR --rows FILE [--out FILE]
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
from ..files import write_json
from .choices import CausalLM
from .report import format_interval, results_table


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


def run(row: str, evaluate: Callable[..., Any], arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, score with `evaluate` of the row (a folder of `eval/`), show the metrics, write them down.

    What cannot be read or scored ends the program with a message instead of a traceback.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m steerbook.eval.{row}", description="Score a saved model or PEFT adapter on rows of a file."
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of a model, or folder of a PEFT adapter")
    parser.add_argument("--base", help="the base of an adapter, where it is not at the place that the adapter names")
    parser.add_argument("--rows", required=True, type=Path, help="file of rows of one kind (jsonl, parquet, ...)")
    parser.add_argument("--out", type=Path, help="where to write metrics and samples as JSON")
    parser.add_argument("--batch_size", type=int, default=64)
    options = parser.parse_args(arguments)
    if not options.rows.is_file():
        parser.error(f"--rows: no file at {options.rows}")

    with clear_errors(ValueError, OSError):
        rows = read_rows(options.rows)
        model, tokenizer = load_model(options.model, options.base)
        result = evaluate(model, tokenizer, rows, batch_size=options.batch_size, progress=True)
    lines = [{"metric": k, "value": format_interval(v), "rows": str(v["n"])} for k, v in result["metrics"].items()]
    results_table(lines, ["metric", "value", "rows"], f"{Path(options.model).name} on {options.rows.name}")
    if options.out:
        write_json(options.out, result)
