"""What a run ran on: versions, device, processes, source revision. No host or user names, no paths."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

STATUS = Path("/proc/self/status")
PACKAGES = ("steerbook", "torch", "transformers", "peft", "trl", "accelerate", "datasets")


def environment() -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    return {
        "versions": versions,
        "device": torch.cuda.get_device_name()
        if cuda
        else f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)",
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "git": git_revision(),
    }


def peak_memory() -> int:
    """Bytes held at most since the last call: of the GPU, without one of the process (libraries and all). Where the
    system cannot start anew (neither Linux nor a GPU), since the start."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    if not STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    STATUS.with_name("clear_refs").write_text("5")  # proc(5): sets the peak to what is held
    return 1024 * int(line.split()[1])


def git_revision() -> str | None:
    """The commit of this source, with ``-dirty`` where files were changed; None outside a repository that holds it."""
    here = Path(__file__).resolve()
    try:
        # Installed under a virtual environment, the file may lie inside the repository of somebody else.
        for command in (
            ["ls-files", "--error-unmatch", here.name],
            ["describe", "--always", "--dirty", "--abbrev=40"],
        ):
            answer = subprocess.run(["git", *command], cwd=here.parent, capture_output=True, text=True, timeout=10)
            if answer.returncode:
                return None
    except (OSError, subprocess.TimeoutExpired):  # no git
        return None
    return answer.stdout.strip()
