"""Build a LoFiT data set, look at it, write it down.

    python -m steerbook.data_builders.lofit --dataset truthfulqa --data_files FOLDER --out DIR --preview 3

Flags are those of `LofitDataArguments`, and `--out` and `--preview` (see `data_builders/command.py`).
"""

from __future__ import annotations

import sys

from ..command import run
from . import LofitDataArguments, build


def main() -> int:
    return run("lofit", LofitDataArguments, build)


if __name__ == "__main__":
    sys.exit(main())
