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
    """Bytes: of the GPU since the process started, without one of the process itself (weights, libraries and all)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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
