"""Score a saved model or PEFT adapter on rows of text that the data builder wrote.

python -m steerbook.eval.task_hinting --model DIR --rows FILE [--out FILE]
"""

from __future__ import annotations

from collections.abc import Sequence

from ..command import run
from .text import evaluate


def main(arguments: Sequence[str] | None = None) -> None:
    run("task_hinting", evaluate, arguments)


if __name__ == "__main__":
    main()
