"""Build decisions and reports, look at them, write them down.

    python -m steerbook.data_builders.self_interpretability --scenarios FILE --out DIR --preview 2

Flags are those of `PreferenceDataArguments`, and `--out` and `--preview` (see `data_builders/command.py`).
"""

from __future__ import annotations

import sys

from ..command import run
from . import PreferenceDataArguments, build


def main() -> int:
    return run("self_interpretability", PreferenceDataArguments, build)


if __name__ == "__main__":
    sys.exit(main())
