"""What exact measuring costs: reports beside scoring string by string, choices beside `generate`.

    python benchmarks/self_interpretability.py [--rounds 7] [--out FILE.json]

One process, one thread, contenders in turn, CPU time. A random Llama of 4 M parameters and a byte-pair tokenizer that
takes digits one by one. Reports: all 201 numbers of five attributes, ours on a shared key-value cache, and each number
as a whole text of its own, one at a time and in batches of 32 (timed on one attribute). Choices: 24 trials of one
context in both orders, ours behind what the prompts have in common, and `generate` of a letter and the end, in batches
and prompt by prompt, or of 16 tokens, as many as it writes by default. Results are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from timing import measure, ratio
from tiny_chat import make

from steerbook.console import quiet_libraries
from steerbook.data_builders.self_interpretability.asking import choices, questions
from steerbook.data_builders.self_interpretability.generated import generated_contexts
from steerbook.eval.choices import common_prefix, encode
from steerbook.eval.generation import generate
from steerbook.eval.likelihood import score_tokens
from steerbook.eval.next_token import next_token_logprobs
from steerbook.eval.prompts import prompt_text
from steerbook.eval.self_interpretability.answers import answer_tokens
from steerbook.eval.self_interpretability.behaviour import measure_choices
from steerbook.eval.self_interpretability.reports import measure_reports
from steerbook.files import write_json

REPORTS, ONE, BATCHED = "reports, ours", "reports, string by string", "reports, strings in batches of 32"
CHOICES, BATCHES = "choices, ours", "choices, generate in batches (2 tokens)"
WRITTEN, FULL = (f"choices, generate prompt by prompt ({count} tokens)" for count in (2, 16))
BOUNDS = {(ONE, REPORTS): 5.0, (BATCHES, CHOICES): 3.0, (WRITTEN, CHOICES): 3.0, (FULL, CHOICES): 3.0}


def string_by_string(model: Any, tokenizer: Any, question: Any, found: Any, batch: int) -> np.ndarray:
    """Log-probabilities of all numbers, `[attributes, 201]`, each in a text of its own."""
    text, rows = prompt_text(tokenizer, question.prompt, {}), []
    for place in range(len(question.places)):
        text += question.openings[place]
        before = encode(tokenizer, [text])[0]
        ids = encode(tokenizer, [f"{text}{number}{question.closings[place]}" for number in question.numbers])
        scored = score_tokens(model, ids, [common_prefix(before, row) for row in ids], batch_size=batch)
        rows.append([-one.nats for one in scored])
        text += f" {int(found.mode[place])}"
    return np.array(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="at least 5")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-self_interpretability.json"))
    options = parser.parse_args()
    if options.rounds < 5:
        parser.error("a median of fewer than 5 rounds says little")
    torch.set_num_threads(1)
    quiet_libraries()
    console = Console(width=110, highlight=False)
    contexts = generated_contexts(40, 0)
    texts = [message["content"] for one in choices(contexts, 2, Random(0)) for message in one.prompt]  # type: ignore[union-attr]
    texts += [message["content"] for one in questions(contexts, 1, Random(0)) for message in one.prompt]  # type: ignore[union-attr]
    model, tokenizer = make(texts)
    question, trials = questions(contexts[:1], 1, Random(1)), choices(contexts[:1], 24, Random(1))
    prompts = [prompt_text(tokenizer, prompt, {}) for one in trials for prompt in (one.prompt, one.swapped)]
    report = measure_reports(model, tokenizer, question)[0]
    logs = string_by_string(model, tokenizer, question[0], report, 1)
    apart = float(np.abs(np.exp(logs - np.logaddexp.reduce(logs, axis=1)[:, None]) - report.probabilities).max())
    tokens = answer_tokens(tokenizer, prompts[0], ("A", "B"))
    ids = encode(tokenizer, prompts)
    whole = np.array([next_token_logprobs(model, [row], tokens)[0] for row in ids])
    choices_apart = float(np.abs(whole - next_token_logprobs(model, ids, tokens)).max())
    console.print(
        f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters; a prompt has "
        f"{len(ids[0])} tokens. Reports string by string differ by {apart:.0e} at most, choices {choices_apart:.0e}."
    )
    if max(apart, choices_apart) > 1e-5:
        raise SystemExit(f"error: results differ by {max(apart, choices_apart):.1e}; nothing was timed")
    first = replace(question[0], places=(0,))
    contenders: dict[str, Callable[[], Any]] = {
        REPORTS: lambda: measure_reports(model, tokenizer, [first]),
        ONE: lambda: string_by_string(model, tokenizer, first, report, 1),
        BATCHED: lambda: string_by_string(model, tokenizer, first, report, 32),
        CHOICES: lambda: measure_choices(model, tokenizer, trials, batch_size=8),
        BATCHES: lambda: generate(model, tokenizer, prompts, max_new_tokens=2, batch_size=8),
        WRITTEN: lambda: generate(model, tokenizer, prompts, max_new_tokens=2, batch_size=1),
        FULL: lambda: generate(model, tokenizer, prompts, max_new_tokens=16, batch_size=1),
    }
    seconds = measure(contenders, options.rounds, 1, "cpu")
    table = Table()
    for column in ("contender", "CPU ms, median", "times ours"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name, values in seconds.items():
        ours = REPORTS if name.startswith("reports") else CHOICES
        table.add_row(name, f"{1000 * statistics.median(values):,.0f}", f"{ratio(seconds, name, ours):.2f}")
    console.print(table)
    ratios = {}
    for (one, other), bound in BOUNDS.items():
        times = ratio(seconds, one, other)
        ratios[f"{one} / {other}"] = times
        mark = "[green]holds[/]" if times >= bound else "[red]missed[/]"
        console.print(f"{one} takes {times:.2f} times as long as {other}; at least {bound:g}: {mark}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        options.out, {"seconds": seconds, "ratios": ratios, "apart": {"reports": apart, "choices": choices_apart}}
    )
    console.print(f"Written to {options.out}")


if __name__ == "__main__":
    main()
