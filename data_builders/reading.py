"""Reading rows from a local file or the Hub.

csv, json and jsonl are read with the standard library: `datasets` would cache a copy in the user's home and lose the
row numbers that an error has to name.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENDINGS = (".csv", ".json", ".jsonl", ".parquet", ".arrow", ".txt")


class RowError(ValueError):
    """Rows that cannot be used. The message lists the first five problems and counts the rest."""


@dataclass(frozen=True)
class Row:
    """One source row and where it came from; `number` counts data rows from 1 (jsonl: the line)."""

    values: dict[str, Any]
    file: str
    split: str
    number: int

    def place(self) -> str:
        return f"{self.file}, split {self.split}, row {self.number}"


def read_rows(path: str | Path, split: str = "all") -> list[Row]:
    """Every row of one local file; the ending decides the format (`.txt`: paragraphs, as a `text` column).

    Raises FileNotFoundError with what is in the folder, ValueError for an unknown ending, RowError for a broken file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: {folder_contents(path if path.is_dir() else path.parent)}")
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"cannot read {path}: the ending {path.suffix!r} is not one of {', '.join(ENDINGS)}")
    if path.suffix.lower() in (".parquet", ".arrow"):
        numbered: Iterable[tuple[int, Any]] = enumerate(_arrow_rows(path), start=1)
    else:
        try:
            numbered = list(_text_rows(path))
        except UnicodeDecodeError as error:
            raise RowError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    rows = []
    for number, values in numbered:
        if not isinstance(values, dict):
            raise RowError(
                f"{path}, split {split}, row {number}: found {show(values)}, expected an object with columns"
            )
        rows.append(Row(values, str(path), split, number))
    return rows


def folder_contents(folder: Path) -> str:
    """One line for error messages: what a folder holds, or that it does not exist."""
    if not folder.is_dir():
        return f"there is no folder {folder}"
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"the folder {folder} holds {', '.join(names[:12]) or 'nothing'}{more}"


def _text_rows(path: Path) -> Iterator[tuple[int, Any]]:
    ending = path.suffix.lower()
    if ending == ".csv":
        yield from _csv_rows(path)
        return
    text = path.read_text(encoding="utf-8-sig")
    if ending == ".txt":
        paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
        yield from enumerate(({"text": part} for part in paragraphs if part), start=1)
    elif ending == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):  # not splitlines(): U+2028 may stand in a string
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise RowError(
                        f"{path}, line {number}: broken JSON ({error.msg}, column {error.colno})"
                    ) from error
    else:
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            hint = "; one object per line is called .jsonl" if error.msg == "Extra data" else ""
            raise RowError(f"{path}, line {error.lineno}: broken JSON ({error.msg}){hint}") from error
        if not isinstance(content, list):
            raise RowError(f"{path}: found {show(content)}, expected a list of objects")
        yield from enumerate(content, start=1)


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            header = next(reader, [])
            if not header or len(set(header)) != len(header):
                raise RowError(f"{path}: found the header {header}, expected column names, each once")
            filled = (cells for cells in reader if cells)  # a blank line is no row
            for number, cells in enumerate(filled, start=1):
                if len(cells) != len(header):
                    raise RowError(
                        f"{path}, row {number} (ends on line {reader.line_num}): found {len(cells)} cells, expected "
                        f"{len(header)} ({', '.join(header)})"
                    )
                yield number, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise RowError(f"{path}, line {reader.line_num}: broken csv ({error})") from error


def _arrow_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    from datasets import Dataset
    from pyarrow import parquet

    try:
        if path.suffix.lower() == ".parquet":  # Dataset.from_parquet would write a cache
            return parquet.read_table(path).to_pylist()
        return Dataset.from_file(str(path)).to_list()
    except pyarrow.ArrowInvalid as error:
        raise RowError(f"{path}: not a readable {path.suffix[1:]} file ({error})") from error


def read_hub(dataset_id: str, revision: str | None = None) -> dict[str, list[Row]]:
    """Every split of a Hub data set (`owner/name` or `owner/name:config`) or of a local folder that `datasets` reads.

    Raises OSError if it cannot be found or reached, ValueError if it cannot be read.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    local = Path(dataset_id).is_dir()
    if local and revision is not None:
        raise ValueError(
            f"{dataset_id!r} is a local folder, which has no revision {revision!r}: drop --dataset_revision"
        )
    name, _, config = (dataset_id, "", "") if local else dataset_id.partition(":")
    message = f"the data set {dataset_id!r} (revision {revision or 'newest'}) could not be loaded"
    # A local folder is read again each time, so its cache is thrown away; a download is worth keeping.
    with tempfile.TemporaryDirectory() as scratch:
        try:
            loaded = load_dataset(name, config or None, revision=revision, cache_dir=scratch if local else None)
            content = {split: dataset.to_list() for split, dataset in loaded.items()}
        except OSError as error:
            raise OSError(f"{message}: {error}. Local files go into --data_files") from error
        except (DatasetsError, ValueError) as error:
            raise ValueError(f"{message}: {error}") from error
    source = dataset_id if revision is None else f"{dataset_id}@{revision}"
    return {split: [Row(r, source, split, n) for n, r in enumerate(rows, 1)] for split, rows in content.items()}


def show(value: object) -> str:
    """A value and its type for an error message, at most 60 characters of it."""
    if value is None:
        return "nothing (None)"
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return f"{text[:60]}{'...' * (len(text) > 60)} ({type(value).__name__})"
