"""Fits that were interrupted, finished, or started again with something else."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_models import char_tokenizer, lofit_layers, logits, tiny
from transformers import TrainerCallback

from steerbook.trainers.fingerprint import model_fingerprint
from steerbook.trainers.lofit import HeadSelection, LofitConfig, LofitDPOConfig, LofitSFTConfig, stages
from steerbook.trainers.lofit.red import red_model
from steerbook.trainers.lofit.selection import top_heads
from steerbook.trainers.lofit.stages import fit, fit_scales, make_trainer

ROWS = Dataset.from_list(
    [
        {"id": str(i), "prompt": f"q: {w}? a:", "completion": f" {w[::-1]}", "chosen": f" {w[::-1]}", "rejected": " x"}
        for i, w in enumerate(["sky", "grass", "snow", "raven", "sun", "sea", "ice", "fire"])
    ]
)
OFFSETS = LofitConfig(heads=[(1, 0), (2, 3)], task_type="CAUSAL_LM")


def arguments(loss="sft", **changes):
    settings = {
        "output_dir": "unused", "use_cpu": True, "report_to": "none", "logging_steps": 1, "disable_tqdm": True,
        "per_device_train_batch_size": 4, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 2, "seed": 3,
        **changes,
    }  # fmt: skip
    return LofitDPOConfig(**settings) if loss == "dpo" else LofitSFTConfig(**settings)


def vectors(model) -> list[torch.Tensor]:
    return [
        rows[key].detach().clone()
        for layer in lofit_layers(model) for rows in (layer.lofit_scale, layer.lofit_offset) for key in rows
    ]  # fmt: skip


def assert_same(one, other):
    assert len(one) == len(other) > 0
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Killed(Exception):
    pass


class Kill(TrainerCallback):
    """Ends the run the hard way: after a step, before or after its checkpoint. Keeps the steps that were done."""

    def __init__(self, moment, step, done):
        self.moment, self.step, self.done = moment, step, done

    def on_step_end(self, args, state, control, **kwargs):
        self.done.append(state.global_step)
        if self.moment == "step" and state.global_step == self.step:
            raise Killed

    def on_save(self, args, state, control, **kwargs):
        if self.moment == "save" and state.global_step == self.step:
            raise Killed


@pytest.fixture
def kill(monkeypatch):
    """Makes the next fits die at a moment; called with None, they live. Returns the list of the steps they do."""

    def at(moment, step=0):
        done = []

        def dying(*args, **kwargs):
            trainer = make_trainer(*args, **kwargs)
            trainer.add_callback(Kill(moment, step, done))
            return trainer

        monkeypatch.setattr(stages, "make_trainer", dying)
        return done

    return at


def never(*args, **kwargs):
    raise AssertionError("trained again")


# One fit


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    def run(loss):
        out_dir = tmp_path_factory.mktemp("whole")
        return fit(tiny("llama"), char_tokenizer(), ROWS, arguments(loss), out_dir, peft_config=OFFSETS)

    return {loss: run(loss) for loss in ("sft", "dpo")}


@pytest.mark.parametrize(
    ("loss", "moment", "left"),
    [
        ("sft", ("step", 1), [1, 2, 3, 4, 5, 6]),  # before the first checkpoint
        ("sft", ("step", 3), [3, 4, 5, 6]),
        ("sft", ("save", 4), [5, 6]),
        ("sft", ("save", 6), []),  # after the last step, before the adapter is saved
        ("dpo", ("step", 5), [5, 6]),
    ],
)
def test_an_interrupted_fit_ends_with_the_same_tensors(loss, moment, left, tmp_path, kill, uninterrupted):
    whole = uninterrupted[loss]
    kill(*moment)
    with pytest.raises(Killed):
        fit(tiny("llama"), char_tokenizer(), ROWS, arguments(loss), tmp_path / "parts", peft_config=OFFSETS)
    done = kill(None)
    parts = fit(tiny("llama"), char_tokenizer(), ROWS, arguments(loss), tmp_path / "parts", peft_config=OFFSETS)
    assert done == left  # continued, not begun again
    assert_same(vectors(parts.model), vectors(whole.model))

    def losses(result):
        return [(entry["step"], entry["loss"]) for entry in result.log if "loss" in entry]

    assert losses(parts) == losses(whole) and len(losses(whole)) == 6


def test_a_damaged_newest_checkpoint_costs_only_its_steps(tmp_path, kill, uninterrupted):
    whole = uninterrupted["sft"]
    kill("save", 4)
    with pytest.raises(Killed):
        fit(tiny("llama"), char_tokenizer(), ROWS, arguments(), tmp_path / "parts", peft_config=OFFSETS)
    done = kill(None)
    weights = tmp_path / "parts" / "checkpoint-4" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    parts = fit(tiny("llama"), char_tokenizer(), ROWS, arguments(), tmp_path / "parts", peft_config=OFFSETS)
    assert done == [3, 4, 5, 6]
    assert_same(vectors(parts.model), vectors(whole.model))


@pytest.mark.parametrize("config", [OFFSETS, LoraConfig(r=2, task_type="CAUSAL_LM")], ids=["lofit", "lora"])
def test_a_finished_fit_is_loaded_not_repeated(config, tmp_path, monkeypatch):
    first = fit(tiny("llama"), char_tokenizer(), ROWS, arguments(), tmp_path / "run", peft_config=config)
    expected = logits(first.model.eval())
    monkeypatch.setattr(stages, "make_trainer", never)
    again = fit(tiny("llama"), char_tokenizer(), ROWS, arguments(), tmp_path / "run", peft_config=config)
    assert torch.equal(logits(again.model), expected)
    assert (again.log, again.seconds, again.trained) == (first.log, first.seconds, first.trained)
    assert first.trained == (24 if config is OFFSETS else 3 * (2 * 32 + 2 * 48 + 2 * 32 + 2 * 24))
    assert first.seconds > 0 and len([entry for entry in first.log if "loss" in entry]) == 6


def test_a_finished_folder_holds_no_path_and_no_pickled_arguments(tmp_path):
    fit(tiny("llama"), char_tokenizer(), ROWS, arguments(), tmp_path / "run", peft_config=OFFSETS)
    files = {path.name for path in (tmp_path / "run").iterdir() if path.is_file()}
    assert {"adapter_model.safetensors", "adapter_config.json", "finished.json"} <= files
    assert not {"training_args.bin", "README.md"} & files
    for name in ("adapter_config.json", "finished.json"):
        assert str(tmp_path) not in (tmp_path / "run" / name).read_text()


def test_arms_share_one_base(tmp_path):
    base = tiny("llama")
    before, fingerprint = logits(base), model_fingerprint(base)
    args = arguments(save_strategy="no")
    for name, config in (("a", OFFSETS), ("b", LoraConfig(r=2, task_type="CAUSAL_LM")), ("c", OFFSETS)):
        result = fit(base, char_tokenizer(), ROWS, args, tmp_path / name, peft_config=config)
        assert (logits(result.model.eval()) - before).abs().max() > 1e-3
        result.model.unload()
        assert torch.equal(logits(base.eval()), before) and model_fingerprint(base) == fingerprint
        assert "forward" not in vars(base)
    one, other = (json.loads((tmp_path / name / "finished.json").read_text())["log"] for name in "ac")
    assert [e["loss"] for e in one if "loss" in e] == [e["loss"] for e in other if "loss" in e]
    assert args.output_dir == "unused"  # the caller's arguments are not changed


def test_changes_apply_to_this_fit_only(tmp_path):
    args = arguments(save_strategy="no")
    seen = []
    for changes in ({"learning_rate": 1e-4}, {"max_steps": 2}, {}):
        result = fit(
            tiny("llama"), char_tokenizer(), ROWS, args, tmp_path / str(len(seen)), peft_config=OFFSETS, **changes
        )
        steps = [entry for entry in result.log if "loss" in entry]
        seen.append((len(steps), steps[0]["learning_rate"]))
    assert seen == [(6, 1e-4), (2, 1e-2), (6, 1e-2)]
    assert args.learning_rate == 1e-2 and args.max_steps == -1
    with pytest.raises(ValueError, match="'lerning_rate' is not a field of LofitSFTConfig"):
        fit(tiny("llama"), char_tokenizer(), ROWS, args, tmp_path / "x", peft_config=OFFSETS, lerning_rate=1.0)


def test_an_interrupted_red_fit_does_not_forget_its_bias(tmp_path, kill):
    """RED is two of PEFT's tuners in one model, and a PEFT checkpoint holds one adapter."""

    def trained(result):
        return [p.detach() for key, p in result.model.named_parameters() if "ia3_l" in key or "beft_bias" in key]

    whole = fit(red_model(tiny("llama")), char_tokenizer(), ROWS, arguments(), tmp_path / "whole")
    kill("step", 5)
    with pytest.raises(Killed):
        fit(red_model(tiny("llama")), char_tokenizer(), ROWS, arguments(), tmp_path / "parts")
    done = kill(None)
    parts = fit(red_model(tiny("llama")), char_tokenizer(), ROWS, arguments(), tmp_path / "parts")
    assert done == [5, 6]
    assert_same(trained(parts), trained(whole))


# Stage 1


def scales(model, folder, k=3, data="d1", loss="sft", **changes):
    return fit_scales(
        model, char_tokenizer(), ROWS, arguments(loss), folder, k=k, data_fingerprint=data, l1_lambda=1e-3,
        learning_rate=5e-3, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_stage_1_ranks_every_head_by_its_norm(loss, tmp_path):
    base = tiny("llama")
    before = logits(base)
    chosen = scales(base, tmp_path, loss=loss)
    assert torch.equal(logits(base.eval()), before) and not lofit_layers(base)
    assert {layer: len(row) for layer, row in chosen.scores.items()} == {0: 4, 1: 4, 2: 4}
    assert chosen.heads == top_heads(chosen.scores, 3)
    assert (chosen.k, chosen.seed, chosen.method, chosen.data_fingerprint) == (3, 3, "learned", "d1")
    assert chosen.base_fingerprint == model_fingerprint(base)
    assert HeadSelection.load(tmp_path / "heads.json") == chosen


def test_the_seed_of_a_stage_is_the_one_recorded(tmp_path):
    assert scales(tiny("llama"), tmp_path, seed=11).seed == 11


def test_a_finished_stage_1_is_not_repeated(tmp_path, monkeypatch):
    first = scales(tiny("llama"), tmp_path)
    monkeypatch.setattr(stages, "make_trainer", never)
    assert scales(tiny("llama"), tmp_path) == first
    fewer = scales(tiny("llama"), tmp_path, k=2)
    assert fewer.heads == first.heads[:2] and fewer.k == 2 and fewer.scores == first.scores
    with pytest.raises(ValueError, match="k=13"):
        scales(tiny("llama"), tmp_path, k=13)


def test_stage_1_stopped_between_fit_and_file_only_ranks(tmp_path, monkeypatch):
    first = scales(tiny("llama"), tmp_path)
    (tmp_path / "heads.json").unlink()
    monkeypatch.setattr(stages, "make_trainer", never)
    assert scales(tiny("llama"), tmp_path) == first


def test_an_interrupted_stage_1_chooses_the_same_heads(tmp_path, kill):
    whole = scales(tiny("llama"), tmp_path / "whole")
    kill("step", 3)
    with pytest.raises(Killed):
        scales(tiny("llama"), tmp_path / "parts")
    assert not (tmp_path / "parts" / "heads.json").exists()
    done = kill(None)
    assert scales(tiny("llama"), tmp_path / "parts") == whole and done == [3, 4, 5, 6]


def test_other_data_or_another_base_are_refused(tmp_path):
    scales(tiny("llama"), tmp_path)
    with pytest.raises(ValueError, match="other training rows.*d1.*d2"):
        scales(tiny("llama"), tmp_path, data="d2")
    with pytest.raises(ValueError, match="select again"):
        scales(tiny("llama", seed=1), tmp_path)


def test_a_broken_heads_file_is_an_error_and_stays(tmp_path):
    scales(tiny("llama"), tmp_path)
    (tmp_path / "heads.json").write_text('{"heads": [[')
    with pytest.raises(ValueError, match="not a head selection"):
        scales(tiny("llama"), tmp_path)
    assert (tmp_path / "heads.json").read_text() == '{"heads": [['
