"""recipes/self_interpretability.py as a user runs it: the smoke preset by `accelerate launch`, resuming, bad input."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHORT = ["--preset", "smoke", "--base_steps", "3", "--max_steps", "2", "--report_max_steps", "2", "--trials", "12",
         "--known", "4", "--native", "3", "--instilled", "8", "--never", "3", "--warmup_steps", "0",
         "--use_cpu", "true", "--report_warmup_steps", "0", "--gate", "-1"]  # fmt: skip


@pytest.fixture(scope="module")
def recipe(load_recipe):
    return load_recipe("self_interpretability")


@pytest.fixture(scope="module")
def smoke(launch_smoke):
    return launch_smoke("self_interpretability")


def test_smoke_shows_the_robust_facts(smoke):
    folder, output = smoke
    results = json.loads((folder / "results.json").read_text())
    assert results["status"] == "finished" and results["toy"] is True and results["claims"] == []
    rows = {name: found["pooled_r"]["value"] for name, found in results["metrics"]["agreement"].items()}
    # 24 agents and seconds of training: choices take, and nothing of what reports do is certain
    assert rows["learned against target"] > 0.4 and abs(rows["base model's reports"]) < 0.4
    assert rows["choices measured again against target"] > 0.4
    assert {"2: reports on held-out contexts", "control: trained on shuffled reports"} < set(rows)
    details = results["metrics"]["details"]["0"]
    assert details["mass on numbers"] > 0.9 and details["off-answer mass"] < 0.05
    assert "Claims are judged from three seeds on" in output and "shows nothing about large models" in output
    assert str(folder.parent) not in (folder / "results.json").read_text()


def test_a_finished_folder_is_shown_not_overwritten(smoke, recipe, capsys):
    folder, _ = smoke
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    recipe.main(["--preset", "smoke", "--output_dir", str(folder)])
    assert "is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_every_level_and_control(recipe, tmp_path):
    recipe.main([*SHORT, "--levels", "L1", "L0", "L2", "L3", "L4", "--folds", "0", "1", "--controls", "shuffled",
                 "other", "reinstil", "--output_dir", str(tmp_path / "run")])  # fmt: skip
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["status"] == "finished"
    rows = results["metrics"]["agreement"]
    for level in ("L0", "L2", "L3", "L4"):
        assert f"{level}: reports on held-out contexts" in rows
    assert "control: another model's reports" in rows and "new preferences: reports against new choices" in rows


def test_the_gate_stops_with_the_reason(recipe, tmp_path, capsys):
    flags = [*SHORT, "--controls", "shuffled", "--output_dir", str(tmp_path / "run")]
    recipe.main([*flags, "--gate", "1.0"])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "instilling did not take" in results["metrics"]["stopped"]["0"]["L1"]
    assert "no reports were trained" in capsys.readouterr().out
    assert {path.parent.name for path in tmp_path.rglob("measured.json")} == {"base", "instilled"}


def test_an_interrupted_run_goes_on(recipe, tmp_path, monkeypatch):
    original, calls = recipe.run_stage, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    flags = [*SHORT, "--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr(recipe, "run_stage", interrupted)
    with pytest.raises(SystemExit, match="interrupted"):
        recipe.main(flags)
    done = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("measured.json")}
    assert {file.parent.name for file in done} == {"base", "instilled"}
    recipe.main(flags)
    after = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("measured.json")}
    assert done.items() < after.items() and {file.parent.name for file in after} == {
        "base", "instilled", "reported_0", "shuffled"}  # fmt: skip


def trained_parameters(output):
    return int(re.search(r"trained parameters\s+([\d,]+)", output)[1].replace(",", ""))


def test_dry_run_shows_rows_and_leaves_nothing(recipe, tmp_path, capsys):
    recipe.main([*SHORT, "--dry_run", "true", "--output_dir", str(tmp_path / "run")])
    output = capsys.readouterr().out
    for text in ("choice", "report", "[ A]", "all parameters", "Steps: 2 per fit"):
        assert text in output or text == "[ A]" and "[ B]" in output
    assert not (tmp_path / "run").exists()
    whole = trained_parameters(output)
    recipe.main([*SHORT, "--levels", "L3", "--dry_run", "true", "--output_dir", str(tmp_path / "run")])
    assert trained_parameters(capsys.readouterr().out) < whole  # the weights that this level trains, not all


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--levels", "L7"], ["--levels ['L7']", "L4"]),
        (["--controls", "none"], ["--controls", "shuffled"]),
        (["--replay", "1.5"], ["--replay 1.5"]),
        (["--known", "3000"], ["more than there are names"]),
        (["--instilled", "2"], ["at least 4"]),
        (["--part", "embeddings"], ["--part embeddings has no effect here", "--levels"]),
        (["--packing", "true"], ["packing"]),
        (["--seed", "3"], ["--seeds 3"]),
        (["--per_device_train_batch_size", "8"], ["--per_device_train_batch_size 8 has no effect"]),
        (["--gradient_accumulation_steps", "3"], ["256 or 256 rows", "--gradient_accumulation_steps 3 x 1"]),
        (["--report_max_steps", "-1"], ["--report_max_steps -1", "say how many"]),
        (["--trials", "5"], ["--trials 5: at least 12"]),
        (["--known", "0"], ["--known 0: at least 1"]),
        (["--nonsense", "1"], ["--nonsense"]),
    ],
)
def test_bad_input_is_said_before_any_training(recipe, tmp_path, flags, parts):
    with pytest.raises(SystemExit) as caught:
        recipe.main([*SHORT, *flags, "--output_dir", str(tmp_path / "run")])
    text = str(caught.value.code)
    assert text.startswith("error: ") and all(part in text for part in parts), text
    assert not list(tmp_path.rglob("measured.json"))
