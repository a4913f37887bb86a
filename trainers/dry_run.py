"""What a run would do, shown before any time is spent: rows with their loss tokens, parameters, memory."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase, Trainer


def show_dry_run(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, rows: int = 3, between: str = "") -> None:
    """Print rows of the first batch as the trainer will see them, then parameters and memory.

    The first ones; where a batch says which rows are of which task, the first ones of each in turn.

    The masks are read from the collated batch itself (labels, or DPO's completion mask), not worked out again.
    `between`: what to show between tokens, where they have no spaces of their own.
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
    for name, value in memory_estimate(trainer.model, batch["input_ids"].shape).items():
        console.print(f"  {name:<42}{value:>16,}" + ("" if name.endswith("parameters") else " bytes"))


def memory_estimate(model: Any, shape: tuple[int, int]) -> dict[str, int]:
    """Parameters, and bytes by kind, of one training step on a batch of `shape` (rows, tokens).

    Weights as they are loaded; gradients and AdamW's two moments (fp32) for trained parameters only. Activations: what
    autograd keeps per token and layer, about `6 hidden + 4 heads * head_dim + 3 intermediate` numbers of the weights'
    type, plus the head outputs' softmax statistics; an upper bound where the lowest trained layer is not the first.
    """
    config = model.config.get_text_config()
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    per_token = config.num_hidden_layers * (6 * config.hidden_size + 4 * width + 3 * inner)
    size = parameters[0].element_size()
    return {
        "all parameters": model.num_parameters(),  # 4-bit ones lie in half as many bytes
        "trained parameters": sum(p.numel() for p in trained),
        "weights": sum(p.numel() * p.element_size() for p in parameters),
        "gradients": sum(p.numel() * p.element_size() for p in trained),
        "optimiser (AdamW)": sum(8 * p.numel() for p in trained),
        "activations (estimate, first batch)": shape[0] * shape[1] * per_token * size,
    }
