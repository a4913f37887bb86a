"""The run folder: ``results.json``, ``samples.jsonl``, figures and a model card, complete at every moment.

    with RunFolder(path, recipe="lofit", arguments={"dataset": "myths"}, toy=True) as run:
        if not run.finished:
            run.data("3f2a...", {"train": 72})
            run.update(metrics={"before": {...}, "after": {...}})
            run.samples(samples)

Leaving the block records ``finished``, ``interrupted`` or ``failed`` with the error. Files are replaced as a whole, by
rank 0 only. ``eval/model_card.py`` writes the card.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from rich.console import Console
from rich.table import Table

from ..files import anonymous, is_main_process, replacing, to_json, without_folders, write_json
from .environment import environment
from .model_card import model_card
from .statistics import Metric

SCHEMA = 1
SECTIONS = ("base_model", "adapter", "model", "prefix", "trainable_parameters", "metrics", "claims", "cost")
SECRETS = frozenset({"token", "hub_token", "push_to_hub_token", "api_key", "password"})


class RunFolder:
    """One run of one recipe in one folder. A context manager; see the module's text.

    ``arguments``: what defines the run, as flags; those equal to ``defaults`` are left out of the report, secrets and
    the folders of absolute paths too. Opening raises FileExistsError for a folder of a run with other arguments
    (listing them) or with files of no run at all, and ValueError for a ``results.json`` that cannot be read.
    The same arguments continue an unfinished run with the results it has; a finished one is only read (``finished``).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        recipe: str,
        arguments: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        toy: bool = False,
    ) -> None:
        self.path = Path(path)
        known = defaults or {}
        different = {key: value for key, value in arguments.items() if key not in known or known[key] != value}
        self.results: dict[str, Any] = {
            "schema": SCHEMA,
            "recipe": recipe,
            "status": "running",
            "toy": toy,
            "arguments": anonymous(to_json({k: v for k, v in different.items() if k not in SECRETS}, "arguments")),
        }
        earlier = self._earlier()
        if earlier is not None and earlier["status"] == "failed" and not any(self.path.rglob("measured.json")):
            earlier = None  # it failed before anything was measured; nothing is lost by other arguments
        if earlier is not None:
            _compare(self.path, earlier, self.results)
            self.results = earlier
        self.finished = self.results["status"] == "finished"

    def __enter__(self) -> Self:
        if not self.finished:
            self.results.pop("error", None)
            self.results |= {"status": "running", "environment": environment()}
            self.path.mkdir(parents=True, exist_ok=True)
            self._write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        if self.finished:
            return False
        if error is None:
            self.results["status"] = "finished"
            self._write()
            self.finished = True
            return False
        interrupted = isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and not error.code)
        self.results["status"] = "interrupted" if interrupted else "failed"
        self.results["error"] = without_folders(f"{type(error).__name__}: {error}")
        try:
            self._write()
        except OSError as second:  # must not hide what went wrong first
            print(f"could not record the status {self.results['status']!r}: {second}", file=sys.stderr)
        return False

    def data(self, fingerprint: str, counts: Mapping[str, int]) -> None:
        """Record what the run is on; of a finished one, compare. FileExistsError if its results are for other data."""
        data = to_json({"fingerprint": fingerprint, "counts": counts}, "data")
        earlier = self.results.setdefault("data", data)
        if earlier != data:
            raise FileExistsError(
                f"{self.path} holds results for other data ({earlier['fingerprint']}, {earlier['counts']}; now "
                f"{fingerprint}, {dict(counts)}); choose another folder"
            )
        if not self.finished:
            self._write()

    def update(self, **sections: Any) -> None:
        """Set sections of ``results.json`` (``SECTIONS``); a mapping is merged, key by key, into what is there.

        ``base_model``: {"name", "revision", "folder"}, the folder (of a base that is not on the Hub) and ``adapter``
        relative to the run's folder; ``model``: {"folder" (relative), "module", "function"}, what loads it;
        ``prefix``: a file of PING's; and
        ``claims``: a list of {"claim": text, "supported": bool, "detail": text}.
        Raises ValueError, naming the key, for NaN or infinity.
        """
        self._check_open()
        for name, value in sections.items():
            if name not in SECTIONS:
                raise ValueError(f"results.json has no section {name!r}; known: {', '.join(SECTIONS)}")
            value = to_json(value, name)
            value = anonymous(value) if name in ("base_model", "adapter") else value
            old = self.results.get(name)
            self.results[name] = old | value if isinstance(old, dict) and isinstance(value, dict) else value
        self._write()

    def samples(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Replace ``samples.jsonl``."""
        self._check_open()
        with replacing(self.path / "samples.jsonl") as file:
            for number, sample in enumerate(samples):
                line = to_json(sample, f"sample {number}")
                file.write((json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode())

    def figure(self, name: str) -> Path:
        """Where the figure ``name`` goes; the folder exists afterwards."""
        self._check_open()
        (self.path / "figures").mkdir(parents=True, exist_ok=True)
        return self.path / "figures" / f"{name}.png"

    def _check_open(self) -> None:
        if self.finished:
            raise RuntimeError(f"{self.path} holds a finished run, which is never changed; choose another folder")

    def _write(self) -> None:
        write_json(self.path / "results.json", self.results)
        figures = sorted(file.name for file in (self.path / "figures").glob("*.png"))
        with replacing(self.path / "README.md") as file:
            file.write(model_card(self.results, figures).encode())

    def _earlier(self) -> dict[str, Any] | None:
        file = self.path / "results.json"
        if not file.exists():
            # Names with a dot are leftovers of an interrupted write.
            others = sorted(p.name for p in self.path.iterdir() if p.name[0] != ".") if self.path.is_dir() else []
            if others and is_main_process():  # other ranks may look while rank 0 is writing
                raise FileExistsError(
                    f"{self.path} is not empty and holds no results.json (it has {', '.join(others[:5])}); "
                    "choose another folder"
                )
            return None
        try:
            earlier = json.loads(file.read_text(encoding="utf-8"))
            if earlier["schema"] != SCHEMA:
                raise ValueError(f"schema {earlier['schema']!r}, this version writes {SCHEMA}")
            return {**earlier, "status": earlier["status"], "recipe": earlier["recipe"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is not a readable results.json ({error}); move the folder or choose another"
            ) from error


def _compare(path: Path, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    pairs = {"recipe": (earlier["recipe"], now["recipe"]), "toy": (earlier.get("toy"), now["toy"])}
    old, new = earlier.get("arguments", {}), now["arguments"]
    missing = "(default)"
    pairs |= {key: (old.get(key, missing), new.get(key, missing)) for key in sorted({*old, *new})}
    lines = [f"  {key}: {before!r} then, {after!r} now" for key, (before, after) in pairs.items() if before != after]
    if lines:
        raise FileExistsError(
            f"{path} holds a run ({earlier['status']}) with other arguments; choose another folder or give the same:\n"
            + "\n".join(lines)
        )


def format_interval(metric: Metric, *, scale: float = 1.0, digits: int = 3) -> str:
    """``0.876 [0.801, 0.923]``; ``scale=100, digits=1`` for per cent."""
    value = f"{metric['value'] * scale:.{digits}f}"
    if metric["low"] is None or metric["high"] is None:
        return value
    return f"{value} [{metric['low'] * scale:.{digits}f}, {metric['high'] * scale:.{digits}f}]"


def wide_console() -> Console:
    """The terminal; a file or pipe, which has no width to fold to, gets 200 columns."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def results_table(rows: Sequence[Mapping[str, str]], columns: Sequence[str], title: str) -> None:
    """Print a table, on rank 0; the first column is text, the others numbers. Missing cells stay empty."""
    if not is_main_process():
        return
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    console = wide_console()
    console.print(title, style="bold", highlight=False)
    console.print(table)
