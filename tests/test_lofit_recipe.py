"""recipes/lofit.py as a user runs it: `accelerate launch`, the smoke preset, the files it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import steerbook  # noqa: F401  (registers LoFiT with PEFT, as the model card says)

ROOT = Path(__file__).parents[1]


def launch(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", "recipes/lofit.py", *flags]
    return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe") / "smoke"
    done = launch("--preset", "smoke", "--output_dir", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def test_smoke_shows_an_honest_table(smoke):
    folder, output = smoke
    results = json.loads((folder / "results.json").read_text())
    assert results["status"] == "finished" and results["toy"] is True and results["recipe"] == "lofit"
    before, after = results["metrics"]["before"]["MC1"], results["metrics"]["after"]["MC1"]
    assert before["value"] <= 0.3 and after["value"] >= before["value"] + 0.2
    assert before["n"] == after["n"] == 60 and before["low"] <= before["value"] <= before["high"]
    assert {"marker prompt", "random heads 12 %", "LoRA r=8"} <= set(results["metrics"]["baselines"])
    assert results["claims"] == []  # one seed judges nothing, and the screen says so
    assert "Claims are judged from three seeds on" in output and "shows nothing about large models" in output
    assert str(folder.parent) not in (folder / "results.json").read_text()
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {(s["arm"], s["split"]) for s in samples} >= {("base", "test"), ("lofit_k3", "test_relations")}
    mean = [s["metrics"]["mc1"] for s in samples if s["arm"] == "lofit_k3" and s["split"] == "test"]
    assert sum(mean) / len(mean) == pytest.approx(after["value"])


def test_smoke_leaves_a_usable_adapter_and_figures(smoke):
    folder, _ = smoke
    results = json.loads((folder / "results.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(folder / results["base_model"]["folder"])
    tokenizer = AutoTokenizer.from_pretrained(folder / results["base_model"]["folder"])
    model = PeftModel.from_pretrained(base, folder / results["adapter"])
    assert sum(p.numel() for n, p in model.named_parameters() if "lofit_offset" in n) == 30

    from steerbook.data_builders.lofit import LofitDataArguments, build
    from steerbook.eval.lofit import evaluate

    rows = build(LofitDataArguments(world="smoke", rows_seed=42))["test"]
    found = evaluate(model, tokenizer, rows)["metrics"]["mc1"]["value"]
    assert found == pytest.approx(results["metrics"]["after"]["MC1"]["value"])
    assert {path.name for path in (folder / "figures").glob("*.png")} == {
        "methods.png", "heads_seed_42.png", "loss_seed_42.png"}  # fmt: skip
    card = (folder / "README.md").read_text()
    assert "A toy" in card and "import steerbook" in card and "figures/methods.png" in card


def test_a_finished_folder_is_shown_not_overwritten(smoke):
    folder, _ = smoke
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = launch("--preset", "smoke", "--output_dir", str(folder))
    assert again.returncode == 0 and "is finished" in again.stdout and "LoFiT 12 %" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
