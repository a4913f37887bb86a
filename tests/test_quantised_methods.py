"""Quantised bases: LoFiT, RED and low-rank aTLAS on them; merging and export refused or exact."""

import pytest
import torch
from lora_vectors import lora_vectors
from peft import LoraConfig, PeftModel, get_peft_model
from quantised_models import KINDS, ROWS, arguments, load, logits, randomised, save_base, stored, unchanged
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from steerbook.trainers import Composer, LofitConfig, LofitSFTConfig, LowRankComposer, TaskVector
from steerbook.trainers.atlas.coefficients import apply_coefficients, load_coefficients, save_coefficients
from steerbook.trainers.atlas.export import export_adapter, export_folded
from steerbook.trainers.atlas.stages import fit_coefficients
from steerbook.trainers.atlas.trainer import AtlasConfig
from steerbook.trainers.lofit.layer import LofitLayer
from steerbook.trainers.lofit.red import red_model, unload_red
from steerbook.trainers.lofit.stages import fit, fit_scales


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


# ---- LoFiT ----


def test_both_stages_of_lofit(base, tokenizer, tmp_path, kind):
    model, args = load(base, kind), arguments(LofitSFTConfig, tmp_path)
    before, untouched = stored(model), logits(model)
    rows = ROWS.remove_columns("task")
    selection = fit_scales(model, tokenizer, rows, args, tmp_path / "one", k=3, data_fingerprint="x", l1_lambda=1e-3)
    assert len(selection.heads) == 3 and torch.equal(logits(model), untouched)
    config = LofitConfig(component="both", heads=selection.heads, task_type="CAUSAL_LM")
    found = fit(model, tokenizer, rows, args, tmp_path / "two", peft_config=config)
    expected = logits(found.model)
    assert unchanged(found.model, before) and not torch.equal(expected, untouched)
    saved = load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert all(".lofit_" in name and one.dtype == torch.float32 for name, one in saved.items())
    again = load(base, kind)
    selection.check_base(again)  # the base, quantised anew, has the same fingerprint
    assert torch.equal(logits(PeftModel.from_pretrained(again, tmp_path / "two")), expected)


def test_offsets_merge_after_an_evaluation_and_scales_do_not(base, kind):
    tuned = randomised(get_peft_model(load(base, kind), LofitConfig(component="offset", task_type="CAUSAL_LM")))
    before, evaluated, expected = stored(tuned), logits(tuned), logits(tuned, training=True)
    with tuned.disable_adapter():
        effect = (logits(tuned, training=True) - expected).abs().max()
    tuned.merge_adapter(safe_merge=True)
    # An 8-bit layer has rounded the offset on its way to the bias, to 1/127 of its largest value
    assert (logits(tuned, training=True) - expected).abs().max() < (1e-4 if kind != "int8" else 0.05) * effect
    tuned.unmerge_adapter()
    assert torch.equal(logits(tuned), evaluated) and unchanged(tuned, before)
    scaled = randomised(get_peft_model(load(base, kind), LofitConfig(component="scale", task_type="CAUSAL_LM")))
    expected = logits(scaled)
    with pytest.raises(ValueError, match="scales, which cannot be folded"):
        scaled.merge_adapter()
    assert torch.equal(logits(scaled), expected)


def test_red_comes_off_again(base, kind):
    model = load(base, kind)
    before, untouched = stored(model), logits(model)
    tuned = red_model(model)
    for name, one in tuned.named_parameters():
        if "ia3_l" in name or "beft_bias" in name:
            one.data += 0.1 * torch.randn(one.shape)
    layer = tuned.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    scale, bias = (next(one.reshape(-1) for name, one in layer.named_parameters() if part in name)
                   for part in ("ia3_l", "beft_bias"))  # fmt: skip
    assert isinstance(layer.get_base_layer(), torch.nn.Linear)
    x = torch.randn(3, 128)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), layer.get_base_layer()(x) * scale + bias)
    unload_red(tuned)
    assert torch.equal(logits(model), untouched) and unchanged(model, before)
    assert not any(isinstance(module, LofitLayer) or "ia3" in name for name, module in model.named_modules())


def test_lora_merges_after_an_evaluation_as_before_it(base):
    """By PEFT, which rounds 4-bit weights anew; behind bitsandbytes' packing it would be noise."""
    merged = []
    for evaluated in (False, True):
        tuned = randomised(get_peft_model(load(base, "nf4"), LoraConfig(r=2, target_modules="all-linear")))
        if evaluated:
            logits(tuned)
        merged.append(logits(tuned.merge_and_unload()))
    assert torch.equal(*merged)


# ---- aTLAS ----


def test_low_rank_coefficients(base, tokenizer, tmp_path, kind):
    vectors = lora_vectors(AutoModelForCausalLM.from_pretrained(base), scale=0.2)
    model = load(base, kind)
    before, untouched = stored(model), logits(model)
    composer = LowRankComposer(model, vectors)
    fit_coefficients(composer, tokenizer, ROWS, arguments(AtlasConfig, tmp_path / "fit"), tmp_path / "fit")
    expected = logits(composer.model)
    assert not torch.equal(expected, untouched) and unchanged(composer.model, before)
    save_coefficients(tmp_path / "c.json", composer, sources=["a", "b", "c"])
    again = LowRankComposer(load(base, kind), vectors)
    apply_coefficients(again, load_coefficients(tmp_path / "c.json"))
    assert torch.equal(logits(again.model), expected)
    export_adapter(composer, tmp_path / "adapter")
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 28
    exported = logits(PeftModel.from_pretrained(load(base, kind), tmp_path / "adapter"))
    effect = (expected - untouched).abs().max()
    assert (exported - expected).abs().max() < (1e-4 if kind != "int8" else 0.05) * effect
    with pytest.raises(ValueError, match="is quantised.*unquantised base"):
        export_folded(composer, None, tmp_path / "folded")
    composer.remove()
    assert torch.equal(logits(model), untouched) and unchanged(model, before)


def test_nothing_is_composed_into_quantised_weights(base, kind):
    plain = AutoModelForCausalLM.from_pretrained(base)
    dense = TaskVector({name: torch.ones_like(one) for name, one in plain.named_parameters() if "q_proj" in name})
    model = load(base, kind)
    before = stored(model)
    for vectors in ([dense], lora_vectors(plain)):
        with pytest.raises(ValueError, match="quantised weights, into which nothing can be composed.*LowRankComposer"):
            Composer(model, vectors)
    assert unchanged(model, before)
    with pytest.raises(ValueError, match="q_proj.*quantised weights; give the states"):
        TaskVector.from_state_dicts(model.state_dict(), model.state_dict())
