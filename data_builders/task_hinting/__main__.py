"""Build the tasks as text, look at them, write them down.

    python -m steerbook.data_builders.task_hinting --main addition --hints no_carry carry --out DIR --preview 3

Flags are those of `HintingDataArguments`, and `--out` and `--preview` (see `data_builders/command.py`).
"""

from __future__ import annotations

import sys

from ..command import run
from . import HintingDataArguments, build


def main() -> int:
    return run("task_hinting", HintingDataArguments, build)


if __name__ == "__main__":
    sys.exit(main())
