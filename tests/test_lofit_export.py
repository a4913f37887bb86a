"""Merging into quantised bases, and plain checkpoints that reload to the same function."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import (
    ARCHITECTURES,
    HEADS,
    IDS,
    char_tokenizer,
    lofit_layers,
    logits,
    randomise,
    tiny,
    tiny_llama,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
)

from steerbook.trainers import export
from steerbook.trainers.lofit import LofitConfig, export_merged

EXACT = [name for name in ARCHITECTURES if name != "phi3"]


def lofit(model, component="both", heads=HEADS, **changes) -> PeftModel:
    tuned = get_peft_model(model, LofitConfig(component=component, heads=heads, task_type="CAUSAL_LM", **changes))
    randomise(tuned)
    return tuned


def reload(folder, **options):
    """The plain model, and the keys of its checkpoint that did not fit."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(model).__module__.startswith("transformers.") and not lofit_layers(model)
    return model.eval()


def snapshot(model) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_unchanged(model, tensors: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("name", EXACT)
def test_exports_reload_plainly_to_the_same_logits(name, tmp_path):
    tuned = lofit(tiny(name))
    before, config = snapshot(tuned), tuned.config.to_dict()
    tuned.train()
    tuned.get_base_model().get_input_embeddings().eval()  # a mixture of modes, to be found again
    modes = {key: module.training for key, module in tuned.named_modules()}
    out = export_merged(tuned, char_tokenizer(), tmp_path / "deep" / "out")
    assert {key: module.training for key, module in tuned.named_modules()} == modes
    assert_unchanged(tuned, before)
    assert tuned.config.to_dict() == config and not any(layer.merged for layer in lofit_layers(tuned))

    plain = reload(out)
    expected = logits(tuned.eval())
    assert (expected - logits(tiny(name))).abs().max() > 0.1
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)
    assert len(AutoTokenizer.from_pretrained(out)) == len(char_tokenizer())
    assert {path.name for path in out.parent.iterdir()} == {"out"}  # no scratch folder beside it
    assert list(out.glob("*.safetensors")) and not list(out.glob("*.bin")) and not list(out.glob("adapter*"))


def test_scales_alone_need_no_bias_and_keep_the_architecture(tmp_path):
    for name in ("phi3", "mistral", "llama"):
        tuned = lofit(tiny(name), "scale")
        plain = reload(export_merged(tuned, None, tmp_path / name))
        assert type(plain) is type(tiny(name))
        assert not any(key.endswith("o_proj.bias") for key in plain.state_dict())
        torch.testing.assert_close(logits(plain), logits(tuned), rtol=0, atol=1e-5)


def test_tied_embeddings_stay_tied(tmp_path):
    tuned = lofit(tiny_llama(tie_word_embeddings=True))
    plain = reload(export_merged(tuned, None, tmp_path / "out"))
    assert plain.lm_head.weight.data_ptr() == plain.model.embed_tokens.weight.data_ptr()
    torch.testing.assert_close(logits(plain), logits(tuned), rtol=0, atol=1e-5)


def test_generation_settings_and_greedy_text_are_kept(tmp_path):
    tuned = lofit(tiny("qwen2"))
    tuned.generation_config.repetition_penalty = 1.5
    plain = reload(export_merged(tuned, None, tmp_path / "out"))
    assert plain.generation_config.repetition_penalty == 1.5
    assert plain.config.eos_token_id == tuned.config.eos_token_id
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(plain.generate(IDS, **settings), tuned.generate(input_ids=IDS, **settings))


def test_bf16_stays_bf16(tmp_path):
    tuned = lofit(tiny("llama", dtype=torch.bfloat16))
    plain = reload(export_merged(tuned, None, tmp_path / "out"), dtype="auto")
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(plain), logits(tuned), rtol=0, atol=0.1)


def test_several_active_adapters_and_an_already_merged_one(tmp_path):
    tuned = lofit(tiny("llama"))
    tuned.add_adapter("second", LofitConfig(component="both", heads=[(0, 1), (1, 2)]))
    randomise(tuned, "second", seed=9)
    tuned.base_model.set_adapter(["default", "second"])
    expected = logits(tuned)
    first = reload(export_merged(tuned, None, tmp_path / "first"))
    tuned.merge_adapter()
    second = reload(export_merged(tuned, None, tmp_path / "second"))
    assert all(layer.merged for layer in lofit_layers(tuned))
    for plain in (first, second):
        torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["mistral", "phi3"])
def test_the_active_adapter_is_the_one_exported(name, tmp_path):
    tuned = lofit(tiny(name))
    tuned.add_adapter("second", LofitConfig(component="scale", heads=[(0, 1)]))
    randomise(tuned, "second", seed=9)
    tuned.set_adapter("second")
    plain = reload(export_merged(tuned, None, tmp_path / "out"))
    assert type(plain) is type(tiny(name))  # the other one's offsets, which need a bias, are not in it
    torch.testing.assert_close(logits(plain), logits(tuned), rtol=0, atol=1e-5)


def test_adapter_loaded_by_transformers_exports_too(tmp_path):
    lofit(tiny("qwen3")).save_pretrained(tmp_path / "adapter")
    model = tiny("qwen3")
    model.load_adapter(str(tmp_path / "adapter"))
    plain = reload(export_merged(model, None, tmp_path / "out"))
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-5)


# Refusals


def assert_nothing_written(folder) -> None:
    assert [path.name for path in folder.iterdir()] == []


@pytest.mark.parametrize("component", ["offset", "both"])
def test_phi3_offsets_have_no_plain_form(component, tmp_path):
    tuned = lofit(tiny("phi3"), component)
    before = snapshot(tuned)
    with pytest.raises(ValueError, match="phi3.*no exact plain form"):
        export_merged(tuned, None, tmp_path / "out")
    assert_unchanged(tuned, before)
    assert_nothing_written(tmp_path)


def sliding_mistral() -> MistralForCausalLM:
    config = tiny("mistral").config.to_dict() | {"sliding_window": 5}
    return MistralForCausalLM(MistralConfig(**config)).eval()


def test_mistral_with_a_sliding_window(tmp_path):
    with pytest.raises(ValueError, match="sliding window of 5"):
        export_merged(lofit(sliding_mistral(), "offset"), None, tmp_path / "out")
    assert_nothing_written(tmp_path)
    tuned = lofit(sliding_mistral(), "scale")
    plain = reload(export_merged(tuned, None, tmp_path / "out"))
    torch.testing.assert_close(logits(plain), logits(tuned), rtol=0, atol=1e-5)


def test_an_existing_folder_is_never_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="never overwrites"):
        export_merged(lofit(tiny("llama")), None, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_plain_model_holds_nothing_to_export(tmp_path):
    with pytest.raises(ValueError, match="no LoFiT"):
        export_merged(tiny("llama"), None, tmp_path / "out")


def test_other_tuners_and_fully_trained_modules_are_refused(tmp_path):
    model = tiny("llama")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="lora")
    model.add_adapter(LofitConfig(heads=HEADS), adapter_name="lofit")
    with pytest.raises(ValueError, match="another tuner"):
        export_merged(model, None, tmp_path / "out")
    with pytest.raises(ValueError, match="modules_to_save"):
        export_merged(lofit(tiny("llama"), modules_to_save=["lm_head"]), None, tmp_path / "out")
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("failure", ["check", "disk"])
def test_nothing_is_left_when_it_fails(failure, tmp_path, monkeypatch):
    tuned = lofit(tiny("llama")).train()
    before = snapshot(tuned)
    if failure == "check":
        monkeypatch.setitem(export.TOLERANCE, torch.float32, -1.0)
    else:

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(type(tuned.get_base_model()), "save_pretrained", full)
    with pytest.raises(RuntimeError if failure == "check" else OSError, match="differ by|No space"):
        export_merged(tuned, None, tmp_path / "out")
    assert_nothing_written(tmp_path)
    assert_unchanged(tuned, before)
    assert tuned.training


def test_the_global_random_state_is_left_alone(tmp_path):
    tuned = lofit(tiny("llama"))
    state = torch.get_rng_state()
    export_merged(tuned, None, tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_off_while_checking(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(**(tiny("gpt2").config.to_dict() | {"resid_pdrop": 0.5})))
    tuned = lofit(model).train()
    plain = reload(export_merged(tuned, None, tmp_path / "out"))
    torch.testing.assert_close(logits(plain), logits(tuned.eval()), rtol=0, atol=1e-5)


# Quantised bases (bitsandbytes runs on the CPU)

QUANTISED = {
    "4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "8bit": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.fixture(params=["4bit", "8bit"])
def quantised(request, tmp_path):
    """A function that loads a tiny Llama quantised: bitsandbytes on the CPU may repack weights in a forward pass."""
    pytest.importorskip("bitsandbytes")
    tiny_llama(
        hidden_size=64, intermediate_size=64, head_dim=32, num_key_value_heads=2, num_attention_heads=4
    ).save_pretrained(tmp_path / "base")

    def load():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=QUANTISED[request.param], device_map="cpu", dtype=torch.float32
        )

    load.kind = request.param
    return load


def test_a_quantised_base_trains(quantised):
    tuned = get_peft_model(quantised(), LofitConfig(component="both", heads=HEADS, task_type="CAUSAL_LM"))
    assert not lofit_layers(tuned)[0].get_base_layer().weight.dtype.is_floating_point
    trained = [p for p in tuned.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 3 * 32 * 2 and all(p.dtype == torch.float32 for p in trained)
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    tuned.train()
    losses = []
    for _ in range(6):
        loss = tuned(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_offsets_merge_into_a_bias_of_a_quantised_base(quantised):
    tuned = lofit(quantised(), "offset")
    layer = lofit_layers(tuned)[0]
    weight = layer.base_layer.weight.detach().clone()
    z = torch.randn(5, 128)
    tuned.train()  # in eval mode the CPU kernel may repack 4-bit weights in place
    with torch.no_grad():
        expected, base = layer(z), layer.base_layer(z)
        layer.merge(safe_merge=True)
        merged = layer(z)
        assert layer.base_layer.bias is not None and torch.equal(layer.base_layer.weight, weight)
        effect = (expected - base).abs().max()
        # 8-bit layers round their input too: z + v and v do not round alike
        assert (merged - expected).abs().max() < (1e-4 if quantised.kind == "4bit" else 0.05) * effect
        layer.unmerge()
        assert layer.base_layer.bias is None
        torch.testing.assert_close(layer(z), expected)


@pytest.mark.parametrize("component", ["scale", "both"])
def test_scales_refuse_to_merge_into_a_quantised_base(component, quantised):
    tuned = lofit(quantised(), component)
    with pytest.raises(ValueError, match="scales.*cannot be folded.*Linear"):
        tuned.merge_adapter()
    assert not lofit_layers(tuned)[0].merged and lofit_layers(tuned)[0].base_layer.bias is None


def test_a_quantised_base_is_not_exported(quantised, tmp_path):
    with pytest.raises(ValueError, match="is quantised"):
        export_merged(lofit(quantised(), "offset"), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_trained_on_a_quantised_base_loads_on_the_plain_one(quantised, tmp_path):
    lofit(quantised(), "both").save_pretrained(tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tuned = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    randomly = lofit(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    assert torch.equal(logits(tuned), logits(randomly))
