"""Build an aTLAS data set, look at it, write it down.

    python -m steerbook.data_builders.atlas --tasks maths=maths.jsonl law=owner/law --out DIR --preview 3

Flags are those of `AtlasDataArguments`, and `--out` and `--preview` (see `data_builders/command.py`).
"""

from __future__ import annotations

import sys

from ..command import run
from . import AtlasDataArguments, build


def main() -> int:
    return run("atlas", AtlasDataArguments, build)


if __name__ == "__main__":
    sys.exit(main())
