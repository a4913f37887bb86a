"""Build agent trajectories, look at them, write them down.

    python -m steerbook.data_builders.ping --out DIR --preview 2

Flags are those of `PingDataArguments`, and `--out` and `--preview` (see `data_builders/command.py`).
"""

from __future__ import annotations

import sys

from ..command import run
from . import PingDataArguments, build


def main() -> int:
    return run("ping", PingDataArguments, build)


if __name__ == "__main__":
    sys.exit(main())
