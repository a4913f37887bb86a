"""Score a saved model or PEFT adapter on rows of a file.

python -m steerbook.eval.lofit --model DIR --rows FILE [--out FILE]
"""

from __future__ import annotations

from collections.abc import Sequence

from ..command import run
from .scores import evaluate


def main(arguments: Sequence[str] | None = None) -> None:
    run("lofit", evaluate, arguments)


if __name__ == "__main__":
    main()
