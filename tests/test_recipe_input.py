"""Bad input, interruption and a full disk, through recipes/lofit.py: a clear error on one screen, nothing lost."""

import csv
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig

from steerbook.trainers.fingerprint import model_fingerprint
from steerbook.trainers.lofit.selection import HeadSelection
from steerbook.trainers.tiny_lm import build_tokenizer

RECIPE = Path(__file__).parents[1] / "recipes" / "lofit.py"
CONFIG = RECIPE.parent / "configs" / "lofit" / "llama2_7b_mquake.yaml"
COLUMNS = ["Question", "Best Answer", "Correct Answers", "Incorrect Answers"]
SCREEN = 30  # lines
LAYERS, HEADS = 2, 4


@pytest.fixture(scope="module")
def recipe(load_recipe):
    return load_recipe("lofit")


def save_model(config, folder: Path) -> str:
    tokenizer = build_tokenizer([], "byte")
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A random Llama with 2 layers of 4 heads."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return save_model(config, tmp_path_factory.mktemp("tiny"))


def question(n: int, **changed: str) -> dict[str, str]:
    row = dict(zip(COLUMNS, [f"Is {n} odd?", "It depends", "It depends; Ask Ann.", "Never; Always"], strict=True))
    return {**row, **changed}


def truthfulqa(folder: Path, *train: dict[str, str], columns: list[str] | None = None) -> str:
    """A folder of train, val and test csv files; `train` is added to the training rows."""
    folder.mkdir()
    for split, start in (("train", 0), ("val", 10), ("test", 20)):
        with (folder / f"{split}.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns or COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows([question(n) for n in range(start, start + 4)] + list(train if split == "train" else ()))
    return str(folder)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The default output folder is relative."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def error(recipe, capsys) -> Callable[..., str]:
    """Calls the recipe, which must stop with an error of at most a screen; returns its text."""

    def call(*argv: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            recipe.main([str(arg) for arg in argv])
        code = caught.value.code
        text = code if isinstance(code, str) else capsys.readouterr().err
        assert code not in (None, 0)
        assert "error: " in text
        assert "Traceback" not in text
        assert len(text.splitlines()) <= SCREEN and len(text) < 80 * SCREEN
        return text

    return call


@pytest.fixture
def real(tmp_path, tiny) -> list[str]:
    """Flags of a small run on TruthfulQA rows, into `tmp_path / "run"`."""
    flags = ["--dataset", "truthfulqa", "--data_files", truthfulqa(tmp_path / "data"), "--model_name_or_path", tiny]
    flags += ["--output_dir", str(tmp_path / "run"), "--k", "2", "--arms", "lofit", "lora", "--max_steps", "2"]
    return [*flags, "--per_device_train_batch_size", "2", "--save_strategy", "no", "--use_cpu", "true"]


def results(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "run" / "results.json").read_text())


def measured(tmp_path: Path) -> dict[str, int]:
    """What has been measured, and when (ns)."""
    files = (tmp_path / "run").glob("seed_*/*/measured.json")
    return {file.parent.name: file.stat().st_mtime_ns for file in files}


# ---- flags and YAML ----


@pytest.mark.parametrize("flag", ["--nonsense", "--learning_rat", "--max_train_row"])
def test_unknown_flag(error, flag):
    """Also one that begins like a flag: in YAML it is an error too."""
    assert flag in error("--dataset", "truthfulqa", flag, "1")


def test_unknown_data_set_lists_the_known_ones(error):
    text = error("--dataset", "mythz")
    assert "mythz" in text and "truthfulqa" in text and "clutrr" in text


@pytest.mark.parametrize(("flag", "value"), [("--learning_rate", "fast"), ("--draws", "0"), ("--l1_lambda", "-1")])
def test_value_of_the_wrong_kind(error, flag, value):
    text = error(flag, value)
    assert flag.removeprefix("--") in text and value in text


def test_unknown_arm_lists_the_known_ones(error):
    text = error("--arms", "lofit", "dora")
    assert "'dora'" in text and "layer_matched" in text


def test_remote_code_is_refused(error, real):
    assert "trust_remote_code" in error(*real, "--trust_remote_code", "true")


def test_unknown_key_in_yaml(error, tmp_path):
    path = tmp_path / "typo.yaml"
    path.write_text(CONFIG.read_text() + "learning_rat: 1.0\n")
    assert "learning_rat" in error("--config", path)


def test_yaml_that_is_none(error, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("k: [32\nseeds: [1]\n")
    assert "broken.yaml" in error("--config", path)


@pytest.mark.parametrize("line", ["k: 32", "seeds: 7", "arms: lofit", "data_files: DIR"])
def test_yaml_with_one_value_for_a_list(recipe, tmp_path, line):
    """It is what one writes first: taken as a list of one."""
    path = tmp_path / "one.yaml"
    path.write_text(f"dataset: truthfulqa\n{line}\n")
    settings = recipe.parse(["--config", str(path)])
    name = line.partition(":")[0]
    values = {"k": settings.arms.k, "seeds": settings.recipe.seeds}
    values |= {"arms": settings.arms.arms, "data_files": settings.data.data_files}
    assert values[name] == {"k": [32], "seeds": [7], "arms": ["lofit"], "data_files": ["DIR"]}[name]


def test_yaml_that_is_not_there(error, tmp_path):
    assert "nowhere.yaml" in error("--config", tmp_path / "nowhere.yaml")


# ---- data ----


def test_missing_data_says_how_to_give_them(error, tiny):
    text = error("--dataset", "truthfulqa", "--model_name_or_path", tiny)
    assert "--data_files" in text and "--dataset_id" in text


def test_missing_file_lists_the_folder(error, tmp_path):
    folder = truthfulqa(tmp_path / "data")
    text = error("--dataset", "truthfulqa", "--data_files", f"train={folder}/train.csv", f"test={folder}/tst.csv")
    assert "tst.csv" in text and "val.csv" in text


def test_wrong_columns_name_the_missing_and_the_found(error, tmp_path):
    folder = truthfulqa(tmp_path / "data", columns=["Question", "Best Answer", "Correct Answers"])
    text = error("--dataset", "truthfulqa", "--data_files", folder)
    assert "'Incorrect Answers'" in text and "'Best Answer'" in text and "train.csv" in text


def test_rows_of_another_data_set(error, tmp_path):
    text = error("--dataset", "mquake", "--data_files", truthfulqa(tmp_path / "data"))
    assert "mquake" in text and "'requested_rewrite'" in text


@pytest.mark.parametrize(
    ("changed", "column", "found"),
    [
        ({"Question": ""}, "Question", '""'),
        ({"Best Answer": "  "}, "Best Answer", '"  "'),
        ({"Correct Answers": ""}, "Correct Answers", '""'),
        ({"Incorrect Answers": " ; "}, "Incorrect Answers", "no incorrect answer"),
    ],
)
def test_empty_cell_is_named(error, tmp_path, changed, column, found):
    folder = truthfulqa(tmp_path / "data", question(5, **changed))
    text = error("--dataset", "truthfulqa", "--data_files", folder)
    assert f"train.csv, split train, row 5, column {column!r}: found {found}" in text


def test_many_bad_rows_are_counted(error, tmp_path):
    folder = truthfulqa(tmp_path / "data", *[question(30 + n, Question="") for n in range(40)])
    assert "and 35 more" in error("--dataset", "truthfulqa", "--data_files", folder)


def test_duplicate_ids_name_both_rows(error, tmp_path):
    (tmp_path / "data").mkdir()
    for split, start in (("train", 0), ("val", 10), ("test", 20)):
        rows = [
            {
                "id": "c1" if split == "train" else f"c{n}",
                "clean_story": f"[Ann] has {n} sons. Her son [Bob] has a wife, [Cleo].",
                "query": "('Ann', 'Cleo')",
                "target_text": "daughter-in-law",
            }
            for n in range(start, start + 2)
        ]
        (tmp_path / "data" / f"{split}.json").write_text(json.dumps(rows))
    text = error("--dataset", "clutrr", "--data_files", tmp_path / "data")
    assert "row 2, id 'c1'" in text and "row 1" in text


# ---- models and heads ----


def test_more_heads_than_there_are(error, real, tmp_path):
    text = error(*real, "--k", "9")
    assert "k=9" in text and str(LAYERS * HEADS) in text
    assert not measured(tmp_path).keys() - {"base"}


def heads_file(path: Path, base: str, heads: list[tuple[int, int]]) -> str:
    HeadSelection(heads, {}, len(heads), 0, "file", base).save(path)
    return str(path)


def test_heads_of_another_model(error, real, tmp_path):
    path = heads_file(tmp_path / "heads.json", "0123456789abcdef", [(0, 1), (1, 2)])
    text = error(*real, "--heads_file", path)
    assert "0123456789abcdef" in text and "select again" in text


def test_heads_out_of_range(error, real, tmp_path, tiny):
    base = model_fingerprint(AutoModelForCausalLM.from_pretrained(tiny))
    path = heads_file(tmp_path / "heads.json", base, [(0, 1), (7, 2)])
    text = error(*real, "--heads_file", path)
    assert "(7, 2)" in text and "out of range" in text


@pytest.mark.parametrize("content", [None, "{", '{"heads": [[0, 1]]}', '{"heads": [[0, 1], [0, 1]]}'])
def test_heads_file_that_is_none(error, real, tmp_path, content):
    path = tmp_path / "my_heads.json"
    if content is not None:
        path.write_text(content)
    assert "my_heads.json" in error(*real, "--heads_file", path)


def test_architecture_without_a_known_output_projection(error, real, tmp_path):
    model = save_model(BloomConfig(hidden_size=32, n_layer=1, n_head=4), tmp_path / "bloom")
    text = error(*real, "--model_name_or_path", model)
    assert "bloom" in text and "output projection" in text


def test_missing_model(error, real, tmp_path):
    text = error(*real, "--model_name_or_path", tmp_path / "no_model")
    assert "no_model" in text and "--model_name_or_path" in text


def broken(tiny: str, folder: Path, name: str, change: Callable[[bytes], bytes | None]) -> str:
    """A copy of the tiny model with one file changed, or without it."""
    folder.mkdir()
    for file in Path(tiny).iterdir():
        content = change(file.read_bytes()) if file.name == name else file.read_bytes()
        if content is not None:
            (folder / file.name).write_bytes(content)
    return str(folder)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.safetensors", lambda content: None),
        ("model.safetensors", lambda content: content[: len(content) // 2]),
        ("config.json", lambda content: None),
        ("config.json", lambda content: content[:20]),
        ("config.json", lambda content: content.replace(b'"llama"', b'"quux"')),
        ("config.json", lambda content: content.replace(b'"intermediate_size": 48', b'"intermediate_size": 64')),
        ("tokenizer.json", lambda content: None),
        ("tokenizer.json", lambda content: content[:20]),
    ],
    ids=["no weights", "cut weights", "no config", "cut config", "unknown type", "other shape", "no tok", "cut tok"],
)
def test_model_that_is_not_whole(error, real, tmp_path, tiny, name, change):
    model = broken(tiny, tmp_path / "my_model", name, change)
    text = error(*real, "--model_name_or_path", model)
    assert "my_model" in text and "--model_name_or_path" in text


# ---- the output folder ----


def test_finished_folder_is_kept_and_another_run_is_refused(recipe, error, real, tmp_path, capsys):
    recipe.main(real)
    assert results(tmp_path)["status"] == "finished"
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}

    text = error(*real, "--learning_rate", "0.5", "--beta", "0.2")
    assert "learning_rate: '(default)' then, 0.5 now" in text and "beta" in text
    assert "max_steps" not in text  # only what differs
    capsys.readouterr()
    recipe.main(real)  # the same: shown again, nothing trained
    assert "finished" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


def test_folder_with_other_files_is_refused(error, real, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    assert "thesis.tex" in error(*real)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_unreadable_results_are_not_overwritten(error, real, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text('{"schema": 1, "sta')
    assert "results.json" in error(*real)
    assert (tmp_path / "run" / "results.json").read_text() == '{"schema": 1, "sta'


# ---- a run that stops ----


def stopped(recipe, argv: list[str]) -> None:
    """Runs until an interrupt, which must end it without a traceback."""
    with pytest.raises((SystemExit, KeyboardInterrupt)) as caught:  # the latter would end the test session
        recipe.main(argv)
    assert caught.type is SystemExit and caught.value.code not in (None, 0)


def test_interrupted_run_continues_without_repeating(recipe, real, tmp_path, monkeypatch):
    """Ctrl-C while the second arm is measured: base and LoFiT are there, LoRA is trained but not measured."""
    calls = []
    original = recipe.measure

    def measure(*args, **kwargs):
        calls.append(len(calls))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(recipe, "measure", measure)
    stopped(recipe, real)
    assert results(tmp_path)["status"] == "interrupted"
    done = measured(tmp_path)
    assert done.keys() == {"base", "lofit_k2"}
    trained = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("finished.json")}
    assert len(trained) == 3  # scales, offsets, LoRA

    recipe.main(real)
    assert len(calls) == 4  # LoRA only
    assert results(tmp_path)["status"] == "finished"
    assert measured(tmp_path).items() > done.items()
    assert trained == {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("finished.json")}


def test_loss_that_is_no_number_keeps_the_earlier_arms(error, real, tmp_path):
    text = error(*real, "--lora_learning_rate", "3e37", "--max_steps", "5")
    assert "nan" in text and "--learning_rate" in text and "3e+37" in text
    assert results(tmp_path)["status"] == "failed"
    assert "NonFiniteError" in results(tmp_path)["error"]
    assert measured(tmp_path).keys() == {"base", "lofit_k2"}
    for file in (tmp_path / "run").rglob("*.safetensors"):
        assert "lora" not in file.parent.name


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_full_disk_while_results_are_written(recipe, error, real, tmp_path, monkeypatch, call):
    original = getattr(os, call)
    seen = []

    def full(*args, **kwargs):
        seen.append(args)
        if len(seen) > 4 and (call == "fsync" or "measured" in str(args[1])):
            raise FULL
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        text = error(*real)
    assert "no space left to write" in text and "MB free" in text
    before = results(tmp_path)
    assert before["status"] in ("running", "failed")
    assert not list((tmp_path / "run").rglob("*.tmp"))

    recipe.main(real)  # after making room
    assert results(tmp_path)["status"] == "finished"


def test_full_disk_while_an_adapter_is_saved(recipe, error, real, tmp_path, monkeypatch):
    """safetensors reports it as an error of its own, which is no OSError."""
    import peft.peft_model
    from safetensors import SafetensorError

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(peft.peft_model, "safe_save_file", full)
        text = error(*real)
    assert "No space left" in text
    assert results(tmp_path)["status"] == "failed"
    recipe.main(real)
    assert results(tmp_path)["status"] == "finished"


# ---- the embedded world ----


def test_embedded_world_interrupted_and_continued(recipe, tmp_path, monkeypatch, capsys):
    flags = ["--preset", "smoke", "--arms", "lofit", "--max_steps", "2", "--max_eval_rows", "4", "--seeds", "0"]
    flags += ["--output_dir", str(tmp_path / "run"), "--use_cpu", "true"]
    original = recipe.train_arms

    def interrupted(*args, **kwargs):
        yield from original(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "train_arms", interrupted)
        stopped(recipe, flags)
    assert results(tmp_path)["status"] == "interrupted"
    done = measured(tmp_path)
    recipe.main(flags)
    assert results(tmp_path)["status"] == "finished" and results(tmp_path)["toy"] is True
    assert measured(tmp_path) == done
