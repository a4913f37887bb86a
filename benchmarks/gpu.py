"""Step time, peak memory and utilisation of the trainers on one accelerator, with random weights of real shapes.

    PYTHONPATH=src python3 benchmarks/gpu.py [--shapes 1b 8b] [--methods lora full] [--out runs/benchmark-gpu.json]

Each row is a run of the trainer that the recipes use, in bf16, on one fixed batch of 4 x 512 tokens that all carry
loss. Time: the median, over the steps after a warm-up, of the synchronised seconds from one step's end to the next
one's. Memory: the most that PyTorch's allocator held in these steps, and beside it what `--dry_run` estimates
(trainers/memory.py). Utilisation: the model's operations, counted as `flops` says, in that time, beside what the card
does at most in dense bf16. A row that by the estimate does not fit is left out, one that runs out of memory says so,
and the next one runs; the file is written after each row. On a CPU `--shapes tiny` shows times and estimates alone.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from random_vectors import dense_vectors, lora_vectors
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PrinterCallback, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from steerbook.console import quiet_libraries
from steerbook.files import write_json
from steerbook.trainers import Composer
from steerbook.trainers.activations import model_sizes
from steerbook.trainers.atlas.arguments import ArmArguments
from steerbook.trainers.atlas.dry_run import Composing, dense_composing, low_rank_composing
from steerbook.trainers.atlas.low_rank import LowRankComposer
from steerbook.trainers.atlas.trainer import AtlasConfig, AtlasTrainer
from steerbook.trainers.lofit import LofitConfig, LofitSFTConfig, LofitSFTTrainer
from steerbook.trainers.lofit.selection import grid, random_heads
from steerbook.trainers.memory import Launch, memory_estimate
from steerbook.trainers.tiny_lm import build_tokenizer

ROWS, TOKENS = 4, 512  # of a batch
WARM_UP = 3  # steps; the second one is the first with the optimiser's state
VECTORS, RANK = 2, 16
STREAMED_GB = 8  # larger files of streamed vectors are not made: one step of 8B would read 56 GB
SHAPES: dict[str, dict[str, Any]] = {  # Llama-3.2-1B, Llama-3.1-8B
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
           "head_dim": 64, "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
           "head_dim": 128, "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False},
    "tiny": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 32, "intermediate_size": 344, "vocab_size": 2048, "tie_word_embeddings": True},
}  # fmt: skip
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312}  # dense bf16, TFLOP/s (NVIDIA's data sheets)


def base_model(shape: str, device: str) -> Any:
    """A Llama with random weights, made where it will run."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, rope_theta=500_000.0, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32 if device == "cpu" else torch.bfloat16)


class Bench:
    """What all rows have in common: rows of random tokens, a tokenizer, and the trainer's settings."""

    def __init__(self, device: str, memory: int | None, steps: int, folder: str) -> None:
        self.device, self.memory, self.estimate = device, memory, None
        self.tokenizer = build_tokenizer([], "byte")
        self.settings: dict[str, Any] = {
            "output_dir": folder, "max_steps": WARM_UP + steps, "per_device_train_batch_size": ROWS,
            "learning_rate": 1e-6, "bf16": device != "cpu", "use_cpu": device == "cpu", "report_to": "none",
            "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "max_length": TOKENS,
            "dataset_kwargs": {"skip_prepare_dataset": True}}  # fmt: skip

    def rows(self, vocabulary: int) -> Dataset:
        """The same batch at every step."""
        ids = torch.randint(vocabulary, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
        ids *= self.settings["max_steps"]
        return Dataset.from_dict({"input_ids": ids, "labels": ids})

    def make(self, trainer: Any, config: Any, model: Any, rows: Any, **more: Any) -> Trainer:
        return trainer(model, config(**self.settings, **more), train_dataset=rows, processing_class=self.tokenizer)

    def plan(self, model: Any, checkpointing: bool = False, composing: Composing | None = None) -> None:
        """Estimate a step, and leave the row out if it does not fit."""
        launch = Launch(half=self.device != "cpu", checkpointing=checkpointing, accelerator=self.device != "cpu")
        memory = None if composing is None else composing.memory
        self.estimate = memory_estimate(model_sizes(model, TOKENS, launch), ROWS, TOKENS, launch, composition=memory)
        if self.memory is not None and self.estimate.peak > self.memory:
            needed, there = (size / 2**30 for size in (self.estimate.peak, self.memory))
            raise NotRunError(f"does not fit: {needed:.1f} GiB of {there:.1f} (estimate)")

    def lofit(self, model: Any, rows: Any, stage: str) -> Trainer:
        heads = grid(model)
        share = random_heads(heads, max(1, round(0.03 * sum(heads.values()))), 0) if stage == "offset" else None
        tuned = get_peft_model(model, LofitConfig(component=stage, heads=share, init_std=1e-3))
        self.plan(tuned)
        return self.make(LofitSFTTrainer, LofitSFTConfig, tuned, rows, l1_lambda=5e-4 if stage == "scale" else 0.0)

    def lora(self, model: Any, rows: Any) -> Trainer:
        tuned = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
        self.plan(tuned)
        return self.make(SFTTrainer, SFTConfig, tuned, rows, gradient_checkpointing=False)

    def full(self, model: Any, rows: Any, checkpointing: bool) -> Trainer:
        self.plan(model, checkpointing)
        return self.make(SFTTrainer, SFTConfig, model, rows, gradient_checkpointing=checkpointing)

    def atlas(self, model: Any, rows: Any, placement: str) -> Trainer:
        if placement == "low-rank":
            composer: Composer | LowRankComposer = LowRankComposer(model, lora_vectors(model, VECTORS, RANK))
            self.plan(composer.model, composing=low_rank_composing(composer))
        else:
            vectors = dense_vectors(model, VECTORS)
            composing = dense_composing(model, vectors, ArmArguments(placement=placement))
            self.plan(model, composing=composing)
            size = composing.beside["on disk: task vectors by block"]
            if size > STREAMED_GB * 1e9:
                raise NotRunError(f"not run: a file of {size / 1e9:.0f} GB, which a step reads twice")
            composer = Composer(model, vectors, placement=placement)
        return self.make(AtlasTrainer, AtlasConfig, composer, rows)


METHODS: dict[str, Callable[[Bench, Any, Any], Trainer]] = {
    "lofit-offset": lambda bench, model, rows: bench.lofit(model, rows, "offset"),
    "lofit-scale": lambda bench, model, rows: bench.lofit(model, rows, "scale"),
    "lora": Bench.lora,
    "atlas-low-rank": lambda bench, model, rows: bench.atlas(model, rows, "low-rank"),
    "atlas-resident": lambda bench, model, rows: bench.atlas(model, rows, "resident"),
    "atlas-streamed": lambda bench, model, rows: bench.atlas(model, rows, "stream"),
    "full": lambda bench, model, rows: bench.full(model, rows, False),
    "full-checkpointed": lambda bench, model, rows: bench.full(model, rows, True),
}


class NotRunError(Exception):
    """Why a row is left out."""


class Watch(TrainerCallback):
    """Seconds of the steps after the warm-up, and bytes: held between steps, kept by the forward pass, and the most
    in a step up to the optimiser's turn and during it."""

    def __init__(self, device: str) -> None:
        self.device, self.ends = device, []
        self.bytes = {"between_steps": 0, "after_forward": 0, "peak_backward": 0, "peak_optimiser": 0}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.device != "cpu":
            self.bytes["between_steps"] = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.device != "cpu":
            self.bytes["peak_backward"] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()
            self.bytes["peak_optimiser"] = torch.cuda.max_memory_allocated()
        self.ends.append(time.perf_counter())

    def after_forward(self, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        def computed(*args: Any, **kwargs: Any) -> Any:
            loss = compute_loss(*args, **kwargs)
            if self.device != "cpu":
                self.bytes["after_forward"] = torch.cuda.memory_allocated()
            return loss

        return computed

    @property
    def seconds(self) -> list[float]:
        return [end - start for start, end in zip(self.ends[WARM_UP - 1 :], self.ends[WARM_UP:], strict=False)]


def flops(model: nn.Module, tokens: int) -> int:
    """Operations of one step, in matrix products alone (attention's own, 1 to 3 % at 512 tokens, are left out):
    2 T for each weight forward, 2 T backward through the activations from the lowest trained layer on, and 2 T for
    each trained weight's gradient. Recomputing (checkpointing) and composing (aTLAS) count as nothing done."""

    def layer(name: str) -> int:
        found = re.search(r"\.(\d+)\.", name)
        return int(found.group(1)) if found else -1 if "embed" in name else 1_000_000

    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    lowest = min((layer(name) for name, p in model.named_parameters() if p.requires_grad), default=0)
    forward = sum(module.weight.numel() for _, module in linears)
    backward = sum(module.weight.numel() for name, module in linears if layer(name) >= lowest)
    gradients = sum(module.weight.numel() for _, module in linears if module.weight.requires_grad)
    return 2 * tokens * (forward + backward + gradients)


def measured(bench: Bench, shape: str, method: str) -> dict[str, Any]:
    """One row: the trainer made, run, and taken apart again."""
    start = time.perf_counter()
    model = base_model(shape, bench.device)
    trainer = METHODS[method](bench, model, bench.rows(model.config.vocab_size))
    watch = Watch(bench.device)
    trainer.add_callback(watch)
    trainer.remove_callback(PrinterCallback)  # it prints the log, as bars are off
    trainer.compute_loss = watch.after_forward(trainer.compute_loss)
    composer = getattr(trainer, "composer", None)
    trained = (
        [p for p in trainer.model.parameters() if p.requires_grad] if composer is None else [composer.coefficients]
    )
    made = time.perf_counter() - start
    trainer.train()
    trainer.accelerator.free_memory()
    if composer is not None:
        composer.remove()  # its hooks lie in autograd, where Python's garbage collector does not look
    return {
        "trained": sum(p.numel() for p in trained),
        "flops": flops(trainer.model, ROWS * TOKENS),
        "seconds": watch.seconds,
        "setup_seconds": made,
        "bytes": watch.bytes if bench.device != "cpu" else None,
    }


def run(bench: Bench, shape: str, method: str) -> dict[str, Any]:
    """One row, whatever happens to it."""
    row: dict[str, Any] = {"shape": shape, "method": method}
    if bench.device == "cpu" and shape != "tiny":
        return row | {"status": "not run: no accelerator"}
    if bench.device != "cpu":
        row["held_before"] = torch.cuda.memory_allocated()
    try:
        row |= {"status": "measured", **measured(bench, shape, method)}
    except NotRunError as reason:
        row |= {"status": str(reason)}
    except torch.OutOfMemoryError as error:
        row |= {"status": f"out of memory: {str(error).split('. ')[0]}"}
    if bench.estimate is not None:
        row["estimate"] = {"peak": bench.estimate.peak, **bench.estimate.kinds}
    return row


def line(row: dict[str, Any], peak: float | None) -> str:
    """A row of the table."""
    head = f"{row['shape']:<5} {row['method']:<18}"
    if row["status"] != "measured":
        return f"{head} {row['status']}"
    seconds = statistics.median(row["seconds"])
    rate = row["flops"] / seconds / 1e12
    held = (max(row["bytes"].values()) - row["held_before"]) / 2**30 if row["bytes"] else None
    expected = row["estimate"]["peak"] / 2**30
    cells = [f"{row['trained']:>14,}", f"{1000 * seconds:>9.1f}", f"{ROWS * TOKENS / seconds:>9,.0f}",
             "        -" if held is None else f"{held:>9.2f}", f"{expected:>9.2f}",
             "      -" if held is None else f"{100 * (expected / held - 1):>+6.1f}%",
             "       -" if held is None else f"{rate:>8.1f}",
             "      -" if peak is None else f"{100 * rate / peak:>6.1f}%"]  # fmt: skip
    return " ".join([head, *cells])


HEAD = "shape method                    trained   ms/step  tokens/s  peak GiB  estimate     off  TFLOP/s of peak"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["1b", "8b"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=10, help="measured ones, after the warm-up")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-gpu.json"))
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: at least one")
    quiet_libraries()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    card = torch.cuda.get_device_name() if device == "cuda" else "no accelerator"
    memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None
    peak = next((value for name, value in PEAKS.items() if name in card), None)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "card": card, "memory_bytes": memory, "peak_tflops": peak, "batch": [ROWS, TOKENS], "vectors": VECTORS,
        "rank": RANK, "warm_up": WARM_UP, "torch": torch.__version__, "transformers": transformers.__version__,
        "rows": []}  # fmt: skip
    size = "" if memory is None else f", {memory / 2**30:.1f} GiB"
    print(f"{card}{size}, torch {torch.__version__}; {ROWS} x {TOKENS} tokens; {VECTORS} task vectors; rank {RANK}")
    print(f"peak, dense bf16: {peak or '-'} TFLOP/s", HEAD, sep="\n")
    for shape in options.shapes:
        for method in options.methods:
            with tempfile.TemporaryDirectory() as folder:
                found["rows"].append(run(Bench(device, memory, options.steps, folder), shape, method))
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
            write_json(options.out, found)
            print(line(found["rows"][-1], peak), flush=True)
    print(f"All numbers: {options.out}")


if __name__ == "__main__":
    main()
