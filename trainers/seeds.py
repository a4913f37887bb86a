"""Run the seeds of an experiment side by side on the CPU, with one progress bar."""

from __future__ import annotations

import gc
import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from queue import Empty
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..files import is_main_process
from .processes import check_versions, of_main

Report = Callable[[str], None]  # what has just been finished; counted by the bar
Worker = Callable[[list[str], int, Report], None]  # (command line, seed, report)


def run_seeds(
    worker: Worker,
    argv: list[str],
    seeds: Sequence[int],
    steps: int | None | Sequence[int],
    preload: list[str],
    parallel: bool,
    name: Callable[[int], str] = "seed {}".format,
) -> None:
    """Call `worker(argv, seed, report)` for every seed; `steps` reports are expected from each, or of each its own
    number (None: unknown).

    Args:
        worker: a function of a module's top level (it is imported again in the other processes). It writes its
            results to files.
        preload: modules that are imported once for all processes.
        parallel: one process a seed, each with one thread; else one after the other in this process.
        name: what a seed is called beside the bar.

    Raises:
        What a worker raises, from whichever process (the others are stopped), with its traceback as a note.
        RuntimeError: a process was killed.
        ValueError: the processes of a job have packages of different versions.
    """
    check_versions()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=not is_main_process()) as bar:
        total = steps * len(seeds) if isinstance(steps, int) else None if steps is None else sum(steps)
        task = bar.add_task("", total=total)

        def report(seed: int, text: str) -> None:
            if is_main_process():
                bar.console.print(f"  {name(seed)}: {text}", highlight=False)
            bar.advance(task)

        if not parallel or len(seeds) == 1:
            for seed in seeds:
                worker(argv, seed, lambda text, seed=seed: report(seed, text))  # type: ignore[misc]
            of_main(lambda: None)  # all processes wait until the first one has written its files
            return

        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(preload)
        queue = context.Queue()
        processes = [context.Process(target=_run, args=(worker, argv, seed, queue), daemon=True) for seed in seeds]
        for process in processes:
            process.start()
        try:
            running = set(range(len(seeds)))
            while running:
                # Looked at before the queue: a process may report that it is done and end while we wait in vain.
                ended = [index for index in running if not processes[index].is_alive()]
                try:
                    number, kind, content = queue.get(timeout=1)
                except Empty:
                    for index in ended:
                        raise RuntimeError(
                            f"the process of seed {seeds[index]} ended with exit code {processes[index].exitcode}"
                        ) from None
                    continue
                index = list(seeds).index(number)
                if kind == "report":
                    report(number, content)
                elif kind == "done":
                    running.discard(index)
                else:
                    raise content
            for process in processes:
                process.join()
        finally:
            for process in processes:
                process.kill()  # only those that still run after an error or Ctrl-C
                process.join()
            queue.close()


def _run(worker: Worker, argv: list[str], seed: int, queue: Any) -> None:
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # else every Trainer's clean-up walks all that is imported: 0.5 of 3 s a fit
    try:
        worker(argv, seed, lambda text: queue.put((seed, "report", text)))
        queue.put((seed, "done", ""))
    except KeyboardInterrupt:
        pass  # the parent got it too, and records it
    except Exception as error:
        error.add_note(f"in the process of seed {seed}:\n{traceback.format_exc()}")
        queue.put((seed, "error", error))
