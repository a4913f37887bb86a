"""What takes minutes to build and never changes is built once, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock


def build_once(kind: str, settings: Any, build: Callable[[Path], None], cache_dir: str | Path | None = None) -> Path:
    """The folder that `build(folder)` fills, made once for these settings and then taken from the cache.

    An interrupted build leaves nothing behind, and of several processes that ask at once one builds while the others
    wait.

    Args:
        settings: everything that determines the content, as JSON values.
        cache_dir: default `$STEERBOOK_CACHE`, else `~/.cache/steerbook`.

    Raises:
        OSError: the cache cannot be written.
    """
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    cache = Path(cache_dir or os.environ.get("STEERBOOK_CACHE") or Path.home() / ".cache" / "steerbook")
    folder, partial = cache / f"{kind}-{key}", cache / f".{kind}-{key}.partial"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{kind}-{key}.lock"):
        if folder.is_dir():  # another process built it while this one waited
            return folder
        shutil.rmtree(partial, ignore_errors=True)  # of a build that was killed
        try:
            build(partial)
            os.replace(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return folder
