"""The trainers against the objective written out by hand on the untouched model."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_models import (
    ARCHITECTURES,
    HEADS,
    LAYERS,
    char_tokenizer,
    lofit_layers,
    randomise,
    tiny,
    tiny_llama,
)
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from steerbook.trainers.checkpoints import newest_complete_checkpoint
from steerbook.trainers.lofit import (
    LofitConfig,
    LofitDPOConfig,
    LofitDPOTrainer,
    LofitSFTConfig,
    LofitSFTTrainer,
)
from steerbook.trainers.training import NonFiniteError

SFT = [
    {"prompt": f"q: {question}? a:", "completion": answer}
    for question, answer in [
        ("sky", " blue"), ("the grass", " green, mostly"), ("snow", " white"), ("a raven", " black"), ("sun", " y"),
        ("sea water", " salty"), ("ice", " cold as ever"), ("fire", " hot"), ("rain", " wet"), ("an owl", " wise"),
    ]
]  # fmt: skip
DPO = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": SFT[(i + 3) % 10]["completion"]}
    for i, row in enumerate(SFT)
]
BETA = 0.5
LAMBDA = 0.02
SETTINGS = {
    "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
    "l1_lambda": 0.0, "num_train_epochs": 1,
}  # fmt: skip
ALL_HEADS = [(layer, head) for layer in range(LAYERS) for head in range(4)]


class Record(TrainerCallback):
    """Gradients as they reach the optimiser, and everything that was logged."""

    def __init__(self):
        self.gradients, self.logs = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(logs)


def make(loss, out_dir, model=None, rows=8, peft_config="default", callbacks=(), eval_rows=None, **changes):
    """A trainer that takes the rows in order; `rows` may be a list or a number of the rows above."""
    data = (DPO if loss == "dpo" else SFT)[:rows] if isinstance(rows, int) else rows
    if peft_config == "default":
        peft_config = LofitConfig(component="scale", heads=None, init_std=0.3, task_type="CAUSAL_LM")
    config, trainer = (LofitDPOConfig, LofitDPOTrainer) if loss == "dpo" else (LofitSFTConfig, LofitSFTTrainer)
    return trainer(
        model if model is not None else tiny("llama"),
        args=config(output_dir=str(out_dir), **{**SETTINGS, "train_sampling_strategy": "sequential", **changes}),
        train_dataset=Dataset.from_list(data),
        eval_dataset=Dataset.from_list(eval_rows) if eval_rows else None,
        processing_class=char_tokenizer(),
        peft_config=peft_config,
        callbacks=list(callbacks),
    )


class ByHand:
    """LoFiT's objective in float64, a row at a time without padding, on the base with hooks."""

    def __init__(self, trainer, base=None, dtype=torch.float64):
        self.base = (base or tiny("llama")).to(dtype)
        self.tokenizer = char_tokenizer()
        self.parameters = []
        for index, layer in zip(self.layers_with_heads(trainer), lofit_layers(trainer.model), strict=True):
            rows = {}
            for kind, values in (("scale", layer.lofit_scale), ("offset", layer.lofit_offset)):
                if "default" in values:
                    rows[kind] = values["default"].detach().to(dtype).clone().requires_grad_()
                    self.parameters.append(rows[kind])
            projection = self.base.get_submodule(ARCHITECTURES["llama"].projection.format(index))
            projection.register_forward_pre_hook(self.edit(rows, layer.selected["default"]))
        self.tuned = True

    @staticmethod
    def layers_with_heads(trainer):
        heads = trainer.model.peft_config["default"].heads or ALL_HEADS
        return sorted({layer for layer, _ in heads})

    def edit(self, rows, heads):
        def hook(module, args):
            if not self.tuned:
                return args
            pieces = list(args[0].split(12, dim=-1))
            for row, head in enumerate(heads):
                if "scale" in rows:
                    pieces[head] = pieces[head] * (1 + rows["scale"][row])
                if "offset" in rows:
                    pieces[head] = pieces[head] + rows["offset"][row]
            return (torch.cat(pieces, -1),)

        return hook

    def logprobs(self, prompt, completion):
        """Of the completion's tokens, EOS included."""
        start = len(prompt)  # one token a character
        ids = self.tokenizer(prompt + completion)["input_ids"] + [self.tokenizer.eos_token_id]
        scores = self.base(torch.tensor([ids])).logits[0].log_softmax(-1)
        return torch.stack([scores[t - 1, ids[t]] for t in range(start, len(ids))])

    def reference(self, prompt, completion):
        self.tuned = False
        with torch.no_grad():
            value = self.logprobs(prompt, completion).sum()
        self.tuned = True
        return value

    def loss(self, rows):
        """Of one optimiser step: SFT averages over all its tokens, DPO over its pairs."""
        if "completion" in rows[0]:
            tokens = torch.cat([self.logprobs(row["prompt"], row["completion"]) for row in rows])
            return -tokens.mean()
        total = 0
        for row in rows:
            chosen, rejected = (
                self.logprobs(row["prompt"], row[kind]).sum() - self.reference(row["prompt"], row[kind])
                for kind in ("chosen", "rejected")
            )
            total = total - logsigmoid(BETA * (chosen - rejected))
        return total / len(rows)

    def gradients(self, rows, l1=0.0):
        found = torch.autograd.grad(self.loss(rows), self.parameters)
        return [g + l1 * p.detach().sign() for g, p in zip(found, self.parameters, strict=True)]


def assert_gradients(got, expected):
    largest = max(g.abs().max().item() for g in expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=2e-6 * max(1.0, largest))


# The penalty: exactly once per optimiser step


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointing", "reentrant"])
@pytest.mark.parametrize(("batch", "steps"), [(8, 1), (4, 2), (2, 4)])
@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_the_gradient_holds_the_penalty_once(loss, batch, steps, checkpointing, tmp_path):
    record = Record()
    changes = {}
    if checkpointing is not None:
        changes = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
    trainer = make(
        loss, tmp_path, callbacks=[record], per_device_train_batch_size=batch, gradient_accumulation_steps=steps,
        l1_lambda=LAMBDA, learning_rate=0.0, max_grad_norm=0.0, **changes,
    )  # fmt: skip
    hand = ByHand(trainer)
    rows = (DPO if loss == "dpo" else SFT)[:8]
    expected = hand.gradients(rows, LAMBDA)
    trainer.train()
    assert len(record.gradients) == 1
    assert_gradients(record.gradients[0], expected)
    penalty = LAMBDA * sum(p.abs().sum().item() for p in hand.parameters)
    assert record.logs[0]["loss"] == pytest.approx(hand.loss(rows).item(), abs=2e-5)  # the task's alone
    assert record.logs[0]["l1_penalty"] == pytest.approx(penalty, rel=1e-5) and penalty > 0.1
    assert all(layer.l1_coefficient == 0.0 for layer in lofit_layers(trainer.model))


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_an_incomplete_last_window_holds_it_once_too(loss, tmp_path):
    record = Record()
    trainer = make(
        loss, tmp_path, rows=10, callbacks=[record], per_device_train_batch_size=2, gradient_accumulation_steps=4,
        l1_lambda=LAMBDA, learning_rate=0.0, max_grad_norm=0.0,
    )  # fmt: skip
    hand = ByHand(trainer)
    trainer.train()
    rows = DPO if loss == "dpo" else SFT
    assert len(record.gradients) == 2  # four micro-batches, then the one that is left
    assert_gradients(record.gradients[0], hand.gradients(rows[:8], LAMBDA))
    assert_gradients(record.gradients[1], hand.gradients(rows[8:], LAMBDA))


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_eval_loss_is_without_the_penalty(loss, tmp_path):
    rows = DPO if loss == "dpo" else SFT
    trainer = make(loss, tmp_path, eval_rows=rows[5:], l1_lambda=5.0, per_device_eval_batch_size=5)
    hand = ByHand(trainer)
    measured = trainer.evaluate()
    assert measured["eval_loss"] == pytest.approx(hand.loss(rows[5:]).item(), abs=2e-5)
    assert "eval_l1_penalty" not in measured


def test_nothing_is_added_outside_a_training_step(tmp_path):
    trainer = make("sft", tmp_path, l1_lambda=5.0)
    layer = lofit_layers(trainer.model)[0]
    z = torch.randn(2, 3, 48)
    layer(z).sum().backward()
    expected = (torch.ones(6, 32) @ layer.base_layer.weight * z.reshape(6, 48)).sum(0).view(4, 12)
    torch.testing.assert_close(layer.lofit_scale["default"].grad, expected)


@pytest.mark.parametrize("component", ["scale", "offset", "both"])
def test_ten_steps_equal_a_plain_loop(component, tmp_path):
    config = LofitConfig(component=component, heads=HEADS, init_std=0.3, task_type="CAUSAL_LM")
    record = Record()
    l1 = 0.0 if component == "offset" else 0.3  # strong enough that clipping matters
    trainer = make(
        "sft", tmp_path, peft_config=config, callbacks=[record], per_device_train_batch_size=4, num_train_epochs=5,
        learning_rate=1e-2, l1_lambda=l1,
    )  # fmt: skip
    hand = ByHand(trainer, dtype=torch.float32)
    optimizer = torch.optim.AdamW(hand.parameters, lr=1e-2, weight_decay=0.0)
    losses, norms = [], []
    for step in range(10):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (10 - step) / 10
        rows = SFT[:4] if step % 2 == 0 else SFT[4:8]
        loss = hand.loss(rows)
        loss.backward()
        scales = {"scale": hand.parameters, "offset": [], "both": hand.parameters[::2]}[component]
        for p in scales:
            p.grad += l1 * p.detach().sign()
        norms.append(torch.nn.utils.clip_grad_norm_(hand.parameters, 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    trainer.train()
    got = [p for p in trainer.model.parameters() if p.requires_grad]
    for one, other in zip(got, hand.parameters, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=0, atol=1e-5)
    steps = [log for log in record.logs if "grad_norm" in log]
    assert [log["loss"] for log in steps] == pytest.approx(losses, abs=2e-4)  # TRL rounds what it logs
    assert [float(log["grad_norm"]) for log in steps] == pytest.approx(norms, rel=1e-4)
    assert losses[-1] < losses[0] and (not l1 or max(norms) > 1)


# DPO's reference is the untouched base


@pytest.mark.parametrize("route", ["peft_config", "PeftModel", "precomputed"])
def test_the_reference_is_the_clean_base(route, tmp_path):
    config = LofitConfig(component="both", heads=HEADS, init_std=0.3, task_type="CAUSAL_LM")
    record = Record()
    changes = {"callbacks": [record], "learning_rate": 0.0}
    if route == "PeftModel":
        model = get_peft_model(tiny("llama"), config)
        randomise(model)
        given = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        trainer = make("dpo", tmp_path, model=model, peft_config=None, **changes)
        kept = [p.detach() for p in trainer.model.parameters() if p.requires_grad]
        assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))
        assert list(trainer.model.peft_config) == ["default"]
    else:
        trainer = make("dpo", tmp_path, peft_config=config, precompute_ref_log_probs=route == "precomputed", **changes)
    hand = ByHand(trainer)
    if route != "precomputed":
        batch = next(iter(trainer.get_train_dataloader()))
        chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
        for row, a, b in zip(DPO, chosen.tolist(), rejected.tolist(), strict=False):
            assert a == pytest.approx(hand.reference(row["prompt"], row["chosen"]).item(), abs=1e-4)
            assert b == pytest.approx(hand.reference(row["prompt"], row["rejected"]).item(), abs=1e-4)
    trainer.train()
    first = hand.loss(DPO[:8]).item()
    assert abs(first - math.log(2)) > 1e-2  # what a reference that starts as the policy would give
    assert record.logs[0]["loss"] == pytest.approx(first, abs=2e-5)


def test_the_first_loss_at_the_identity_is_ln_2(tmp_path):
    record = Record()
    config = LofitConfig(heads=HEADS, init_std=0.0, task_type="CAUSAL_LM")
    make("dpo", tmp_path, peft_config=config, callbacks=[record], max_steps=1).train()
    assert record.logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_precomputing_with_a_peft_model_is_refused(tmp_path):
    model = get_peft_model(tiny("llama"), LofitConfig(heads=HEADS, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="peft_config=LofitConfig"):
        make("dpo", tmp_path, model=model, peft_config=None, precompute_ref_log_probs=True)


# Numbers that stop being numbers, interruption, precision


class Poison(TrainerCallback):
    def __init__(self, moment, step):
        self.moment, self.step = moment, step

    def spoil(self, moment, state, model):
        if moment == self.moment and state.global_step == self.step:
            next(p for p in model.parameters() if p.requires_grad).data[0, 0] = float("nan")

    def on_save(self, args, state, control, model=None, **kwargs):
        self.spoil("saved", state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.spoil("stepped", state, model)


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_a_nan_loss_stops_with_the_step_and_the_way_out(loss, tmp_path):
    trainer = make(
        loss, tmp_path, callbacks=[Poison("saved", 2)], per_device_train_batch_size=2, save_strategy="steps",
        save_steps=1, l1_lambda=LAMBDA,
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match=r"nan at step 3 .*--learning_rate"):
        trainer.train()
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert all(layer.l1_coefficient == 0.0 for layer in lofit_layers(trainer.model))


def test_nan_weights_are_never_saved(tmp_path):
    trainer = make(
        "sft", tmp_path, callbacks=[Poison("stepped", 2)], per_device_train_batch_size=2, save_strategy="steps",
        save_steps=1,
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match="lofit_scale.* after step 2; nothing was saved"):
        trainer.train()
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert not list((tmp_path / "checkpoint-2").glob("*"))


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_resuming_continues_bit_for_bit(loss, tmp_path):
    changes = {
        "per_device_train_batch_size": 2, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3,
        "l1_lambda": LAMBDA, "train_sampling_strategy": "random",
    }  # fmt: skip
    whole = make(loss, tmp_path / "whole", **changes)
    whole.train()
    make(loss, tmp_path / "parts", callbacks=[StopAt(5)], **changes).train()
    parts = make(loss, tmp_path / "parts", **changes)
    parts.train(resume_from_checkpoint=newest_complete_checkpoint(tmp_path / "parts"))

    def curve(trainer):
        return [(log["step"], log["loss"]) for log in trainer.state.log_history if "loss" in log]

    assert curve(parts) == curve(whole) and len(curve(whole)) == 8
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("route", ["peft_config", "PeftModel"])
def test_parameters_stay_fp32_on_a_4_bit_base(route, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=64, intermediate_size=64, head_dim=32).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantization, device_map="cpu", dtype=torch.bfloat16
    )
    config = LofitConfig(component="both", heads=HEADS, task_type="CAUSAL_LM")
    if route == "PeftModel":
        base, config = get_peft_model(base, config), None
        randomise(base, std=1e-4)  # TRL's cast to bf16 and back would round these
        before = [p.detach().clone() for p in base.parameters() if p.requires_grad]
    trainer = make("sft", tmp_path, model=base, peft_config=config, l1_lambda=1e-3, max_steps=2, learning_rate=1e-4)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert len(trained) == 4 and all(p.dtype == torch.float32 for p in trained)
    if route == "PeftModel":
        assert all(torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    started = [p.detach().clone() for p in trained]
    trainer.train()
    assert all(p.dtype == torch.float32 and not torch.equal(p, q) for p, q in zip(trained, started, strict=True))
    # AdamW's first steps are about the learning rate: a tenth of what bf16 could hold at some of these values
    assert max((p - q).abs().max().item() for p, q in zip(trained, started, strict=True)) < 3e-4


def test_bf16_base_gets_fp32_parameters(tmp_path):
    trainer = make("sft", tmp_path, model=tiny("llama", dtype=torch.bfloat16), l1_lambda=LAMBDA, max_steps=1)
    trainer.train()
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)


# Arguments


def test_defaults_are_the_papers(tmp_path):
    for config in (LofitSFTConfig, LofitDPOConfig):
        args = config(output_dir=str(tmp_path), use_cpu=True)
        assert (args.learning_rate, args.num_train_epochs, args.per_device_train_batch_size) == (1e-2, 5.0, 8)
        assert (args.weight_decay, args.max_grad_norm, args.warmup_steps, args.l1_lambda) == (0.0, 1.0, 0, 0.0)
        assert args.lr_scheduler_type == "linear" and args.optim == "adamw_torch" and args.max_length == 512
        assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.999, 1e-8)
        assert args.gradient_checkpointing is False and args.bf16 is False and args.logging_nan_inf_filter is False
        assert args.gradient_accumulation_steps == 1
    assert args.beta == 0.5


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_bad_l1_lambda(value, tmp_path):
    with pytest.raises(ValueError, match="l1_lambda="):
        LofitSFTConfig(output_dir=str(tmp_path), use_cpu=True, l1_lambda=value)


def test_remote_code_is_refused(tmp_path):
    with pytest.raises(ValueError, match="trust_remote_code"):
        LofitDPOConfig(output_dir=str(tmp_path), use_cpu=True, trust_remote_code=True)


@pytest.mark.parametrize("config", [LofitConfig(heads=HEADS), LoraConfig(r=2)], ids=["offsets", "lora"])
def test_a_penalty_without_scales_is_refused(config, tmp_path):
    config.task_type = "CAUSAL_LM"
    with pytest.raises(ValueError, match="trains none"):
        make("sft", tmp_path, peft_config=config, l1_lambda=0.1)


def test_without_a_penalty_none_is_logged(tmp_path):
    record = Record()
    make("sft", tmp_path, callbacks=[record], max_steps=1).train()
    assert not any("l1_penalty" in log for log in record.logs)
