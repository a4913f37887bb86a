"""Reading and checking rows: every format, every kind of bad input, and what the error says."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from steerbook.data_builders.rows import Row, RowChecker, RowError, fingerprint, read_hub, read_rows

ROWS = [{"id": "a", "text": "one, two"}, {"id": "b", "text": "drei\nvier \u201cfünf\u201d\u2028"}]


def written(folder: Path, ending: str) -> Path:
    path = folder / f"rows{ending}"
    if ending == ".csv":
        path.write_text('\ufeffid,text\na,"one, two"\nb,"drei\nvier \u201cfünf\u201d\u2028"\n\n', encoding="utf-8")
    elif ending == ".json":
        path.write_text(json.dumps(ROWS, ensure_ascii=False, indent=1), encoding="utf-8")
    elif ending == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n", encoding="utf-8")
    elif ending == ".parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    else:
        Dataset.from_list(ROWS).save_to_disk(folder / "disk")
        (folder / "disk" / "data-00000-of-00001.arrow").rename(path)
    return path


@pytest.fixture
def no_home(tmp_path, monkeypatch):
    """Sends whatever `datasets` caches to a folder that has to stay away."""
    home = tmp_path / "home"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", home)
    yield
    assert not home.exists()


@pytest.mark.parametrize("ending", [".csv", ".json", ".jsonl", ".parquet", ".arrow"])
def test_every_format_gives_the_same_rows(tmp_path, no_home, ending):
    path = written(tmp_path, ending)
    rows = read_rows(path, "dev")
    assert [row.values for row in rows] == ROWS
    assert [(row.file, row.split, row.number) for row in rows] == [(str(path), "dev", 1), (str(path), "dev", 2)]


def test_paragraphs_and_jsonl_line_numbers(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\n three \n\n")
    assert [row.values["text"] for row in read_rows(tmp_path / "a.txt")] == ["one two", "three"]
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [row.number for row in read_rows(tmp_path / "a.jsonl")] == [1, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"a\.jsonl, line 2: broken JSON \(Expecting value, column 7\)"),
        ("a.json", '[{"a": 1},\n {"a" 2}]', r"a\.json, line 2: broken JSON"),
        ("a.json", '{"a": 1}\n{"a": 2}', r"Extra data\); one object per line is called \.jsonl"),
        ("a.json", '{"a": 1}', r'a\.json: found \{"a": 1\} \(dict\), expected a list of objects'),
        ("a.jsonl", '{"a": 1}\n[3]\n', r"row 2: found \[3\] \(list\), expected an object with columns"),
        ("a.csv", "a,b\n1,2\n3\n", r"a\.csv, row 2 \(ends on line 3\): found 1 cells, expected 2 \(a, b\)"),
        ("a.csv", "a,b\n1,2,3\n", r"found 3 cells, expected 2"),
        ("a.csv", 'a,b\n1,"2\n', r"a\.csv, line 2: broken csv"),
        ("a.csv", "a,a\n1,2\n", r"found the header \['a', 'a'\], expected column names, each once"),
        ("a.csv", "", r"found the header \[\]"),
        ("a.parquet", "no parquet", r"a\.parquet: not a readable parquet file"),
        ("a.arrow", "no arrow", r"a\.arrow: not a readable arrow file"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(RowError, match=message):
        read_rows(tmp_path / name)


def test_not_utf8(tmp_path):
    (tmp_path / "a.csv").write_bytes("a\nfünf\n".encode("latin-1"))
    with pytest.raises(RowError, match="byte 3 is not UTF-8; save the file as UTF-8"):
        read_rows(tmp_path / "a.csv")


def test_missing_file_and_unknown_ending(tmp_path):
    (tmp_path / "rows.xlsx").write_text("")
    (tmp_path / "sub").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.csv: the folder .* holds rows\.xlsx, sub/"):
        read_rows(tmp_path / "none.csv")
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        read_rows(tmp_path / "nowhere" / "a.csv")
    with pytest.raises(FileNotFoundError, match="the folder .*sub holds nothing"):
        read_rows(tmp_path / "sub")
    with pytest.raises(ValueError, match=r"the ending '\.xlsx' is not one of \.csv, \.json"):
        read_rows(tmp_path / "rows.xlsx")


def checker(*cells: dict, columns=("id", "text")) -> tuple[list[Row], RowChecker]:
    rows = [Row(values, "f.csv", "train", number) for number, values in enumerate(cells, 1)]
    return rows, RowChecker(rows, {name: (name, name.title()) for name in columns}, "toy")


def test_good_cells():
    rows, check = checker(
        {"Id": 7, "text": " x "}, {"id": "8", "Text": ["a", " ", " b"]}, {"id": "9", "text": "a; b ;"}
    )
    assert (check.identifier(rows[0]), check.text(rows[0], "text")) == ("7", " x ")
    assert (check.identifier(rows[1]), check.texts(rows[1], "text")) == ("8", ["a", " b"])
    assert check.texts(rows[2], "text", separator=";") == ["a", "b"]
    check.finish()


@pytest.mark.parametrize(
    ("cell", "found"),
    [
        ({"text": ""}, '"" (str)'),
        ({"text": " \n"}, '" \\n" (str)'),
        ({"text": None}, "nothing (None)"),
        ({}, "nothing (None)"),
        ({"text": 3.5}, "3.5 (float)"),
        ({"text": ["x"]}, '["x"] (list)'),
        ({"text": {"x": 1}}, '{"x": 1} (dict)'),
    ],
)
def test_bad_text_names_everything(cell, found):
    rows, check = checker({"id": "a", "text": "x"}, {"id": "b", **cell})
    assert check.text(rows[1], "text") == ""
    with pytest.raises(RowError) as error:
        check.finish()
    place = "f.csv, split train, row 2, id 'b', column 'text'"
    assert str(error.value) == f"toy: 1 problem(s)\n  {place}: found {found}, expected a non-empty text"


def test_bad_lists():
    rows, check = checker({"id": "a", "text": [1]}, {"id": "b", "text": " ; "}, {"id": "c", "text": []})
    assert check.texts(rows[0], "text") == []
    assert check.texts(rows[1], "text", separator=";") == []
    assert check.texts(rows[2], "text", may_be_empty=True) == []
    with pytest.raises(
        RowError, match=r"(?s)2 problem.*\[1\] \(list\), expected a list of texts\n.*one text cut at ';'"
    ):
        check.finish()


def test_duplicate_ids_and_content():
    rows, check = checker({"id": 1, "text": "x"}, {"id": "1", "text": "x"}, {"id": True, "text": "y"})
    rows.append(Row({"id": "4", "text": "x"}, "g.csv", "test", 1))
    for row in rows:
        check.identifier(row)
        check.unique(row, "text", check.text(row, "text"), across_splits_only=True)
    assert len(check.problems) == 3
    assert check.problems[0] == (
        "f.csv, split train, row 2, id '1', column 'id': found \"1\" (str), which is also in f.csv, split train, "
        "row 1, expected each one once"
    )
    assert "found true (bool), expected a non-empty text" in check.problems[1]
    assert check.problems[2].startswith("g.csv, split test, row 1, id '4', column 'text'")  # not row 2's


def test_five_are_shown_and_the_rest_counted():
    rows, check = checker(*({"id": str(n), "text": None} for n in range(8)))
    for row in rows:
        check.text(row, "text")
    with pytest.raises(RowError) as error:
        check.finish()
    lines = str(error.value).splitlines()
    assert lines[0] == "toy: 8 problem(s)" and lines[-1] == "  and 3 more" and len(lines) == 7


def test_missing_columns_and_no_rows():
    with pytest.raises(RowError, match=r"f\.csv, split train: missing column 'id' or 'Id'; there are 'text', 'other'"):
        checker({"text": "x"}, {"other": 1})
    with pytest.raises(RowError, match="toy: there are no rows"):
        checker()


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_hub_route_with_a_local_folder(tmp_path, no_home, ending):
    for split, rows in (("train", ROWS), ("validation", ROWS[:1])):
        data = Dataset.from_list(rows)
        data.to_parquet(tmp_path / "set" / f"{split}.parquet") if ending == ".parquet" else data.to_json(
            tmp_path / "set" / f"{split}.jsonl"
        )
    splits = read_hub(str(tmp_path / "set"))
    assert {split: [row.values for row in rows] for split, rows in splits.items()} == {
        "train": ROWS,
        "validation": ROWS[:1],
    }
    assert splits["train"][1].place() == f"{tmp_path / 'set'}, split train, row 2"
    with pytest.raises(ValueError, match="local folder, which has no revision 'v1'"):
        read_hub(str(tmp_path / "set"), "v1")


def test_hub_id_revision_and_configuration_are_passed_on(monkeypatch):
    asked = []

    def load_dataset(name, config, revision, cache_dir):
        asked.append((name, config, revision, cache_dir))
        return DatasetDict({"train": Dataset.from_list(ROWS)})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert read_hub("owner/name:part", "v1")["train"][0].file == "owner/name:part@v1"
    read_hub("owner/name")
    assert asked == [("owner/name", "part", "v1", None), ("owner/name", None, None, None)]


def test_hub_errors_say_what_was_asked_for(tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_text('{"a": 1}\n{"a": ')
    with pytest.raises(ValueError, match=r"could not be loaded"):
        read_hub(str(tmp_path))

    def load_dataset(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(OSError, match=r"'owner/name' \(revision newest\) could not be loaded: no network"):
        read_hub("owner/name")


def test_fingerprint_is_content_only():
    one = Dataset.from_list(ROWS)
    again = Dataset.from_list(ROWS[::-1]).select([1, 0])  # another history, the same rows
    assert one._fingerprint != again._fingerprint
    assert fingerprint(one) == fingerprint(again)
    assert fingerprint(one) != fingerprint(Dataset.from_list(ROWS[::-1]))
    assert fingerprint(DatasetDict(a=one, b=again)) == fingerprint(DatasetDict(b=one, a=one))
    assert fingerprint(DatasetDict(a=one)) != fingerprint(DatasetDict(b=one))
