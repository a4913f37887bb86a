"""Quantised bases: weights that stay as they were loaded, and adapters beside them, in fp32."""

import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from bitsandbytes.nn import Linear4bit
from lora_vectors import lora_vectors
from peft import LoraConfig, PeftModel, get_peft_model
from quantised_models import KINDS, ROWS, arguments, load, logits, randomised, save_base, stored, unchanged
from safetensors.torch import load_file
from test_self_interpretability_trainers import StopAt
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainingArguments
from trl import ModelConfig, SFTConfig, SFTTrainer

from steerbook.trainers import LofitConfig, LofitSFTConfig, LofitSFTTrainer, LowRankComposer
from steerbook.trainers.base_model import check_quantised, load_base
from steerbook.trainers.dry_run import show_memory
from steerbook.trainers.multitask import MultiTaskConfig, MultiTaskTrainer
from steerbook.trainers.quantised import absorbed, check_joins
from steerbook.trainers.stages import run_stage

LORA = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.5, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
LAST = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


def trained(model):
    return {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}


# ---- the weights ----


def test_evaluation_changes_no_weight(base, kind, tmp_path):
    """bitsandbytes would pack 4-bit weights in place, on CPUs with AVX512-BF16."""
    model = load(base, kind)
    before, training = stored(model), logits(model, training=True)
    evaluated = logits(model)
    assert unchanged(model, before) and torch.equal(logits(model, training=True), training)
    assert kind == "int8" or torch.equal(evaluated, training)
    assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in model.modules())
    model.save_pretrained(tmp_path)  # what else is packed is saved wrongly
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path)
    again, _ = load_base(ModelConfig(model_name_or_path=str(tmp_path)))
    assert torch.equal(logits(again), evaluated) and unchanged(again, before)


def test_a_trainer_keeps_them_too(base, tokenizer, tmp_path):
    """Loaded by hand, and evaluated between the steps."""
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantised, device_map="cpu")
    before = stored(model)
    args = arguments(LofitSFTConfig, tmp_path, eval_strategy="steps", eval_steps=1)
    rows = ROWS.remove_columns("task")
    trainer = LofitSFTTrainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer,
                              peft_config=LofitConfig(task_type="CAUSAL_LM"))  # fmt: skip
    trainer.train()
    assert unchanged(trainer.model, before) and sum("eval_loss" in entry for entry in trainer.state.log_history) == 3


def test_a_composer_keeps_them_too(base):
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantised, device_map="cpu")
    before = stored(model)
    composer = LowRankComposer(model, lora_vectors(AutoModelForCausalLM.from_pretrained(base)))
    logits(composer.model)
    assert unchanged(composer.model, before)


def test_packed_weights_are_not_trained_through(base, tokenizer, tmp_path):
    model = load(base, "nf4")
    layer = next(module for module in model.modules() if isinstance(module, Linear4bit))
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    with pytest.raises(ValueError, match=r"q_proj\S* was evaluated before.*load the model anew"):
        MultiTaskTrainer(model, arguments(MultiTaskConfig, tmp_path), ROWS, processing_class=tokenizer,
                         peft_config=LoraConfig(**LORA))  # fmt: skip


def test_4_bits_need_a_type_to_compute_in(base):
    with pytest.raises(ValueError, match="--dtype auto.*must be named"):
        load_base(ModelConfig(model_name_or_path=str(base), load_in_4bit=True, dtype="auto"))


@pytest.mark.parametrize(
    ("more", "stage", "told"),
    [({}, 2, "give --use_peft"), ({"use_peft": True}, 3, "ZeRO-3 and FSDP cannot cut a quantised base"),
     ({"use_peft": True}, None, "ZeRO-3 and FSDP cannot cut a quantised base"), ({"use_peft": True}, 2, None)],
)  # fmt: skip
def test_flags_that_do_not_go_together(kind, more, stage, told):
    args = SimpleNamespace(deepspeed_plugin=stage and SimpleNamespace(zero_stage=stage), fsdp=True)
    with nullcontext() if told is None else pytest.raises(ValueError, match=told):
        check_quantised(ModelConfig(**KINDS[kind], **more), args)
    check_quantised(ModelConfig(), args)


def test_parameters_are_counted_before_they_were_packed(base, kind, tmp_path, capsys):
    plain = AutoModelForCausalLM.from_pretrained(base)
    show_memory(load(base, kind), TrainingArguments(str(tmp_path), use_cpu=True), 1, 8)
    assert re.search(r"all parameters +([\d,]+)", capsys.readouterr().out)[1] == f"{plain.num_parameters():,}"


# ---- adapters ----


@pytest.mark.parametrize("route", ["peft_config", "PeftModel"])
def test_adapters_learn_in_fp32(base, tokenizer, tmp_path, kind, route):
    """AdamW's first steps are about the learning rate: in bf16, as TRL has it, they are lost on most values of A."""

    def moved(trainer_class, args, **data):
        model, config = load(base, kind), LoraConfig(**LORA)
        if route == "PeftModel":
            model, config = randomised(get_peft_model(model, config)), None
            given = trained(model)
        trainer = trainer_class(model, args=args, processing_class=tokenizer, peft_config=config, **data)
        before = trained(trainer.model)
        if route == "PeftModel" and trainer_class is MultiTaskTrainer:  # not rounded to bf16 and back either
            assert all(torch.equal(given[name], one) for name, one in before.items())
        trainer.train()
        after = trained(trainer.model)
        large = {name: one.abs() > 0.05 for name, one in before.items() if "lora_A" in name}
        shares = [(before[name] != after[name])[places].float().mean() for name, places in large.items()]
        return {one.dtype for one in after.values()}, float(torch.stack(shares).mean())

    small = {"learning_rate": 1e-5, "max_steps": 2}
    dtypes, share = moved(MultiTaskTrainer, arguments(MultiTaskConfig, tmp_path, **small), train_dataset=ROWS)
    assert dtypes == {torch.float32} and share > 0.95
    dtypes, share = moved(SFTTrainer, arguments(SFTConfig, tmp_path, **small), train_dataset=ROWS)
    assert dtypes == {torch.bfloat16} and share < 0.05


def stage(model, tokenizer, folder, config=None, merged=True, **more):
    args = arguments(MultiTaskConfig, folder, **more)
    return run_stage(MultiTaskTrainer, model, tokenizer, args, folder, seed=3, train_dataset=ROWS, merged=merged,
                     peft_config=config or LoraConfig(**LORA))  # fmt: skip


def test_a_saved_adapter_is_what_was_trained(base, tokenizer, tmp_path, kind):
    model = load(base, kind)
    before, untouched = stored(model), logits(model)
    found = stage(model, tokenizer, tmp_path / "a", merged=False)
    expected = logits(found.model)
    assert unchanged(found.model, before) and not torch.equal(expected, untouched)
    saved = load_file(tmp_path / "a" / "model" / "adapter_model.safetensors")
    assert len(saved) == 28 and all(".lora_" in name and one.dtype == torch.float32 for name, one in saved.items())
    again = PeftModel.from_pretrained(load(base, kind), tmp_path / "a" / "model")
    assert torch.equal(logits(again), expected)
    with again.disable_adapter():
        assert torch.equal(logits(again), untouched)


def test_an_interrupted_fit_goes_on_to_the_bit(base, tokenizer, tmp_path, kind):
    whole = stage(load(base, kind), tokenizer, tmp_path / "whole", merged=False, max_steps=4)
    args = arguments(MultiTaskConfig, tmp_path / "cut", max_steps=4, save_strategy="steps", save_steps=100, seed=3)
    MultiTaskTrainer(load(base, kind), args, ROWS, processing_class=tokenizer, peft_config=LoraConfig(**LORA),
                     callbacks=[StopAt()]).train()  # fmt: skip
    parts = stage(load(base, kind), tokenizer, tmp_path / "cut", merged=False, max_steps=4)
    assert parts.seconds == 0 and torch.equal(logits(parts.model), logits(whole.model))


def test_an_adapter_over_another(base, tokenizer, tmp_path, kind):
    """What the second stage starts from is to the bit what the first one saved; PEFT with both adapters is the oracle
    of what it ends with. Finished stages are loaded to the same."""
    model = load(base, kind)
    before = stored(model)
    first = stage(model, tokenizer, tmp_path / "first").model
    assert not isinstance(first, PeftModel) and unchanged(first, before)
    one = PeftModel.from_pretrained(load(base, kind), tmp_path / "first" / "model")
    start = logits(first)
    assert torch.equal(start, logits(one)) and not torch.equal(start, logits(load(base, kind)))
    second = stage(first, tokenizer, tmp_path / "second", LoraConfig(**LORA | LAST)).model
    assert unchanged(second, before) and not torch.equal(logits(second), start)
    one.load_adapter(tmp_path / "second" / "model", "second")
    one.base_model.set_adapter(["default", "second"])
    assert torch.equal(logits(second), logits(one))
    again = stage(load(base, kind), tokenizer, tmp_path / "first").model
    assert torch.equal(logits(again), start)
    assert torch.equal(logits(stage(again, tokenizer, tmp_path / "second").model), logits(second))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (LoraConfig(**LORA | {"use_dora": True}), "q_proj"),
        (LoraConfig(**LORA | {"modules_to_save": ["lm_head"]}), "lm_head"),
        (LoraConfig(**LORA | {"target_modules": ["q_proj", "embed_tokens"]}), "embed_tokens"),
    ],
)
def test_what_cannot_stay_beside_a_base(base, config, named):
    model = load(base, "nf4")
    before = logits(model)
    with pytest.raises(ValueError, match=f"{named}: beside quantised weights only a LoRA of linear layers"):
        check_joins(model, config)
    assert torch.equal(logits(model), before) and not any("lora" in name for name, _ in model.named_modules())
    check_joins(model, LoraConfig(**LORA))
    check_joins(AutoModelForCausalLM.from_pretrained(base), config)
    with pytest.raises(ValueError, match="LOFIT: beside quantised weights only a LoRA"):
        absorbed(get_peft_model(model, LofitConfig(task_type="CAUSAL_LM")))
