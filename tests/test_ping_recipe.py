"""recipes/ping.py as a user runs it: the smoke preset by `accelerate launch`, resuming, bad input."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from steerbook.trainers.ping import Prefix

SHORT = ["--preset", "smoke", "--base_steps", "10", "--aligned_steps", "10", "--max_steps", "2", "--rounds", "1",
         "--candidates", "2", "--test_tasks", "4", "--trajectories", "12", "--use_cpu", "true"]  # fmt: skip


@pytest.fixture(scope="module")
def recipe(load_recipe):
    return load_recipe("ping")


@pytest.fixture(scope="module")
def smoke(launch_smoke):
    return launch_smoke("ping")


def test_smoke_measures_all_there_is(smoke):
    folder, output = smoke
    results = json.loads((folder / "results.json").read_text())
    assert results["status"] == "finished" and results["toy"] is True and results["claims"] == []
    metrics = results["metrics"]
    assert set(metrics["agents"]) == {"general corpus", "aligned", "agent", "agent + PING", "agent, never aligned",
                                      "agent, never aligned + PING"}  # fmt: skip
    assert len(metrics["defences"]) == 22 and {gate["gate"] for gate in metrics["gates"]} == {
        "G1", "G2", "G3", "G4", "G5"}  # fmt: skip
    assert (
        metrics["agents"]["agent"]["SR"]["n"] == 12
        and metrics["doses"] == {}
        and metrics["agents"]["agent"]["borderline: SR"]["n"] == 4
    )
    assert {path.stem for path in (folder / "figures").glob("*.png")} == {
        "before_after", "search", "probe", "steering", "loss", "trajectory"}  # fmt: skip
    for text in ("Base models", "Gate G1", "The agent's defences", "Claims are judged from three seeds on"):
        assert text in output
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {line["outcome"] for line in lines} <= {"executed", "refused", "failed"} and len(lines) > 300
    assert str(folder.parent) not in (folder / "results.json").read_text()


def test_the_prefix_is_saved_with_its_model(smoke):
    folder = smoke[0] / "seed_0"
    for key in ("agent", "never"):
        prefix = Prefix.load(folder / key / "prefix.json")
        record = json.loads((folder / key / "measured.json").read_text())
        model = AutoModelForCausalLM.from_pretrained(folder / key / "model")
        assert prefix == replace(Prefix(record["winner"], turns="first", separator="").of(model))
        scored = [line for line in (folder / key / "search.jsonl").read_text().splitlines() if "refusal" in line]
        assert len(scored) == len(record["search"]["pool"])


def test_a_finished_folder_is_shown_not_overwritten(smoke, recipe, capsys):
    folder, _ = smoke
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    recipe.main(["--preset", "smoke", "--output_dir", str(folder)])
    assert "is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_every_control_dose_and_an_interrupted_run(recipe, tmp_path, monkeypatch):
    flags = [*SHORT, "--controls", "never", "mixed", "lora", "constrained", "--doses", "true", "--turns", "every",
             "--scored_by", "first_turn", "--output_dir", str(tmp_path / "run")]  # fmt: skip
    original, calls = recipe.run_stage, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(recipe, "run_stage", interrupted)
    with pytest.raises(SystemExit, match="interrupted"):
        recipe.main(flags)
    done = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("measured.json")}
    assert {file.parent.name for file in done} == {"base", "aligned", "agent", "never"}
    recipe.main(flags)
    after = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("measured.json")}
    assert done.items() < after.items() and len(after) == 18
    assert (tmp_path / "run" / "figures" / "dose.png").exists()
    records = {file.parent.name: json.loads(file.read_text()) for file in after}
    assert 0 < records["lora"]["trained"] < records["agent"]["trained"]
    assert records["agent_5"]["stance"] == 0.05 and "guarded" in records["agent_5"]


def test_dry_run_shows_rows_and_leaves_nothing(recipe, tmp_path, capsys):
    recipe.main([*SHORT, "--dry_run", "true", "--output_dir", str(tmp_path / "run")])
    output = capsys.readouterr().out
    assert "<assistant>" in output and "all parameters" in output and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--controls", "others"], "--controls others"), (["--stance", "1.5"], "--stance 1.5"),
        (["--goods", "500"], "more than there are words"), (["--rounds", "0"], "--rounds 0: at least 1"),
        (["--thoughts", "deep"], "--thoughts deep: broad or narrow"),
        (["--constrained", "0.1"], "--constrained is an agent of its own here"),
    ],
)  # fmt: skip
def test_bad_input_is_told_before_any_time_is_spent(recipe, tmp_path, flags, told):
    with pytest.raises(SystemExit) as stopped:
        recipe.main([*SHORT, *flags, "--output_dir", str(tmp_path / "run")])
    assert told in str(stopped.value) and not Path(tmp_path / "run").exists()
