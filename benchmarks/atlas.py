"""What an aTLAS step costs beside plain training and other composers, in time and in memory.

    python benchmarks/atlas.py [--rounds 9] [--out FILE.json]

Time: one process, one thread on a CPU, contenders in turn (see timing.py). Memory: each contender in a process of its
own, the peak of its resident memory less what it held before the model and the vectors were made. Losses and
coefficient gradients of all composers are compared before anything is timed. "Original style" is a composer through
`functional_call` that does what the paper's released code does: fp16 vectors, and for each tensor a sum over vectors
inside the graph (also shown with fp32 vectors, as all others have them); "stacked" has one contraction a tensor.
Two batches count: the smallest, and the first that fills the machine, found by plain training's tokens a second.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from random_vectors import dense_vectors, lora_vectors
from rich.console import Console
from rich.table import Table
from timing import measure, ratio
from torch import nn
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM

from steerbook.files import write_json
from steerbook.trainers import Composer, TaskVector
from steerbook.trainers.atlas.low_rank import LowRankComposer
from steerbook.trainers.atlas.one_pass import OnePassAdamW

N = 8
BATCHES = ((1, 32), (1, 128), (2, 128), (4, 128), (8, 128), (16, 128))  # rows x tokens
FILLED = 0.9  # the machine is full from the first batch on that reaches this share of the best tokens a second
PLAIN, TUNING = "plain forward + backward", "full fine-tuning (AdamW)"
BOUNDS = {
    ("aTLAS", PLAIN, "full"): (0.0, 1.10),
    ("original style", "aTLAS", "full"): (1.2, float("inf")),
    ("original style", "aTLAS", "small"): (1.6, float("inf")),
    ("aTLAS, LoRA vectors", TUNING, "full"): (0.0, 1.0),
}


def base_model(width: int = 192, layers: int = 8) -> LlamaForCausalLM:
    """A Llama in its usual proportions: 3.4 M parameters at width 192, 24 M at 512."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=width // 32, num_key_value_heads=width // 64, head_dim=32, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def plain(model: nn.Module, ids: torch.Tensor, tuning: bool = False) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if tuning:
            optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def composed(composer: Composer | LowRankComposer, ids: torch.Tensor, one_pass: bool = False) -> Callable[[], float]:
    if one_pass:
        assert isinstance(composer, Composer)
        optimizer: torch.optim.Optimizer = OnePassAdamW(composer, lr=1e-3)
    else:
        optimizer = torch.optim.AdamW([composer.coefficients], lr=1e-3)

    def step() -> float:
        if not one_pass:
            composer.compose()
        loss = composer.model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def functional(
    model: nn.Module, vectors: list[TaskVector], ids: torch.Tensor, stacked: bool, dtype: torch.dtype = torch.float32
) -> tuple[Callable[[], float], nn.Parameter]:
    base = {name: parameter.detach() for name, parameter in model.named_parameters()}
    entries = {name: [vector.dense(name).to(dtype) for vector in vectors] for name in base}
    stacks = {name: torch.stack(entries.pop(name)) for name in base} if stacked else {}
    coefficients = nn.Parameter(torch.zeros(len(vectors), len(base)))
    optimizer = torch.optim.AdamW([coefficients], lr=1e-3)

    def step() -> float:
        deltas = []
        for column, name in enumerate(base):
            if stacked:
                deltas.append(torch.tensordot(coefficients[:, column], stacks[name], dims=1))
            else:
                deltas.append(sum(entry * coefficients[row, column] for row, entry in enumerate(entries[name])))
        weights = {name: delta + base[name] for name, delta in zip(base, deltas, strict=True)}
        loss = functional_call(model, weights, (), {"input_ids": ids, "labels": ids}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, coefficients


def check(model: LlamaForCausalLM) -> float:
    """Largest difference of coefficient gradients between the composers, relative to the largest gradient."""
    vectors, ids = dense_vectors(model, N), torch.randint(512, (4, 16))
    values = 0.1 * torch.randn(N, len(list(model.parameters())))
    composer = Composer(copy.deepcopy(model), vectors, exclude=())
    gradients = []
    with torch.no_grad():
        composer.coefficients.copy_(values)
    composer.compose()
    composer.model(input_ids=ids, labels=ids).loss.backward()
    gradients.append(composer.coefficients.grad)
    for stacked in (False, True):
        step, coefficients = functional(copy.deepcopy(model), vectors, ids, stacked)
        with torch.no_grad():
            coefficients.copy_(values)
        seen: list[torch.Tensor] = []
        coefficients.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append(p.grad.clone()))
        step()
        gradients += seen
    return max(float((g - gradients[0]).abs().max() / gradients[0].abs().max()) for g in gradients[1:])


def resident(kind: str) -> int:
    """Bytes this process holds (VmRSS) or has held at most (VmHWM); getrusage's peak is inherited from a parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


def memory_of(contender: str, count: int, stream: str) -> None:
    """Run by this script in a process of its own: three steps, then the peak on the screen."""
    torch.set_num_threads(1)
    width, ids = 768, torch.randint(512, (1, 32))
    plain(base_model(64, 1), ids)()  # what libraries need the first time
    before = resident("VmRSS")
    model = base_model(width, 6)
    vectors = dense_vectors(model, count)
    if contender == PLAIN:
        step = plain(model, ids)
    elif contender == "aTLAS":
        step = composed(Composer(model, vectors, exclude=()), ids)
    elif contender == "aTLAS, streaming":
        step = composed(Composer(model, vectors, exclude=(), placement="stream", stream_file=stream), ids)
    else:
        half = torch.float16 if contender == "original style" else torch.float32
        step, _ = functional(model, vectors, ids, contender == "stacked", half)
    for _ in range(3):
        step()
    print(json.dumps(resident("VmHWM") - before))


def peak(contender: str, count: int, folder: str) -> int:
    command = [sys.executable, __file__, "--memory_of", contender, str(count), f"{folder}/{count}.safetensors"]
    # glibc keeps freed blocks by a rule that moves with use; given back at once, the peak is what is really held.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    for _ in range(2 if "streaming" in contender else 1):  # the first makes the file
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="at least 7")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-atlas.json"))
    parser.add_argument("--memory_of", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        return memory_of(options.memory_of[0], int(options.memory_of[1]), options.memory_of[2])
    if options.rounds < 7:
        parser.error(f"--rounds {options.rounds}: a median of fewer than 7 says little")
    torch.set_num_threads(1)
    console = Console(width=110)
    difference = check(base_model(64, 2))
    if difference > 1e-4:
        raise SystemExit(f"error: coefficient gradients differ by {difference:.1e} of the largest; nothing was timed")
    console.print(f"Loss and coefficient gradients of all composers are equal (largest difference {difference:.0e}).")

    base = base_model()
    speeds = measure({str(math.prod(shape)): plain(base, torch.randint(512, shape)) for shape in BATCHES},
                     options.rounds, 3, "cpu")  # fmt: skip
    rates = {shape: math.prod(shape) / statistics.median(speeds[str(math.prod(shape))]) for shape in BATCHES}
    full = next(shape for shape in BATCHES if rates[shape] >= FILLED * max(rates.values()))
    shapes = {"small": BATCHES[0], "full": full, "largest": BATCHES[-1]}
    listed = ", ".join(f"{math.prod(shape)}: {rate:,.0f}" for shape, rate in rates.items())
    console.print(f"Plain training, tokens in the batch: tokens a second: {listed}.", highlight=False)
    console.print(f"The machine is full ({100 * FILLED:.0f} % of the best) from {math.prod(full)} tokens on.")

    seconds: dict[str, dict[str, list[float]]] = {}
    vectors = dense_vectors(base, N)
    for size, shape in shapes.items():
        ids = torch.randint(512, shape)
        contenders = {
            PLAIN: plain(copy.deepcopy(base), ids),
            TUNING: plain(copy.deepcopy(base), ids, tuning=True),
            "aTLAS": composed(Composer(copy.deepcopy(base), vectors, exclude=()), ids),
            "aTLAS, one pass": composed(Composer(copy.deepcopy(base), vectors, exclude=()), ids, one_pass=True),
            "aTLAS, LoRA vectors": composed(LowRankComposer(copy.deepcopy(base), lora_vectors(base, N)), ids),
            "original style": functional(copy.deepcopy(base), vectors, ids, False, torch.float16)[0],
            "original style, fp32": functional(copy.deepcopy(base), vectors, ids, False)[0],
            "stacked": functional(copy.deepcopy(base), vectors, ids, stacked=True)[0],
        }
        seconds[size] = measure(contenders, options.rounds, max(1, 512 // math.prod(shape)), "cpu")
    table = Table(title=f"Llama, {sum(p.numel() for p in base.parameters()):,} parameters, {N} vectors, one thread")
    table.add_column("contender")
    for size, shape in shapes.items():
        table.add_column(f"ms a step, {math.prod(shape)} tokens ({size})", justify="right")
        table.add_column("beside plain", justify="right")
    for name in seconds["full"]:
        cells = []
        for size in seconds:
            cells.append(f"{1000 * statistics.median(seconds[size][name]):.1f}")
            cells.append(f"{ratio(seconds[size], name, PLAIN):.2f}")
        table.add_row(name, *cells)
    console.print(table)

    with tempfile.TemporaryDirectory() as folder:
        names = (PLAIN, "aTLAS", "aTLAS, streaming", "original style", "original style, fp32",
                 "stacked")  # fmt: skip
        peaks = {name: peak(name, N, folder) for name in names}
        streamed = {count: peak("aTLAS, streaming", count, folder) for count in (4, 16)}
    weights = 4 * sum(p.numel() for p in base_model(768, 6).parameters())
    table = Table(title=f"Peak memory, Llama with {weights / 1e6:.0f} MB of fp32 weights, {N} vectors, 32 tokens")
    for column in ("contender", "MB", "in weights", "without the vectors"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name, value in peaks.items():
        held = 0 if "plain" in name or "streaming" in name else N * weights // (2 if name == "original style" else 1)
        table.add_row(name, f"{value / 1e6:.0f}", f"{value / weights:.1f}", f"{(value - held) / weights:.1f}")
    console.print(table)

    checks = [
        (f"{a} / {b}, {size} batch", ratio(seconds[size], a, b), *bound) for (a, b, size), bound in BOUNDS.items()
    ]
    checks += [
        ("peak: aTLAS, streaming / original style", peaks["aTLAS, streaming"] / peaks["original style"], 0.0, 0.5),
        ("peak: aTLAS, resident / original style, fp32", peaks["aTLAS"] / peaks["original style, fp32"], 0.0, 0.5),
        ("peak: aTLAS, streaming, 16 vectors / 4 vectors", streamed[16] / streamed[4], 0.0, 1.1),
    ]
    for name, value, low, high in checks:
        within = "within" if low <= value <= high else "[red]outside[/]"
        console.print(f"{name:<62} {value:.3f}  {within} [{low:.2f}, {high:.2f}]", highlight=False)
    write = {name: {"value": value, "low": low, "high": None if high == float("inf") else high}
             for name, value, low, high in checks}  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found = {"gradient_difference": difference, "tokens": {size: math.prod(shape) for size, shape in shapes.items()}}
    found |= {"seconds": seconds, "tokens_a_second": {math.prod(shape): rate for shape, rate in rates.items()}}
    found |= {"peak_bytes": peaks, "peak_bytes_streaming": streamed, "ratios": write, "torch": torch.__version__}
    write_json(options.out, found)
    console.print(f"All numbers: {options.out}")


if __name__ == "__main__":
    main()
