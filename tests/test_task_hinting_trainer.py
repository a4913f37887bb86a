"""Scratch models, schedules, and the hinting trainer: equal steps however rows are cut, resume to the bit."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

from steerbook.data_builders.task_hinting import HintingDataArguments, build, make_stream
from steerbook.data_builders.task_hinting.arrays import NumpyArrays
from steerbook.data_builders.task_hinting.family import make_rows
from steerbook.data_builders.task_hinting.sorting import Sorting
from steerbook.trainers.task_hinting import LengthSoftmax, ScratchConfig, named_tokenizer, scratch_model
from steerbook.trainers.task_hinting.arrays import TorchArrays
from steerbook.trainers.task_hinting.schedules import Schedule, parse_weights
from steerbook.trainers.task_hinting.softmax import use_length_softmax
from steerbook.trainers.task_hinting.trainer import HintingConfig, HintingTrainer
from steerbook.trainers.tiny_lm import TinyConfig, build_tokenizer, new_model

ROWS = HintingDataArguments(values=20, longest=4, test_lengths=[4], main_rows=6, hint_rows=2, rows_seed=1)


@pytest.mark.parametrize("positions", ["none", "rope", "learned"])
def test_positions(positions):
    model = scratch_model(20, ScratchConfig(positions=positions, layers=1), 0, 40).eval()
    with torch.no_grad():  # larger than at the start, so that order shows
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
        ids = torch.randint(2, 20, (1, 12))
        other = torch.cat([ids[:, :-1].flip(1), ids[:, -1:]], dim=1)
        last, turned = (model(x).logits[0, -1] for x in (ids, other))
        places = torch.arange(12)[None]
        shifted = model(ids, position_ids=places + 5).logits
        plain = model(ids, position_ids=places).logits
    assert torch.allclose(last, turned, atol=1e-5) == (positions == "none"), "one layer without positions sees a set"
    assert torch.allclose(shifted, plain, atol=1e-4) == (positions != "learned")


def test_scratch_models_run_beyond_what_they_were_made_for_or_say_so():
    model = scratch_model(20, ScratchConfig(), 0, 10)
    assert model(torch.randint(2, 20, (1, 200))).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"learned positions for 64 tokens, and the longest test row has 75: raise"):
        scratch_model(20, ScratchConfig(positions="learned"), 0, 75)
    with pytest.raises(ValueError, match="unknown positions"):
        ScratchConfig(positions="alibi")
    with pytest.raises(ValueError, match="--hidden_size 30 is not a multiple of --heads 4"):
        ScratchConfig(hidden_size=30, heads=4)


def test_the_default_is_the_prototypes_size():
    """Spec 3.1: width 32, two layers of two heads, 64 inside; and a gate more a layer than there."""
    model = scratch_model(40, ScratchConfig(), 0, 80)
    assert sum(p.numel() for p in model.parameters()) == 2 * 40 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    again, other = scratch_model(40, ScratchConfig(), 0, 80), scratch_model(40, ScratchConfig(), 1, 80)
    first = next(model.parameters())
    assert torch.equal(first, next(again.parameters())) and not torch.equal(first, next(other.parameters()))


def test_tokenizer_names():
    names = Sorting(12).vocabulary
    tokenizer = named_tokenizer(names)
    assert tokenizer("3 11 0 =>")["input_ids"] == [names.index(name) for name in ("3", "11", "0", "=>")]
    assert tokenizer.decode([names.index("11"), names.index("=>")]) == "11 =>"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


@pytest.mark.parametrize("task", ["sort", "successor", "run", "fill", "restrict"])
def test_rows_made_by_torch_are_right_too(task):
    """Of questions that torch drew, NumPy's generator gives the same row, where nothing else is drawn."""
    family = Sorting(20, repetitions=True)
    arrays = TorchArrays([3, 4], "cpu")
    rows = make_rows(family, arrays, task, arrays.integers(1, 7, (50,)), 6, queries=1)
    names = family.vocabulary
    for ids, targets, n in zip(rows.ids.tolist(), rows.targets.tolist(), rows.lengths.tolist(), strict=True):
        listed = sorted(int(names[token]) for token in ids[:n])
        told = [names[token] for token, target in zip(ids, targets, strict=True) if target]
        if task in ("sort", "restrict"):
            assert told == [*map(str, listed), "<eos>"]
        elif task == "successor":
            x = int(names[ids[n + 1]])
            assert told == [str(min((y for y in listed if y > x), default="<eos>"))]
        elif task == "run":
            x = int(names[ids[n + 1]])
            assert told == [str(x)] * (listed.count(x) - 1) + [str(min((y for y in listed if y > x), default="<eos>"))]
        else:
            shown = [names[token] for token in ids[n + 1 : 2 * n + 1]]
            assert [told.pop(0) if word == "_" else word for word in shown] == [*map(str, listed)]
    other = TorchArrays([3, 5], "cpu")
    assert not torch.equal(TorchArrays([3, 4], "cpu").uniform((5,)), other.uniform((5,)))


def test_schedules_by_hand():
    at = {
        "0.25": {0: 0.25, 9: 0.25},
        "linear:2:6:1:3": {0: 1, 2: 1, 3: 1.5, 4: 2, 6: 3, 90: 3},
        "cosine:0:4:1:0": {0: 1, 1: (1 + math.cos(math.pi / 4)) / 2, 2: 0.5, 4: 0, 9: 0},
        "step:3:2:0.5": {0: 2, 2: 2, 3: 0.5, 9: 0.5},
        "first:3": {0: 0, 2: 0, 3: 1, 9: 1},
        "anneal:4": {0: 1, 1: 0.75, 4: 0, 9: 0},
    }
    for text, values in at.items():
        for step, value in values.items():
            assert Schedule.parse(text)(step) == pytest.approx(value), (text, step)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (["min=-1"], "finite and not negative"),
        (["min=nan"], "finite and not negative"),
        (["min=inf"], "finite and not negative"),
        (["min=linear:0:5:1:-1"], "finite and not negative"),
        (["min=linear:5:5:1:0"], "must be later"),
        (["min=anneal:0"], "before the first"),
        (["min=cubic:1"], "is no weight; give a number, or one of constant:V"),
        (["min=linear:1"], "is no weight"),
        (["min"], "give task=weight"),
        (["max=1"], "there are sort, min"),
        (["min=1", "min=2"], "is named twice"),
        (["sort=0"], "gives the main task sort nothing"),
        (["sort=step:5:0:0"], "gives the main task sort nothing"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        parse_weights(weights, ["sort", "min"], 100)


def config(folder, batch=8, accumulation=1, steps=4, **more):
    more = {"learning_rate": 0.05, "optim": "sgd", "lr_scheduler_type": "constant", "logging_steps": 1,
            "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True} | more  # fmt: skip
    return HintingConfig(
        str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=steps,
        **more,
    )  # fmt: skip


def trainer(folder, rows=ROWS, softmax=None, hints=None, **settings):
    stream = make_stream(rows, hints)
    model = scratch_model(len(stream.family.vocabulary), ScratchConfig(), 0, 40)
    if softmax is not None:
        use_length_softmax(model, softmax)
    callbacks = settings.pop("callbacks", None)
    return HintingTrainer(
        model, config(folder, **settings), stream=stream, processing_class=named_tokenizer(stream.family.vocabulary),
        callbacks=callbacks,
    )  # fmt: skip


def logs(trained, prefix):
    return [
        {key: value for key, value in entry.items() if key.startswith(prefix)}
        for entry in trained.state.log_history
        if "loss" in entry
    ]


@pytest.mark.parametrize("normalise", ["task_token", "task_row", "global_token"])
def test_steps_are_equal_however_rows_are_cut(tmp_path, normalise):
    """Spec 2.2: batch x accumulation 8 x 1, 2 x 4 and 4 x 2."""
    found = {}
    for batch, accumulation in ((8, 1), (2, 4), (4, 2)):
        trained = trainer(tmp_path, batch=batch, accumulation=accumulation, normalise=normalise)
        start = [parameter.detach().clone() for parameter in trained.model.parameters()]
        trained.train()
        end = [parameter.detach() for parameter in trained.model.parameters()]
        found[batch] = logs(trained, ("loss", "tokens", "rows", "weight")), start, end
    reference, start, end = found[8]
    moved = max(float((a - b).abs().max()) for a, b in zip(start, end, strict=True))
    for batch in (2, 4):
        for ours, theirs in zip(found[batch][0], reference, strict=True):
            assert ours.keys() == theirs.keys()
            assert ours["rows/sort"] == 6 and ours["rows/successor"] == 2 and ours["tokens/successor"] == 6
            assert all(ours[key] == pytest.approx(theirs[key], rel=1e-5) for key in ours)
        apart = max(float((a - b).abs().max()) for a, b in zip(found[batch][2], end, strict=True))
        assert apart < 1e-5 * moved, (apart, moved)


@pytest.mark.parametrize("normalise", ["task_token", "task_row", "global_token"])
def test_the_first_loss_by_hand(tmp_path, normalise):
    trained = trainer(tmp_path, steps=1, normalise=normalise, weights=["successor=0.5"])
    ids, targets, _, tasks = (torch.as_tensor(part) for part in trained.stream.step(0))
    with torch.no_grad():
        nats = -trained.model(ids).logits.double().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    seen = targets[:, 1:]
    means = {}
    for task, number in (("sort", 0), ("successor", 1)):
        rows = tasks == number
        if normalise == "task_token":
            means[task] = nats[rows][seen[rows]].mean()
        elif normalise == "task_row":
            means[task] = torch.stack([n[s].mean() for n, s in zip(nats[rows], seen[rows], strict=True)]).mean()
        else:
            means[task] = nats[rows][seen[rows]].sum() / seen.sum()
    trained.train()
    wanted = float(means["sort"] + 0.5 * means["successor"])
    assert trained.state.log_history[0]["loss"] == pytest.approx(wanted, rel=1e-5)


def test_weight_zero_is_training_without_the_hint(tmp_path):
    beside = trainer(tmp_path, weights=["successor=0"])
    alone = trainer(tmp_path, hints=[], batch=6)
    beside.train(), alone.train()
    for ours, theirs in zip(beside.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-6)


def test_schedules_reach_the_loss(tmp_path):
    trained = trainer(tmp_path, steps=4, weights=["successor=anneal:3", "sort=first:2"])
    trained.train()
    assert [entry["weight/successor"] for entry in logs(trained, "weight")] == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert [entry["weight/sort"] for entry in logs(trained, "weight")] == [0, 0, 1, 1]
    for entry in (entry for entry in trained.state.log_history if "loss" in entry):
        wanted = entry["weight/sort"] * entry["loss/sort"] + entry["weight/successor"] * entry["loss/successor"]
        assert entry["loss"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("mix", ["alternate", "random"])
def test_a_task_without_rows_in_a_step_adds_nothing(tmp_path, mix):
    rows = HintingDataArguments(**{**vars(ROWS), "mix": mix})
    trained = trainer(tmp_path, rows=rows, steps=6)
    trained.train()
    entries = [entry for entry in trained.state.log_history if "loss" in entry]
    for entry in entries:
        assert entry["rows/sort"] + entry["rows/successor"] == 8
        assert ("loss/sort" in entry) == (entry["rows/sort"] > 0)
        assert entry["loss"] == pytest.approx(entry.get("loss/sort", 0) + entry.get("loss/successor", 0), rel=1e-4)
    if mix == "alternate":
        assert [entry["rows/sort"] for entry in entries] == [8, 8, 0, 8, 8, 8]  # three of four turns


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            control.should_save = control.should_training_stop = True


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_goes_on_to_the_bit(tmp_path, accumulation):
    """The rows, the schedules' step and the learned softmax weights too."""
    settings = {"steps": 6, "optim": "adamw_torch", "lr_scheduler_type": "cosine", "batch": 8 // accumulation,
                "accumulation": accumulation, "weights": ["successor=anneal:5"],
                "softmax": LengthSoftmax("learn", 2.0)}  # fmt: skip
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    stopped = trainer(tmp_path / "parts", callbacks=[StopAt()], **settings)
    stopped.train()
    assert stopped.state.global_step == 3
    resumed = trainer(tmp_path / "parts", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    ours, theirs = logs(resumed, ("loss", "tokens", "weight")), logs(whole, ("loss", "tokens", "weight"))
    assert ours == theirs
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"rows_seed": 2}, "its seed was 1, now it is 2"), ({"values": 21}, "another stream of rows: its "),
     ({"main_rows": 5, "hint_rows": 3}, "its tasks was"), ({"mix": "random"}, "its mix was fixed, now it is random")],
)  # fmt: skip
def test_a_checkpoint_of_another_stream_is_refused(tmp_path, changes, message):
    trainer(tmp_path, callbacks=[StopAt()], steps=6).train()
    other = trainer(tmp_path, rows=replace(ROWS, **changes), steps=6)
    before = [parameter.clone() for parameter in other.model.parameters()]
    with pytest.raises(ValueError, match=message):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(a, b) for a, b in zip(before, other.model.parameters(), strict=True))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_gradient_cosine_by_hand(tmp_path, accumulation):
    """Of the whole step: its last micro-batch, cut off behind the main rows, has none of them."""
    trained = trainer(tmp_path, steps=2, gradient_cosine=2, batch=8 // accumulation, accumulation=accumulation)
    ids, targets, _, tasks = (torch.as_tensor(part) for part in trained.stream.step(0))
    gradients = []
    for number in (0, 1):
        rows = tasks == number
        labels = ids.masked_fill(~targets, -100)[rows]
        loss = trained.model(ids[rows], labels=labels).loss
        found = torch.autograd.grad(loss, list(trained.model.parameters()))
        gradients.append(torch.cat([g.flatten() for g in found]).double())
    wanted = float(gradients[0] @ gradients[1] / gradients[0].norm() / gradients[1].norm())
    trained.train()
    entries = [entry for entry in trained.state.log_history if "loss" in entry]
    assert entries[0]["cosine/successor"] == pytest.approx(wanted, rel=1e-4) and abs(wanted) < 0.99
    assert "cosine/successor" not in entries[1]


def test_softmax_by_items_is_told_them(tmp_path):
    trained = trainer(tmp_path, steps=1, softmax=LengthSoftmax("log", 3.0, "items"))
    trained.train()
    assert math.isfinite(trained.state.log_history[0]["loss"])


def test_it_learns(tmp_path):
    rows = HintingDataArguments(values=8, longest=3, test_lengths=[3], main_rows=24, hint_rows=8)
    trained = trainer(tmp_path, rows=rows, batch=32, steps=150, optim="adamw_torch", learning_rate=1e-2,
                      logging_steps=50)  # fmt: skip
    trained.train()
    first, *_, last = (entry for entry in trained.state.log_history if "loss/sort" in entry)
    assert last["loss/sort"] < 0.5 * first["loss/sort"] and last["loss/successor"] < 0.5 * first["loss/successor"]


@pytest.mark.parametrize("lora", [False, True])
def test_rows_of_text(tmp_path, lora):
    """A pretrained model's way: TRL's tokenising, full fine-tuning or LoRA."""
    data = build(HintingDataArguments(main="addition", hints=["carry"], longest=3, test_lengths=[3], test_rows=5,
                                      train_rows=48))  # fmt: skip
    tokenizer = build_tokenizer([row["prompt"] + row["completion"] for row in data["train"]], "byte")
    model = new_model(tokenizer, TinyConfig(layers=2), seed=0)
    trained = HintingTrainer(
        model, config(tmp_path, optim="adamw_torch", learning_rate=1e-3, weights=["carry=0.5"]), data["train"],
        main="addition", processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
    )  # fmt: skip
    trained.train()
    entry = trained.state.log_history[0]
    assert entry["loss"] == pytest.approx(entry["loss/addition"] + 0.5 * entry["loss/carry"], rel=1e-4)
    assert entry["rows/addition"] + entry["rows/carry"] == 8
    count = sum(p.requires_grad for p in trained.model.parameters())
    assert count == (2 * 7 * 2 if lora else len(list(trained.model.parameters())))


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"3 x --gradient_accumulation_steps 2 x 1 processes are 6 rows, but a step "
                                         r"has 8 \(6 sort \+ 2 successor\)"):  # fmt: skip
        trainer(tmp_path, batch=3, accumulation=2)
    with pytest.raises(ValueError, match="a stream has no end"):
        trainer(tmp_path, steps=-1)
    with pytest.raises(ValueError, match="packing puts rows of several tasks"):
        trainer(tmp_path, packing=True)
    with pytest.raises(ValueError, match="--gradient_cosine -1"):
        trainer(tmp_path, gradient_cosine=-1)
    stream = make_stream(ROWS)
    model = scratch_model(40, ScratchConfig(), 0, 40)
    with pytest.raises(ValueError, match="either train_dataset .* or stream"):
        HintingTrainer(model, config(tmp_path))
    rows = Dataset.from_list([{"prompt": "a", "completion": "b", "task": "sort"}])
    with pytest.raises(ValueError, match="either train_dataset .* or stream"):
        HintingTrainer(model, config(tmp_path), rows, stream=stream)
    with pytest.raises(ValueError, match="main='add' is the task of no row; there are sort"):
        HintingTrainer(model, config(tmp_path), rows, main="add")


def test_numpy_and_torch_hold_out_the_same_questions():
    from steerbook.data_builders.task_hinting.stream import held

    family, arrays = Sorting(12), NumpyArrays(5)
    rows = make_rows(family, arrays, "sort", arrays.integers(2, 7, (2000,)), 6)
    tensors = type(rows)(*(torch.as_tensor(part) for part in rows))
    ours, theirs = held(arrays, rows), held(TorchArrays([0], "cpu"), tensors)
    assert np.array_equal(ours, theirs.numpy()) and 50 < ours.sum() < 250


def test_checkpoints_are_plain_models(tmp_path):
    trained = trainer(tmp_path, steps=2, save_strategy="steps", save_steps=2)
    trained.train()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    for (name, ours), theirs in zip(trained.model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
