"""What a run would do, shown before any time is spent: rows with their loss tokens, parameters, memory."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from accelerate.utils import DistributedType
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from .activations import model_sizes
from .memory import Composition, Engine, Launch, largest_batch, memory_estimate


def show_dry_run(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    rows: int = 3,
    between: str = "",
    composition: Composition | None = None,
    **plan: Any,
) -> None:
    """Print rows of the first batch as the trainer will see them, then what `show_memory` prints.

    The first ones; where a batch says which rows are of which task, the first ones of each in turn.

    The masks are read from the collated batch itself (labels, or DPO's completion mask), not worked out again.

    Args:
        between: what to show between tokens, where they have no spaces of their own.
        composition, plan: see `show_memory`.
    """
    console = Console(highlight=False)
    batch = next(iter(trainer.get_train_dataloader()))
    ids = batch["input_ids"].cpu()
    seen = batch["attention_mask"].cpu().bool() if "attention_mask" in batch else ids != tokenizer.pad_token_id
    loss = batch["completion_mask"].cpu().bool() if "completion_mask" in batch else batch["labels"].cpu() != -100
    count = len(ids) // 2 if "completion_mask" in batch else len(ids)  # DPO: chosen rows, then rejected ones
    console.print(Text("First rows; [the tokens that carry loss] are green:", style="bold"))
    tasks = batch["task_id"].tolist() if "task_id" in batch else [0] * count
    turns = [tasks[:row].count(task) for row, task in enumerate(tasks[:count])]  # of its task the how many-th a row is
    for row in sorted(sorted(range(count), key=lambda row: turns[row])[:rows]):
        parts = {"chosen": row, "rejected": row + count} if "completion_mask" in batch else {"": row}
        for name, index in parts.items():
            text = Text(f"  {name + ':':10}" if name else "  ")
            marks = loss[index][seen[index]].tolist()
            for place, token in enumerate(ids[index][seen[index]]):
                opens = marks[place] and not (place and marks[place - 1])
                closes = marks[place] and not (place + 1 < len(marks) and marks[place + 1])
                piece = (
                    between * bool(place) + "[" * opens + tokenizer.decode(token).replace("\n", "\\n") + "]" * closes
                )
                text.append(piece, style="bold green" if marks[place] else "dim")
            console.print(text)
    tokens = int(seen.sum())
    console.print(f"This batch: {len(ids)} sequences, {tokens} tokens, {int(loss.sum())} of them with loss.")
    args, batches = trainer.args, len(trainer.get_train_dataloader())
    steps = math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs)
    console.print(f"Steps: {args.max_steps if args.max_steps > 0 else steps} per fit.")
    whole = bool(seen.all())
    show_memory(trainer.model, args, len(ids), ids.shape[1], per_row=len(ids) // count, padded=not whole,
                scored=int(loss.sum()) / ids.numel(), composition=composition, **plan)  # fmt: skip


def show_memory(
    model: Any,
    args: TrainingArguments,
    rows: int,
    tokens: int,
    *,
    per_row: int = 1,
    padded: bool = False,
    scored: float = 1.0,
    composition: Composition | None = None,
    engine: Engine | None = None,
    processes: int | None = None,
    memory: float | None = None,
) -> None:
    """Print parameters, the bytes of a step by kind, what it moves, and the largest batch that fits.

    Args:
        rows, tokens: sequences of a batch and their length; `per_row` of them make a row (DPO: 2).
        padded, scored: whether they differ in length; the share of tokens that carry loss.
        engine, processes: planned for, on accelerators; default: those of this launch.
        memory: GiB of a process; default: the accelerator's.

    Raises:
        ValueError: an engine that is not known.
    """
    launch = launch_of(args, engine, processes, planned=memory is not None)
    sizes = model_sizes(model, tokens, launch, padded=padded)
    found = memory_estimate(sizes, rows, tokens, launch, scored, composition)
    console, total = Console(highlight=False, soft_wrap=True), sizes.weights
    counts = {"all parameters": model.num_parameters(),
              "trained parameters": composition.coefficients if composition else total.trained}  # fmt: skip
    sums = {"at most at one time": found.peak, "moved a step between processes": found.moved}
    if found.host:
        sums |= {"in the host's memory": found.host, "moved a step to and from the host": found.moved_host}
    ways = (
        f"on {'an accelerator' if launch.accelerator else 'the CPU'}, engine {launch.engine}, {launch.processes} "
        f"process{'es' * (launch.processes > 1)}, {'bf16' if args.bf16 else 'fp16' if args.fp16 else 'no bf16'}, "
        f"gradient checkpointing {'on' if launch.checkpointing else 'off'}"
    )
    console.print(f"One step of one process, {rows // per_row} rows of {tokens} tokens ({ways}):")
    for name, value in (counts | found.kinds | sums).items():
        console.print(f"  {name:<42}{value:>16,}" + ("" if name in counts else " bytes"))
    limit = int(memory * 2**30) if memory is not None else None
    if limit is None and args.device.type == "cuda":
        limit = torch.cuda.get_device_properties(args.device).total_memory
    if limit is None:
        return console.print("Largest batch that fits: --dry_memory GIB says which memory it is to fit.")
    most = largest_batch(sizes, tokens, launch, limit, scored, composition) // per_row
    one = memory_estimate(sizes, per_row, tokens, launch, scored, composition).peak
    console.print(f"Largest batch that fits {limit / 2**30:,.4g} GiB: " + (
        f"{most:,} rows of {tokens} tokens." if most else f"none; one row needs {one / 2**30:,.4g} GiB."))  # fmt: skip


def launch_of(
    args: TrainingArguments, engine: Engine | None = None, processes: int | None = None, planned: bool = False
) -> Launch:
    """How the run is launched, or planned to be: then for accelerators, whatever this machine has."""
    planned = planned or engine is not None or processes is not None
    return Launch(
        engine or _engine(args),
        processes or (1 if engine == "none" else args.world_size),
        half=bool(args.bf16 or args.fp16),
        checkpointing=bool(args.gradient_checkpointing),
        accelerator=planned or args.device.type != "cpu",
    )


def _engine(args: TrainingArguments) -> Engine:
    state = args.distributed_state
    if args.deepspeed_plugin is not None:
        zero = args.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
        offload = zero.get("offload_optimizer", {}).get("device", "none") != "none"
        named: dict[tuple[Any, bool], Engine] = {(2, False): "zero2", (3, False): "zero3", (3, True): "zero3_offload"}
        found = zero.get("stage", 0), offload
        if found not in named:
            raise ValueError(
                f"no estimate for DeepSpeed's stage {found[0]}{' with offloading' if offload else ''}: name the "
                "nearest with --dry_engine zero2, zero3 or zero3_offload"
            )
        return named[found]
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "fsdp2"
    return "none" if state is None or state.distributed_type == DistributedType.NO else "ddp"
