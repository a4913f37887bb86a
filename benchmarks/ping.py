"""What scoring prefixes costs: 20 candidates on 60 tasks, beside one `generate` call each.

    python benchmarks/ping.py [--rounds 5] [--out FILE.json]

One process, one thread, contenders in turn, CPU time. A random Llama of 4 M parameters and a byte-pair tokenizer. Ours
computes a task's prompt once for all candidates, and writes replies in batches; its texts are compared with those of
`generate` before anything is timed. A reply has 24 tokens at most: what is saved is work on prompts, and longer
replies favour ours less. One call each is timed on a fifth of the prefixes, and counted five times.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from timing import measure, ratio
from tiny_chat import make

from steerbook.console import quiet_libraries
from steerbook.data_builders.ping.office import OFFICE
from steerbook.data_builders.ping.splits import task_sets
from steerbook.data_builders.ping.trajectories import SYSTEM, trajectory
from steerbook.eval.generation import generate
from steerbook.eval.ping.agent import ModelAgent
from steerbook.files import write_json
from steerbook.trainers.ping import GrammarGenerator, Prefix

OURS, ONE, BATCHED = "ours", "generate, one call each", "generate, in batches of 60"
BOUND = 4.0
NEW_TOKENS = 24
PART = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="at least 5")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-ping.json"))
    options = parser.parse_args()
    if options.rounds < 5:
        parser.error("a median of fewer than 5 rounds says little")
    torch.set_num_threads(1)
    quiet_libraries()
    console = Console(width=110, highlight=False)
    tasks = task_sets(OFFICE, {"tuning": 30})["tuning"]
    texts = [str(message["content"]) for task in tasks for message in trajectory(task, Random(0))]
    model, tokenizer = make(texts)
    agent = ModelAgent(model, tokenizer, "hermes", max_new_tokens=NEW_TOKENS, tools=None)
    conversations = [
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": task.request}] for task in tasks
    ]
    prefixes = [Prefix(text) for text in GrammarGenerator().propose(20, None, Random(0))]
    heads = [agent.prompt(messages, None)[0] for messages in conversations]
    whole = [[head + prefix.opening(conversations[0]) for head in heads] for prefix in prefixes]

    def one_by_one(rows: list[list[str]]) -> list[list[str]]:
        return [[generate(model, tokenizer, [text], max_new_tokens=NEW_TOKENS)[0] for text in row] for row in rows]

    contenders: dict[str, Callable[[], Any]] = {
        OURS: lambda: agent.first_replies(conversations, prefixes),
        ONE: lambda: one_by_one(whole[::PART]),
        BATCHED: lambda: [generate(model, tokenizer, row, max_new_tokens=NEW_TOKENS, batch_size=60) for row in whole],
    }
    found = [[reply.text for reply in row] for row in contenders[OURS]()]
    other = one_by_one(whole)
    same = sum(a == b for one, two in zip(found, other, strict=True) for a, b in zip(one, two, strict=True))
    total = len(prefixes) * len(tasks)
    tokens = len(tokenizer(heads[0])["input_ids"])
    console.print(
        f"{len(prefixes)} prefixes on {len(tasks)} tasks of some {tokens} tokens; {same} of {total} replies equal"
    )
    if same < total:
        raise SystemExit("error: replies differ; nothing was timed")
    seconds = measure(contenders, options.rounds, 1, "cpu")
    seconds[ONE] = [PART * value for value in seconds[ONE]]
    table = Table()
    for column in ("contender", "CPU s, median", "times ours"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name, values in seconds.items():
        table.add_row(name, f"{statistics.median(values):,.1f}", f"{ratio(seconds, name, OURS):.2f}")
    console.print(table)
    times = ratio(seconds, ONE, OURS)
    mark = "[green]holds[/]" if times >= BOUND else "[red]missed[/]"
    console.print(f"{ONE} takes {times:.2f} times as long; at least {BOUND:g}: {mark}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        options.out, {"seconds": seconds, "ratios": {name: ratio(seconds, name, OURS) for name in (ONE, BATCHED)}}
    )
    console.print(f"Written to {options.out}")


if __name__ == "__main__":
    main()
