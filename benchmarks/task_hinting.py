"""What the hinting trainer's loop costs beside a bare PyTorch loop and TRL's plain `SFTTrainer`.

    python benchmarks/task_hinting.py [--rounds 9] [--steps 150] [--out FILE.json]

One process, one thread, contenders in turn: each trains the default's model from scratch on the same rows, and the
CPU time of its steps counts, without building anything. The bare loop has its batches ready as tensors; the hinting
trainer makes its rows while it trains; `SFTTrainer` has them tokenised in a data set. Before anything is timed, bare
loop and hinting trainer are compared: the same losses. Then the generator alone, beside a step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from timing import ratio
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from steerbook.console import quiet_libraries
from steerbook.data_builders.task_hinting import HintingDataArguments, make_stream
from steerbook.files import write_json
from steerbook.trainers.task_hinting import ScratchConfig, named_tokenizer, scratch_model
from steerbook.trainers.task_hinting.trainer import HintingConfig, HintingTrainer

BARE, OURS, TRL = "bare PyTorch loop", "HintingTrainer", "TRL's SFTTrainer"
BOUNDS = {
    (BARE, OURS): (0.9, float("inf")),
    (TRL, OURS): (1.3, float("inf")),
}  # times: how much longer the first takes
COMMON: dict[str, Any] = {
    "learning_rate": 3e-3, "adam_beta2": 0.98, "weight_decay": 0.0, "lr_scheduler_type": "constant",
    "optim": "adamw_torch_fused", "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    "logging_steps": 100, "use_cpu": True}  # fmt: skip


class Clock(TrainerCallback):
    """Seconds of all steps but the first ten, and the losses logged."""

    seconds = start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 10:
            self.start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps:
            self.seconds = time.process_time() - self.start


def bare(args: HintingDataArguments, steps: int) -> tuple[float, list[float]]:
    stream = make_stream(args)
    model = scratch_model(len(stream.family.vocabulary), ScratchConfig(), 0, 80)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    batches = [[torch.as_tensor(part) for part in stream.step(number)] for number in range(steps)]
    losses = []
    start = 0.0
    for number, (ids, targets, _, tasks) in enumerate(batches):
        if number == 10:
            start = time.process_time()
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        seen = targets[:, 1:]
        nats = cross_entropy(logits[seen], ids[:, 1:][seen], reduction="none")
        of_token = tasks[:, None].expand_as(seen)[seen]
        loss = sum((nats[of_token == task].mean() for task in range(len(stream.tasks))), torch.zeros(()))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return time.process_time() - start, losses


def trained(trainer: Any) -> tuple[float, list[float]]:
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    return clock.seconds, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def ours(args: HintingDataArguments, steps: int, folder: str, **more: Any) -> HintingTrainer:
    stream = make_stream(args)
    names = stream.family.vocabulary
    config = HintingConfig(folder, max_steps=steps, per_device_train_batch_size=stream.rows, **{**COMMON, **more})
    model = scratch_model(len(names), ScratchConfig(), 0, 80)
    return HintingTrainer(model, config, stream=stream, processing_class=named_tokenizer(names))


def plain(args: HintingDataArguments, steps: int, folder: str) -> SFTTrainer:
    stream = make_stream(args)
    rows: dict[str, list] = {"input_ids": [], "labels": []}
    for number in range(steps):
        ids, targets, *_ = (torch.as_tensor(part) for part in stream.step(number))
        for row, seen in zip(ids, targets, strict=True):
            length = int(row.nonzero().max()) + 1  # as TRL's rows are: without padding
            rows["input_ids"].append(row[:length].tolist())
            rows["labels"].append(row.masked_fill(~seen, -100)[:length].tolist())
    names = stream.family.vocabulary
    config = SFTConfig(
        folder, max_steps=steps, per_device_train_batch_size=stream.rows, bf16=False, gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, dataloader_pin_memory=False, **COMMON,
    )  # fmt: skip
    model = scratch_model(len(names), ScratchConfig(), 0, 80)
    tokenizer = named_tokenizer(names)
    return SFTTrainer(model, config, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="at least 7")
    parser.add_argument("--steps", type=int, default=150, help="of each contender in each round")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-task_hinting.json"))
    options = parser.parse_args()
    if options.rounds < 7 or options.steps < 20:
        parser.error("a median of fewer than 7 rounds, or of fewer than 20 steps, says little")
    torch.set_num_threads(1)
    quiet_libraries()
    console = Console(width=110, highlight=False)
    args = HintingDataArguments()
    with tempfile.TemporaryDirectory() as folder:
        _, expected = bare(args, 30)
        _, found = trained(ours(args, 30, folder, logging_steps=1))
        apart = max(abs(a - b) / a for a, b in zip(expected, found, strict=True))
        if apart > 1e-3:
            raise SystemExit(f"error: the losses of 30 steps differ by {apart:.1e}; nothing was timed")
        console.print(
            f"Bare loop and HintingTrainer have the same losses over 30 steps (largest difference {apart:.0e})."
        )
        contenders: dict[str, Callable[[], tuple[float, list[float]]]] = {
            BARE: lambda: bare(args, options.steps),
            OURS: lambda: trained(ours(args, options.steps, folder)),
            TRL: lambda: trained(plain(args, options.steps, folder)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(options.rounds):
            for name, run in contenders.items():
                seconds[name].append(run()[0])
    stream = make_stream(args)
    start = time.process_time()
    for number in range(500):
        stream.step(number)
    generator = (time.process_time() - start) / 500
    step = stream.step(0)
    counted = (options.steps - 10) * step.ids.size
    table = Table(title=f"{args.main_rows} sorting and {args.hint_rows} successor rows a step, one thread")
    for column in ("contender", "ms a step", "tokens a second", "beside bare"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name, values in seconds.items():
        middle = statistics.median(values)
        table.add_row(name, f"{1000 * middle / (options.steps - 10):.2f}", f"{counted / middle:,.0f}",
                      f"{ratio(seconds, name, BARE):.2f}")  # fmt: skip
    console.print(table)
    a_step = statistics.median(seconds[OURS]) / (options.steps - 10)
    checks = [(f"tokens a second: {OURS} / {other}", ratio(seconds, other, OURS), *bound)
              for (other, _), bound in BOUNDS.items()]  # fmt: skip
    checks.append(("a training step / making its rows", a_step / generator, 10.0, float("inf")))
    for name, value, low, high in checks:
        within = "within" if low <= value <= high else "[red]outside[/]"
        console.print(f"{name:<62} {value:.3f}  {within} [{low:.2f}, {high:.2f}]")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    ratios = {name: {"value": value, "low": low} for name, value, low, _ in checks}
    write_json(options.out, {"seconds": seconds, "generator_seconds": generator, "ratios": ratios,
                             "loss_difference": apart, "torch": torch.__version__})  # fmt: skip
    console.print(f"All numbers: {options.out}")


if __name__ == "__main__":
    main()
