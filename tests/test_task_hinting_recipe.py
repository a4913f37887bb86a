"""recipes/task_hinting.py as a user runs it: the smoke preset by `accelerate launch`, other tasks, bad input."""

import json
from pathlib import Path

import pytest
import torch

from steerbook.data_builders.task_hinting import HintingDataArguments
from steerbook.data_builders.task_hinting import test_sets as sets_of_tests
from steerbook.eval.task_hinting import teacher_forced
from steerbook.trainers.task_hinting.softmax import items, load

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def recipe(load_recipe):
    return load_recipe("task_hinting")


@pytest.fixture(scope="module")
def smoke(launch_smoke):
    return launch_smoke("task_hinting")


def test_smoke_shows_the_robust_facts(smoke):
    """Those of spec 3.5, in short training: right in range, lost far beyond it, where the softmax at test raises it;
    the choice of hint matters. Whether the successor helps is no fact of one seed."""
    folder, output = smoke
    results = json.loads((folder / "results.json").read_text())
    assert results["status"] == "finished" and results["toy"] is True and results["claims"] == []
    metrics = results["metrics"]
    standard, others = metrics["before"], metrics["others"]
    assert standard["em/6"]["value"] >= 0.95 and standard["em/36"]["value"] < 0.3
    assert len(others) == 5  # of two hints, and all three with the softmax at test
    label = "standard (equal main rows), 64 rows"
    for length in (30, 36):  # so short a training has no list right there, with or without
        plain, sharp = (metrics["tokens"][name][f"tokens/{length}"] for name in (label, f"{label}, softmax at test"))
        assert plain["high"] < sharp["low"]
    assert others["hint predecessor (own mark), 64 + 32 rows"]["em/18"]["value"] < 0.5
    hint = metrics["hints"]["hint successor (shared mark), 64 + 32 rows"]
    assert hint["em/successor/6"]["value"] > 0.9 and hint["tokens/successor/6"]["value"] > 0.9
    assert label not in metrics["hints"] and "successor itself" in output and "predecessor itself" in output
    assert "Claims are judged from three seeds on" in output and "shows nothing about large models" in output
    assert str(folder.parent) not in (folder / "results.json").read_text()
    figures = {path.name for path in (folder / "figures").iterdir()}
    assert figures == {
        "accuracy.png", "attention.png", "attention_heads_seed_0.png", "errors.png", "loss.png", "probes.png"
    }  # fmt: skip


def test_smoke_leaves_models_that_score_the_same(smoke):
    folder, _ = smoke
    record = json.loads((folder / "seed_0" / "hint_successor" / "measured.json").read_text())
    card = (folder / "README.md").read_text()
    assert "load('seed_0/hint_successor/model')" in card and "errors: in `results.json`" in card
    model = load(folder / "seed_0" / "hint_successor" / "model")
    rows = sets_of_tests(HintingDataArguments(test_rows=100, rows_seed=0))
    for length in (6, 18):
        again = teacher_forced(model, rows[length])
        assert [s["metrics"] for s in again] == [s["metrics"] for s in record["splits"][f"test_{length}"]]


def test_a_finished_folder_is_shown_not_overwritten(smoke, recipe, capsys):
    folder, _ = smoke
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    recipe.main(["--preset", "smoke", "--output_dir", str(folder)])
    assert "is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


SHORT = ["--preset", "smoke", "--max_steps", "2", "--warmup_steps", "0", "--test_rows", "10", "--use_cpu", "true"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--main", "increment", "--hints", "carry", "digit", "--control_hint", "copy", "--positions", "rope"],
        ["--main", "addition", "--hints", "no_carry", "--control_hint", "copy", "--positions", "learned",
         "--table", "160", "--reverse", "true"],
        ["--main", "count", "--hints", "member", "--softmax_rule", "learn", "--softmax_count", "keys"],
        ["--repetitions", "true", "--hints", "run", "--softmax_rule", "ssmax", "--mix", "random",
         "--weights", "sort=first:1", "run=0.5", "--gradient_accumulation_steps", "4"],
    ],
)  # fmt: skip
def test_every_arm_of_every_family(recipe, tmp_path, flags):
    arms = ["standard", "standard_total", "hint", "control", "softmax", "hint_softmax"]
    recipe.main([*SHORT, *flags, "--arms", *arms, "--output_dir", str(tmp_path / "run")])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["status"] == "finished"
    folders = {file.parent.name for file in (tmp_path / "run" / "seed_0").glob("*/measured.json")}
    hints = flags[flags.index("--hints") + 1 :]
    hints = hints[: next((i for i, flag in enumerate(hints) if flag.startswith("--")), len(hints))]
    trained = {"standard", "standard_total", "softmax", "control_copy"}
    trained |= {f"{kind}_{hint}" for kind in ("hint", "hint_softmax") for hint in hints}
    assert folders == trained | {f"{arm}_at_test" for arm in trained if "softmax" not in arm}
    model = load(tmp_path / "run" / "seed_0" / "softmax" / "model")
    with items(torch.tensor([3])):
        assert model(torch.tensor([[7, 8, 9, 2]])).logits.isfinite().all()


def test_an_interrupted_run_goes_on(recipe, tmp_path, monkeypatch):
    original, calls = recipe.fit, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    flags = [*SHORT, "--hints", "successor", "--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr(recipe, "fit", interrupted)
    with pytest.raises(SystemExit, match="interrupted"):
        recipe.main(flags)
    done = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").glob("seed_*/*/measured.json")}
    assert len(done) == 2
    recipe.main(flags)
    after = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").glob("seed_*/*/measured.json")}
    assert done.items() < after.items() and len(calls) == 3


def test_dry_run_shows_rows_and_cost_and_leaves_nothing(recipe, tmp_path, capsys):
    recipe.main(["--preset", "paper", "--dry_run", "true", "--output_dir", str(tmp_path / "run")])
    output = capsys.readouterr().out
    for text in (
        "=> [",
        "all parameters",
        "hint run (shared mark), 1024 + 512 rows",
        "8 models x 3 seeds, 100,000 steps",
    ):
        assert text in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--hints", "carry"], ["unknown task 'carry'", "successor"]),
        (["--arms", "hinted"], ["unknown arm 'hinted'", "hint_softmax"]),
        (["--control_hint", "successor", "--arms", "control"], ["--control_hint successor is one of --hints"]),
        (["--control_hint", "carry", "--arms", "control"], ["unknown task 'carry'"]),
        (["--hint_longest", "9"], ["--allow_longer_hints"]),
        (["--values", "20"], ["lists of 36 different numbers", "--values"]),
        (["--positions", "learned"], ["learned positions for 64 tokens", "raise --table to 74"]),
        (["--weights", "successor=-1"], ["finite and not negative"]),
        (["--weights", "sort=0"], ["gives the main task sort nothing"]),
        (["--weights", "sort=linear:0:10:0:0"], ["gives the main task sort nothing", "at some step"]),
        (["--weights", "sort=first:600"], ["gives the main task sort nothing", "at some step"]),
        (["--arms", "untouched"], ["--arms: nothing is trained"]),
        (["--prompt_style", "shared", "--hints", "predecessor"], ["predecessor contradicts sort"]),
        (["--softmax_n0", "1"], ["n0=1.0"]),
        (
            ["--gradient_accumulation_steps", "5"],
            ["standard has 64 rows a step", "--gradient_accumulation_steps 5 x 1"],
        ),
        (["--per_device_train_batch_size", "32"], ["--per_device_train_batch_size 32 has no effect", "--main_rows"]),
        (["--gradient_cosine", "5", "--mix", "alternate"], ["--mix alternate has one task a step"]),
        (["--nonsense", "1"], ["--nonsense"]),
    ],
)
def test_bad_input_is_said_before_any_training(recipe, tmp_path, flags, parts):
    with pytest.raises(SystemExit) as caught:
        recipe.main(["--preset", "smoke", *flags, "--output_dir", str(tmp_path / "run")])
    text = str(caught.value.code)
    assert text.startswith("error: ") and all(part in text for part in parts), text
    assert not list(tmp_path.rglob("measured.json")) and not list(tmp_path.rglob("*.safetensors"))
