"""Model folders that appear whole and checked, or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# fp32 differs by the order of the additions; bf16 also by rounding W and what was added to it once more.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def refuse_existing(out_dir: str | Path) -> Path:
    """The path; FileExistsError if there is something already."""
    if Path(out_dir).exists():
        raise FileExistsError(f"{out_dir} exists; an export never overwrites, pass another folder")
    return Path(out_dir)


@contextmanager
def whole_folder(out_dir: str | Path) -> Iterator[Path]:
    """A folder to fill that takes the name `out_dir` at the end, or is removed if anything fails."""
    out_dir = refuse_existing(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out_dir.parent, prefix=f".{out_dir.name}."))
    try:
        yield scratch
        scratch.chmod(0o755)
        scratch.rename(out_dir)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def probe_logits(model: Any) -> Tensor:
    """A language model's logits on two fixed rows of tokens, in fp32 on the CPU."""
    size = model.config.get_text_config().vocab_size
    probe = torch.randint(size, (2, 16), generator=torch.Generator().manual_seed(0))
    return model(input_ids=probe.to(next(model.parameters()).device)).logits.float().cpu()


def check_logits(reloaded: Any, expected: Tensor) -> None:
    """RuntimeError if a reloaded model's `probe_logits` are not, within its type's precision, the expected ones."""
    difference = (probe_logits(reloaded) - expected).abs().max().item()
    allowed = TOLERANCE[reloaded.dtype] * max(1.0, expected.abs().max().item())
    if not difference <= allowed:
        raise RuntimeError(
            f"the exported checkpoint's logits differ by {difference:.2e} (allowed {allowed:.2e}); it was removed"
        )
