"""The command every data builder has: build a data set, look at it, write it down.

    python -m steerbook.data_builders.ROW [flags of its arguments] --out DIR --preview 3

DIR receives one jsonl file a split, and `manifest.json` last: its presence means that the folder is complete. The same
command again changes nothing; different content is never overwritten.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import replacing
from .rows import fingerprint

if TYPE_CHECKING:
    from datasets import DatasetDict


@dataclass
class OutputArguments:
    """What to do with the data set."""

    out: str | None = field(default=None, metadata={"help": "Folder to write one jsonl a split and a manifest into."})
    preview: int = field(default=0, metadata={"help": "Print this many rows of every split."})


def write(data: DatasetDict, args: Any, out: Path) -> bool:
    """Write every split, then the manifest with `args` (a dataclass). True if anything was written, False if the
    folder was complete already.

    Nothing is written if a file of the same name holds something else: FileExistsError names it, and what differs
    between the arguments then and now.
    """
    texts = {f"{s}.jsonl": "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows) for s, rows in data.items()}
    manifest = {
        "schema": 1,
        "arguments": asdict(args),
        "fingerprint": fingerprint(data),
        "splits": {
            split: {
                "file": f"{split}.jsonl",
                "rows": len(rows),
                "columns": rows.column_names,
                "sha256": hashlib.sha256(texts[f"{split}.jsonl"].encode()).hexdigest(),
            }
            for split, rows in data.items()
        },
    }
    texts["manifest.json"] = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    existing = {name for name in texts if (out / name).exists()}
    # A build is a pure function, so what an interrupted one left behind is equal and may stay.
    different = sorted(name for name in existing if (out / name).read_bytes() != texts[name].encode())
    if different:
        raise FileExistsError(
            f"{out} holds other data ({', '.join(different)}){_differences(out, asdict(args))}; choose another --out"
        )
    for name, text in texts.items():  # the manifest is the last
        if name not in existing:
            with replacing(out / name) as file:
                file.write(text.encode())
    return len(existing) < len(texts)


def _differences(out: Path, now: dict[str, object]) -> str:
    if not (out / "manifest.json").exists():
        return ""
    try:
        before = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["arguments"]
    except (ValueError, KeyError, TypeError):
        return ", and its manifest.json was written by something else"
    changed = [
        f"{key} was {before.get(key)!r}, is {value!r}" for key, value in now.items() if before.get(key) != value
    ]
    return f": {'; '.join(changed)}" if changed else ", built from the same arguments: the source files have changed"


def show_rows(data: DatasetDict, count: int) -> None:
    """Print the first `count` rows of every split; texts as Python literals, so that spaces and newlines show."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for split, rows in data.items():
        for number, row in enumerate(rows.select(range(min(count, len(rows))))):
            table = Table(title=f"{split}, row {number + 1} of {len(rows)}", show_header=False, title_justify="left")
            for column, value in row.items():
                table.add_row(column, Text(repr(value)))  # Text: brackets in a story are no rich markup
            console.print(table)


def run(row: str, arguments: type, build: Callable[[Any], DatasetDict]) -> int:
    """Parse `arguments` (a dataclass) and the output flags, build, write, show; the exit status.

    ValueError and OSError of `build` and of writing end on stderr, with status 2.
    """
    from transformers import HfArgumentParser

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    kinds: Any = (arguments, OutputArguments)  # its annotation (a NewType over Any) rejects every dataclass
    parser = HfArgumentParser(kinds, prog=f"python -m steerbook.data_builders.{row}")
    try:
        args, output, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
        if unknown:
            parser.error(f"unknown arguments: {' '.join(unknown)}")
        data = build(args)
        if output.out is not None:
            written = write(data, args, Path(output.out))
            print(f"{output.out}: {'written' if written else 'already complete, nothing changed'}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show_rows(data, output.preview)
    print(", ".join(f"{split} {len(rows)}" for split, rows in data.items()), f"(fingerprint {fingerprint(data)[:12]})")
    return 0
