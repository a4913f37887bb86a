"""What a LoFiT step costs beside full fine-tuning and LoRA, and what a merged model costs beside its base.

    python benchmarks/lofit.py [--rounds 11] [--out FILE.json]

One process, one thread on a CPU. The contenders take turns within a round, so that a slow moment hits all of them; a
ratio is the median over rounds of the ratios within a round. Before anything is timed, LoFiT's gradients are compared
with those of an independent implementation (plain hooks) on the same model and batch.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from timing import measure, ratio
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from steerbook.files import write_json
from steerbook.trainers.lofit import LofitConfig, LofitLayer

TARGETS = {  # (contender, against): upper bound of the ratio
    ("LoFiT, all layers", "full fine-tuning"): 0.72,
    ("LoFiT, top quarter", "full fine-tuning"): 0.50,
    ("LoFiT, all layers", "LoRA r=8, all linear"): 0.80,
}
MERGED = (0.98, 1.02)


def base_model(device: str) -> LlamaForCausalLM:
    """A Llama of 3.6 M parameters in its usual proportions, so that matrix products dominate as they do at scale."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=192, intermediate_size=512, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=3, head_dim=32, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device)


def with_heads(base: LlamaForCausalLM, layers: range, heads: int) -> nn.Module:
    chosen = [(layer, head) for layer in layers for head in range(heads)]
    return get_peft_model(copy.deepcopy(base), LofitConfig(heads=chosen))


def check_gradients(base: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """Largest difference, relative to the largest gradient, to offsets added by plain hooks on the projections."""
    tuned = with_heads(base, range(base.config.num_hidden_layers), base.config.num_attention_heads)
    layers = [module for module in tuned.modules() if isinstance(module, LofitLayer)]
    tuned(input_ids=ids, labels=ids).loss.backward()
    model = copy.deepcopy(base).requires_grad_(False)
    offsets = []
    for block, layer in zip(model.model.layers, layers, strict=True):
        offset = layer.lofit_offset["default"].detach().reshape(-1).clone().requires_grad_()
        block.self_attn.o_proj.register_forward_pre_hook(lambda _, args, offset=offset: (args[0] + offset,))
        offsets.append(offset)
    model(input_ids=ids, labels=ids).loss.backward()
    pairs = [
        (o.grad, layer.lofit_offset["default"].grad.reshape(-1)) for o, layer in zip(offsets, layers, strict=True)
    ]
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)


def training_step(model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def inference(model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            model(input_ids=ids)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11, help="at least 7")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-lofit.json"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.rounds < 7:
        parser.error(f"--rounds {options.rounds}: a median of fewer than 7 says little")
    torch.set_num_threads(1)
    base = base_model(options.device).eval()
    layers, heads = base.config.num_hidden_layers, base.config.num_attention_heads
    # The paper's batch of 8; a question with its answer takes some 60 tokens.
    ids = torch.randint(base.config.vocab_size, (8, 64), device=options.device)
    difference = check_gradients(base, ids)
    if difference > 1e-5:
        raise SystemExit(f"error: gradients differ by {difference:.1e} of the largest; nothing was timed")

    lora = LoraConfig(r=8, target_modules="all-linear")
    training = {
        "full fine-tuning": copy.deepcopy(base),
        "LoFiT, all layers": with_heads(base, range(layers), heads),
        "LoFiT, top quarter": with_heads(base, range(layers - layers // 4, layers), heads),
        "LoRA r=8, all linear": get_peft_model(copy.deepcopy(base), lora),
    }
    seconds = measure(
        {name: training_step(model, ids) for name, model in training.items()}, options.rounds, 2, options.device
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about saving the merged model, which nobody does here
        merged = with_heads(base, range(layers), heads).merge_and_unload()
    frozen = copy.deepcopy(base).requires_grad_(False)
    speed = measure(
        {"base": inference(frozen, ids), "merged": inference(merged, ids)}, 3 * options.rounds, 4, options.device
    )

    checks = [
        (f"{name} / {against}", ratio(seconds, name, against), 0.0, high) for (name, against), high in TARGETS.items()
    ]
    checks.append(("merged / base, inference", ratio(speed, "merged", "base"), *MERGED))
    table = Table(title=f"Llama, {sum(p.numel() for p in base.parameters()):,} parameters, 8 x 64 tokens, one thread")
    for column in ("contender", "trained parameters", "ms a step"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name, model in training.items():
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        table.add_row(name, f"{trained:,}", f"{1000 * statistics.median(seconds[name]):.1f}")
    for name in speed:
        table.add_row(f"{name}, inference", "", f"{1000 * statistics.median(speed[name]):.1f}")
    console = Console()
    console.print(f"Gradients equal those of plain hooks (largest difference {difference:.0e} of the largest).")
    console.print(table)
    for name, value, low, high in checks:
        within = "within" if low <= value <= high else "[red]outside[/]"
        console.print(f"{name:<50} {value:.3f}  {within} [{low:.2f}, {high:.2f}]", highlight=False)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        options.out,
        {
            "gradient_difference": difference,
            "seconds": {**seconds, **{f"{name}, inference": values for name, values in speed.items()}},
            "ratios": {name: {"value": value, "low": low, "high": high} for name, value, low, high in checks},
            "torch": torch.__version__,
        },
    )
    console.print(f"All numbers: {options.out}")


if __name__ == "__main__":
    main()
