"""Errors as a user wants them: one line that says what is wrong and what to do, without a traceback."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def clear_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions of these kinds inside the block into `error: ...` and exit status 1.

    For the parts of a program where they mean wrong input or a full disk (arguments, data, files). With
    `STEERBOOK_DEBUG` in the environment the exception goes through, with its traceback.
    """
    try:
        yield
    except kinds as error:
        if os.environ.get("STEERBOOK_DEBUG"):
            raise
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt as stop:
        raise SystemExit("interrupted; the same command continues the run") from stop


def quiet_libraries() -> None:
    """Switch off the progress bars and notices of libraries where a bar of ours stands for the whole."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # transformers 5 uses its own deprecated names inside.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def run_main(main: Callable[[list[str]], None]) -> None:
    """Run a recipe with the command line, and take down the job's process group at its end, if it has one: else a
    thread of gloo may outlive the interpreter, which then aborts."""
    try:
        main(sys.argv[1:])
    finally:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
