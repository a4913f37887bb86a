"""eval/report.py: what stands in a run folder after success, failure, interruption and a full disk."""

from __future__ import annotations

import errno
import json
import os
import re
import runpy
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from steerbook.eval import report
from steerbook.eval.model_card import model_card
from steerbook.eval.report import RunFolder, format_interval, results_table
from steerbook.files import replacing, to_json, write_json

METRIC = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 4}


def read(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def finish(folder: Path, **arguments) -> None:
    with RunFolder(folder, recipe="lofit", arguments=arguments) as run:
        run.update(metrics={"after": {"mc1": METRIC}})


def test_a_finished_run(tmp_path):
    folder = tmp_path / "runs" / "one"
    defaults = {"dataset": "myths", "seed": 0, "rate": 0.1}
    arguments = {"dataset": "mquake", "seed": 0, "rate": 0.1}
    with RunFolder(folder, recipe="lofit", arguments=arguments, defaults=defaults, toy=True) as run:
        assert not run.finished
        assert read(folder)["status"] == "running"  # recorded before any work is done
        run.data("abc", {"train": 3})
        run.update(base_model={"name": "org/base", "revision": "1a2b"}, trainable_parameters=np.int64(40))
        run.update(metrics={"before": {"mc1": METRIC}}, cost={"seconds": np.float32(1.5)})
        run.update(metrics={"after": {"mc1": METRIC}})
        run.samples([{"id": "1", "text": "/not/a/path\næ"}, {"id": "2", "score": np.float64(0.5)}])
    results = read(folder)
    assert results["schema"] == report.SCHEMA and results["recipe"] == "lofit" and results["toy"] is True
    assert results["status"] == "finished" and "error" not in results
    assert results["arguments"] == {"dataset": "mquake"}  # what differs from the defaults
    assert results["data"] == {"fingerprint": "abc", "counts": {"train": 3}}
    assert set(results["metrics"]) == {"before", "after"}  # merged
    assert results["trainable_parameters"] == 40 and results["cost"] == {"seconds": 1.5}
    environment = results["environment"]
    assert environment["versions"]["torch"] == metadata.version("torch") and environment["world_size"] == 1
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert samples == [{"id": "1", "text": "/not/a/path\næ"}, {"id": "2", "score": 0.5}]
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "results.json", "samples.jsonl"]


def test_a_finished_run_is_never_changed(tmp_path):
    finish(tmp_path / "run", seed=1)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with RunFolder(tmp_path / "run", recipe="lofit", arguments={"seed": 1}) as run:
        assert run.finished and run.results["metrics"]["after"]["mc1"] == METRIC
        for change in (lambda: run.update(metrics={}), lambda: run.samples([])):
            with pytest.raises(RuntimeError, match="holds a finished run, which is never changed"):
                change()
        run.data("abc", {"train": 3})  # what it was made of
        with pytest.raises(FileExistsError, match="holds results for other data"):
            run.data("x", {"train": 3})
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_other_arguments_are_refused_with_the_differences(tmp_path):
    finish(tmp_path / "run", seed=1, rate=0.1, dataset="myths")
    before = (tmp_path / "run" / "results.json").read_bytes()
    with pytest.raises(FileExistsError) as caught:
        RunFolder(tmp_path / "run", recipe="atlas", arguments={"seed": 2, "dataset": "myths", "k": 3}, toy=True)
    message = str(caught.value)
    assert "seed: 1 then, 2 now" in message and "rate: 0.1 then, '(default)' now" in message
    assert "k: '(default)' then, 3 now" in message and "recipe: 'lofit' then, 'atlas' now" in message
    assert "toy: False then, True now" in message and "dataset" not in message
    assert (tmp_path / "run" / "results.json").read_bytes() == before


def test_an_unfinished_run_continues_with_what_it_has(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with RunFolder(tmp_path / "run", recipe="lofit", arguments={"seeds": [0, 1]}) as run:
            run.data("abc", {"train": 3})
            run.update(metrics={"seed 0": METRIC})
            raise KeyboardInterrupt
    assert read(tmp_path / "run")["status"] == "interrupted"
    with RunFolder(tmp_path / "run", recipe="lofit", arguments={"seeds": (0, 1)}) as run:  # a tuple is the same list
        assert not run.finished
        run.data("abc", {"train": 3})
        with pytest.raises(FileExistsError, match="results for other data"):
            run.data("xyz", {"train": 3})
        run.update(metrics={"seed 1": METRIC})
    results = read(tmp_path / "run")
    assert results["status"] == "finished" and "error" not in results
    assert set(results["metrics"]) == {"seed 0", "seed 1"}


@pytest.mark.parametrize(
    "error, status",
    [
        (ValueError("no"), "failed"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(2), "failed"),
        (SystemExit(), "interrupted"),
    ],
)
def test_the_error_is_recorded_and_goes_on(tmp_path, error, status):
    with pytest.raises(type(error)) as caught:
        with RunFolder(tmp_path / "run", recipe="lofit", arguments={}) as run:
            run.update(metrics={"before": METRIC})
            raise error
    assert caught.value is error
    results = read(tmp_path / "run")
    assert results["status"] == status and results["error"].startswith(type(error).__name__)
    assert results["metrics"] == {"before": METRIC}
    assert status in (tmp_path / "run" / "README.md").read_text()


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match=r"is not empty and holds no results.json \(it has thesis.tex\)"):
        RunFolder(tmp_path, recipe="lofit", arguments={})
    (tmp_path / "thesis.tex").rename(tmp_path / ".results.json.123.tmp")  # the rest of an interrupted write
    with RunFolder(tmp_path, recipe="lofit", arguments={}):
        pass
    assert read(tmp_path)["status"] == "finished"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema": 1}', '{"schema": 99, "recipe": "x", "status": "finished"}']
)
def test_a_damaged_report_is_refused_and_kept(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match="is not a readable results.json"):
        RunFolder(tmp_path, recipe="lofit", arguments={})
    assert (tmp_path / "results.json").read_text() == text


# --- full disk -------------------------------------------------------------------------------------------------------


class FullDisk:
    """Stands for ``os.fsync`` or ``os.replace`` on a full disk, from the given call on."""

    def __init__(self, real, good: int = 0) -> None:
        self.real, self.good = real, good

    def __call__(self, *arguments):
        if self.good:
            self.good -= 1
            return self.real(*arguments)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_full_disk_keeps_the_earlier_file(tmp_path, monkeypatch, name):
    path = tmp_path / "results.json"
    write_json(path, {"good": 1})
    with monkeypatch.context() as patch:
        patch.setattr(report.os, name, FullDisk(getattr(os, name)))
        with pytest.raises(OSError, match=r"no space left to write .*results.json \([\d.]+ MB free\)") as caught:
            write_json(path, {"good": 2})
        assert caught.value.errno == errno.ENOSPC and "the earlier file is unchanged" in str(caught.value)
        with pytest.raises(OSError, match="nothing was written"):
            write_json(tmp_path / "new.json", {})
    assert json.loads(path.read_text()) == {"good": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]  # no temporary files


def test_full_disk_in_the_middle_of_a_file(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text("old\n")
    with pytest.raises(OSError, match="no space left"):
        with replacing(path) as file:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "old\n" and [p.name for p in tmp_path.iterdir()] == ["samples.jsonl"]


def test_full_disk_does_not_hide_the_first_error(tmp_path, monkeypatch, capsys):
    with pytest.raises(ZeroDivisionError):
        with RunFolder(tmp_path / "run", recipe="lofit", arguments={}) as run:
            run.update(metrics={"before": METRIC})
            monkeypatch.setattr(report.os, "fsync", FullDisk(os.fsync))
            _ = 1 / 0
    assert "could not record the status 'failed'" in capsys.readouterr().err
    assert read(tmp_path / "run")["metrics"] == {"before": METRIC}


def test_disk_full_at_the_end_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="no space left"):
        with RunFolder(tmp_path / "run", recipe="lofit", arguments={}):
            monkeypatch.setattr(report.os, "fsync", FullDisk(os.fsync))
    assert read(tmp_path / "run")["status"] == "running"


# --- values ----------------------------------------------------------------------------------------------------------


def test_numbers_that_are_none_are_refused_by_key(tmp_path):
    with RunFolder(tmp_path / "run", recipe="lofit", arguments={}) as run:
        for bad in (float("nan"), np.float32("inf")):
            with pytest.raises(ValueError, match=r"metrics.after.mc1.value is (nan|inf)"):
                run.update(metrics={"after": {"mc1": {"value": bad}}})
        with pytest.raises(ValueError, match=r"sample 1.true\[0\] is nan"):
            run.samples([{"id": "1"}, {"true": [float("nan")]}])
        with pytest.raises(TypeError, match="cost.seconds is of type Tensor"):
            run.update(cost={"seconds": torch.tensor(1.0)})
        with pytest.raises(ValueError, match="no section 'metric'; known: base_model"):
            run.update(metric={})
    assert "metrics" not in read(tmp_path / "run") and not (tmp_path / "run" / "samples.jsonl").exists()


def test_no_secrets_and_no_machine_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = {
        "hub_token": "hf_secret",
        "data_files": ["/home/somebody/data/train.csv", "test=/home/somebody/data/test.csv"],
        "output": str(tmp_path / "runs" / "x"),
        "dataset_id": "org/name",
        "config": Path("/home/somebody/c.yaml"),
    }
    with pytest.raises(FileNotFoundError):
        with RunFolder("run", recipe="lofit", arguments=arguments) as run:
            run.update(base_model={"name": "/home/somebody/models/llama", "folder": "../base"})
            raise FileNotFoundError("no /home/somebody/data/gone.csv, see https://example.org/a/b or ~/x/y")
    results = read(Path("run"))
    assert results["arguments"] == {
        "data_files": ["train.csv", "test=test.csv"],
        "output": "runs/x",
        "dataset_id": "org/name",
        "config": "c.yaml",
    }
    assert results["base_model"] == {"name": "llama", "folder": "../base"}
    assert results["error"] == "FileNotFoundError: no gone.csv, see https://example.org/a/b or y"
    for file in Path("run").iterdir():
        text = file.read_text()
        assert "somebody" not in text and "hf_secret" not in text and str(tmp_path) not in text


def test_only_rank_0_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with RunFolder(tmp_path / "run", recipe="lofit", arguments={}) as run:
        run.update(metrics={"after": METRIC})
        run.samples([{"id": "1"}])
        results_table([{"a": "1"}], ["a"], "t")
    assert list((tmp_path / "run").iterdir()) == [] and capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    finish(tmp_path / "run")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(FileExistsError, match="other arguments"):  # every rank stops
        RunFolder(tmp_path / "run", recipe="lofit", arguments={"seed": 3})


def test_to_json():
    value = {"a": (1, np.int32(2)), 3: None, "b": [True, np.bool_(False).item()], "c": np.float64(0.5)}
    assert to_json(value, "x") == {"a": [1, 2], "3": None, "b": [True, False], "c": 0.5}
    with pytest.raises(TypeError, match="x.a is of type set"):
        to_json({"a": {1}}, "x")


# --- what people read ------------------------------------------------------------------------------------------------


def test_format_interval():
    assert format_interval(METRIC) == "0.500 [0.250, 0.750]"
    assert format_interval(METRIC, scale=100, digits=1) == "50.0 [25.0, 75.0]"
    assert format_interval({"value": 2.0, "low": None, "high": None, "n": 1}) == "2.000"


def test_results_table(capsys):
    results_table([{"method": "base", "mc1": "0.4"}, {"method": "lofit"}], ["method", "mc1"], "Held-out questions")
    shown = capsys.readouterr().out
    assert "Held-out questions" in shown and "base" in shown and "0.4" in shown and "lofit" in shown


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_model_card(tmp_path):
    with RunFolder(tmp_path / "run", recipe="lofit", arguments={"dataset": "truthfulqa"}) as run:
        run.figure("heads").write_bytes(b"png")
        run.update(
            base_model={"name": "meta-llama/Llama-2-7b-hf", "revision": "01c7f73"},
            adapter="adapter",
            trainable_parameters=4096,
            metrics={
                "before": {"mc1": METRIC},
                "baselines": {"LoRA": {"mc1": METRIC | {"low": None, "high": None}, "mc2": METRIC}},
                "overlap": {"k=5": {"observed": 1.5}},
            },
            claims=[{"claim": "LoFiT gains 75 points", "supported": False, "detail": "58 to 99"}],
        )
    card = (tmp_path / "run" / "README.md").read_text()
    assert front_matter(card) == {
        "base_model": "meta-llama/Llama-2-7b-hf",
        "library_name": "peft",
        "tags": ["steerbook", "lofit"],
    }
    assert "| method | mc1 | mc2 |" in card and "| before | 0.5 [0.25, 0.75] |  |" in card
    assert "| LoRA | 0.5 | 0.5 [0.25, 0.75] |" in card and "- overlap / k=5 / observed: 1.5" in card
    assert "![heads](figures/heads.png)" in card and "4,096" in card and "A toy" not in card
    assert (
        "- **not supported**: LoFiT gains 75 points (58 to 99)" in card
        and "dataset: truthfulqa" in card
        and "revision='01c7f73'" in card
    )


def test_the_code_of_the_card_runs(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    base = LlamaForCausalLM(config)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    folder = tmp_path / "run"
    with RunFolder(folder, recipe="lofit", arguments={}, toy=True) as run:
        base.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        tuned = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        tuned.save_pretrained(folder / "adapter")
        run.update(base_model={"name": "tiny", "revision": None, "folder": "base"}, adapter="adapter")
    card = (folder / "README.md").read_text()
    assert "A toy" in card and "base_model" not in front_matter(card) and "toy" in front_matter(card)["tags"]
    (tmp_path / "snippet.py").write_text(re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1))
    monkeypatch.chdir(folder)
    loaded = runpy.run_path(str(tmp_path / "snippet.py"))["model"].eval()
    ids = torch.tensor([[0, 1, 2]])
    assert torch.allclose(loaded(ids).logits, tuned.eval()(ids).logits, atol=1e-6)


def test_a_card_has_a_table_for_each_set_of_metrics_and_no_endless_lists():
    """Sections with a metric in common share a table; what would take more than thirty lines stays in results.json."""
    metrics = {
        "before": {"em": METRIC},
        "others": {"hint": {"em": METRIC}},
        "tokens": {"hint": {"tokens": METRIC}, "plain": {"tokens": METRIC}},
        "short": {str(n): n for n in range(5)},
        "long": {str(n): n for n in range(60)},
    }
    base = {"recipe": "x", "status": "finished", "toy": True}
    card = model_card(base | {"metrics": metrics})
    assert card.count("| method |") == 2 and "| method | em |" in card and "| method | tokens |" in card
    assert (
        card.index("| before |") < card.index("| hint |") < card.index("| method | tokens |") < card.index("| plain |")
    )
    assert "- short / 4: 4" in card and "- long: in `results.json`" in card and "long / 7" not in card
    whole = {"folder": "seed_0/a/model", "module": "json", "function": "loads"}
    assert "from json import loads" in model_card(base | {"model": whole})
