"""Tasks of one's own for aTLAS: formats, splits cut and given, no leak, bad input, and the command."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from steerbook.data_builders.atlas import SPLITS, AtlasDataArguments, base_corpus, build, of_seed
from steerbook.data_builders.atlas.__main__ import main
from steerbook.data_builders.rows import RowError, fingerprint


def text(n: int, **changed) -> dict:
    return {"prompt": f"What is {n} + 1? Answer:", "completion": f" {n + 1}", **changed}


def chat(n: int, **changed) -> dict:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"Is {n} odd?"},
        {"role": "assistant", "content": "yes" if n % 2 else "no"},
    ]
    return {"messages": turns, **changed}


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".csv":
        Dataset.from_list(rows).to_csv(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(*tasks: str, **changed) -> AtlasDataArguments:
    return AtlasDataArguments(tasks=list(tasks), **changed)


def sizes(data: DatasetDict) -> list[int]:
    return [len(data[split]) for split in SPLITS]


@pytest.fixture
def sums(tmp_path) -> str:
    return f"sums={write(tmp_path / 'sums.jsonl', [text(n) for n in range(40)])}"


@pytest.mark.parametrize("ending", [".csv", ".json", ".jsonl", ".parquet"])
def test_every_format_and_a_seeded_cut(tmp_path, ending, caplog):
    path = write(tmp_path / f"rows{ending}", [text(n) for n in range(40)])
    data = build(arguments(f"sums={path}"))
    assert sizes(data) == [28, 4, 4, 4] and len(data["control"]) == 40
    assert "task sums: fit 4, dev 4, test 4 rows cut from train (seed 42)" in caplog.text
    rows = [row for split in SPLITS for row in data[split]]
    assert sorted(row["prompt"] for row in rows) == sorted(text(n)["prompt"] for n in range(40))
    assert all(row["completion"] == text(int(row["prompt"].split()[2]))["completion"] for row in rows)
    assert {(row["task"], row["role"]) for row in rows} == {("sums", "known")}
    assert data["control"].column_names == ["id", "group", "text"]
    again, other = build(arguments(f"sums={path}")), build(arguments(f"sums={path}", rows_seed=1))
    assert fingerprint(again) == fingerprint(data)
    assert set(other["test"]["prompt"]) != set(data["test"]["prompt"])
    for one, two in itertools.combinations(SPLITS, 2):
        assert not set(data[one]["prompt"]) & set(data[two]["prompt"])


def test_given_splits_stay_and_missing_ones_are_cut(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for split, numbers in (("train", range(30)), ("validation", range(30, 35)), ("test", range(35, 41))):
        write(folder / f"{split}.jsonl", [text(n) for n in numbers])
    data = build(arguments(f"sums={folder}", max_train_rows=9, max_eval_rows=3))
    assert sizes(data) == [9, 3, 3, 3]
    full = build(arguments(f"sums={folder}"))
    assert sizes(full) == [27, 3, 5, 6]
    assert set(full["test"]["prompt"]) == {text(n)["prompt"] for n in range(35, 41)}
    assert set(full["fit"]["prompt"]) < {text(n)["prompt"] for n in range(30)}
    (folder / "train.jsonl").rename(folder / "extra.jsonl")
    (folder / "extra.jsonl").unlink()
    with pytest.raises(ValueError, match=r"has the splits \['validation', 'test'\]; expected train and any of"):
        build(arguments(f"sums={folder}"))


def test_messages_stay_conversations(tmp_path):
    path = write(tmp_path / "chat.jsonl", [chat(n) for n in range(20)])
    pairs = [{"prompt": chat(n)["messages"][:2], "completion": chat(n)["messages"][2:]} for n in range(20)]
    data = build(arguments(f"odd={path}"))
    assert sizes(data) == [14, 2, 2, 2]
    for row in data["train"]:
        n = int(row["prompt"][1]["content"].split()[1])
        assert row["prompt"] == chat(n)["messages"][:2] and row["completion"] == chat(n)["messages"][2:]
    same = build(arguments(f"odd={write(tmp_path / 'pairs.json', pairs)}"))
    assert fingerprint(same) == fingerprint(data)
    with pytest.raises(ValueError, match="need a model with a chat template"):
        base_corpus(arguments(f"odd={path}"), data)


def test_new_tasks_and_several_tasks(tmp_path, sums):
    other = write(tmp_path / "odd.jsonl", [{"prompt": f"Is {n} odd?", "completion": " maybe"} for n in range(20)])
    args = arguments(sums, new_tasks=[f"odd={other}"], max_fit_rows=1, collateral_file=str(tmp_path / "c.txt"))
    (tmp_path / "c.txt").write_text("One.\n\nTwo.")
    data = build(args)
    assert sizes(data) == [28, 2, 6, 6] and data["control"]["text"] == ["One.", "Two."]
    roles = {(row["task"], row["role"]) for split in SPLITS for row in data[split]}
    assert roles == {("sums", "known"), ("odd", "new")} and set(data["train"]["task"]) == {"sums"}
    texts = base_corpus(args, data)
    assert len(texts) == 28 + 2 + 2 and data["train"][0]["prompt"] + data["train"][0]["completion"] in texts
    assert of_seed(args, 7) == args


def test_a_prompt_is_in_one_split_only(tmp_path, caplog):
    """Also across tasks, and whatever its case and spacing; rows of one prompt are cut together."""
    folder = tmp_path / "a"
    folder.mkdir()
    write(folder / "train.jsonl", [text(n) for n in range(20)] + [text(3), text(3, completion=" four")])
    write(folder / "test.jsonl", [text(5, prompt=" what is  5 + 1? Answer:"), text(100)])
    other = write(tmp_path / "b.jsonl", [text(n, completion=" a number") for n in range(100, 120)])
    data = build(arguments(f"a={folder}", f"b={other}"))
    assert "whose prompt is held out too" in caplog.text and "dropped 1 rows that their task has twice" in caplog.text
    splits: dict[str, set[str]] = {}
    for split in SPLITS:
        for row in data[split]:
            splits.setdefault(" ".join(row["prompt"].casefold().split()), set()).add(split)
    assert all(len(found) == 1 for found in splits.values())
    assert splits["what is 5 + 1? answer:"] == splits["what is 100 + 1? answer:"] == {"test"}
    assert len(splits) == 20 + 20  # nothing is lost
    both = [r["completion"] for s in SPLITS for r in data[s] if r["prompt"] == text(3)["prompt"]]
    assert sorted(both) == [" 4", " four"]
    ids = [row["id"] for split in SPLITS for row in data[split]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([text(1), text(2, completion="")], r"row 2, column 'completion': found \"\" \(str\), expected a non-empty"),
        ([text(1), text(2, prompt=None)], r"row 2, column 'prompt': found nothing \(None\)"),
        ([{"question": "?", "answer": "!"}], r"missing column 'prompt', 'completion'; there are 'question', 'answer'"),
        ([], "task bad: there are no rows"),
        ([chat(1, messages=[])], r"column 'messages': found nothing \(None\), expected messages of role"),
        ([chat(1, messages="hello")], r"column 'messages': found \"hello\" \(str\), expected messages"),
        ([chat(1, messages=chat(1)["messages"][:2])], "found 2 messages, the last by 'user', expected a prompt, then"),
        ([chat(1, messages=chat(1)["messages"][2:])], "found 1 messages, the last by 'assistant', expected a prompt"),
        ([chat(1, messages=[{"role": "tool", "content": "x"}])], r"found {\"role\": \"tool\", .*expected messages"),
        ([chat(1, messages=[{"role": "user", "content": "x", "tool_calls": ["f"]}])], "expected messages of role"),
        ([text(1, prompt=chat(1)["messages"][:2])], r"column 'completion': found \" 2\" \(str\), expected messages"),
        (
            [{"prompt": chat(1)["messages"][:1], "completion": chat(1)["messages"][1:2]}],
            r"column 'completion': found .*expected one message by 'assistant'",
        ),
        ([text(n) for n in range(3)], "the task 'bad' has 3 different train prompts; fit, dev, test cannot be cut"),
    ],
)
def test_bad_rows(tmp_path, rows, message):
    path = write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ValueError, match=message) as error:
        build(arguments(f"bad={path}"))
    if "column" in message:
        assert isinstance(error.value, RowError) and "task bad" in str(error.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(tasks=["sums"]), "--tasks: 'sums' is not name=PATH_OR_HUB_ID"),
        (dict(tasks=["=a.jsonl"]), "'=a.jsonl' is not name=PATH_OR_HUB_ID"),
        (dict(tasks=["../a=a.jsonl"]), "'../a=a.jsonl' is not name="),
        (dict(new_tasks=["sums=x.jsonl"]), "--new_tasks: the task name 'sums' is given twice"),
        (dict(tasks=[], new_tasks=["a=b"]), "--tasks is empty"),
        (dict(dataset_revision="v1"), "--dataset_revision v1: no task is a Hub data set"),
        (dict(max_fit_rows=0), "a limit of 0 rows leaves nothing"),
    ],
)
def test_bad_arguments(sums, changed, message):
    with pytest.raises(ValueError, match=message):
        build(AtlasDataArguments(**({"tasks": [sums]} | changed)))


def test_missing_sources_and_mixed_kinds(tmp_path, sums):
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.jsonl: the folder .* holds sums\.jsonl"):
        build(arguments(f"a={tmp_path / 'none.jsonl'}", sums))
    with pytest.raises(OSError, match="'nobody/nothing' .* could not be loaded"):
        build(arguments("a=nobody/nothing"))
    path = write(tmp_path / "chat.jsonl", [chat(n) for n in range(20)])
    with pytest.raises(ValueError, match="all texts or all messages, but there are both"):
        build(arguments(sums, f"odd={path}"))


def test_the_command(tmp_path, sums, monkeypatch, capsys):
    command = [sys.executable, "-m", "steerbook.data_builders.atlas", "--tasks", sums]
    command += ["--out", str(tmp_path / "out"), "--preview", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "train, row 1 of 28" in done.stdout and "train 28, fit 4, dev 4, test 4, control 40" in done.stdout
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["arguments"]["tasks"] == [sums]
    monkeypatch.setattr("sys.argv", ["atlas", "--tasks", "a"])
    assert main() == 2
    assert capsys.readouterr().err.startswith("error: --tasks: 'a' is not name=PATH_OR_HUB_ID")


def test_building_needs_no_torch():
    code = (
        "import sys, steerbook.data_builders.atlas.__main__; print(sorted({'torch', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
