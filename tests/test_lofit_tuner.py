"""The tuner, architecture by architecture, against the paper's formula applied by hooks to the untouched model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, BeftConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import (
    ARCHITECTURES,
    HEADS,
    IDS,
    LAYERS,
    hooked,
    lofit_layers,
    logits,
    random_edits,
    randomise,
    tiny,
    tiny_llama,
    write_edits,
)
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from steerbook.trainers.lofit import LofitConfig, LofitLayer
from steerbook.trainers.lofit.layer import head_norms

EVERY = list(ARCHITECTURES)
every_architecture = pytest.mark.parametrize("name", EVERY)
every_component = pytest.mark.parametrize("component", ["offset", "scale", "both"])
ALL_HEADS = [(layer, head) for layer in range(LAYERS) for head in range(4)]


def lofit(model, component="both", heads=HEADS, **changes) -> PeftModel:
    return get_peft_model(model, LofitConfig(component=component, heads=heads, task_type="CAUSAL_LM", **changes))


def close(got, expected, tolerance=1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


# The edit itself


@every_architecture
def test_zero_init_is_the_base_bit_for_bit(name):
    model = tiny(name)
    before = logits(model)
    assert torch.equal(logits(lofit(model, heads=None, init_std=0.0)), before)


@every_component
@every_architecture
def test_equals_hooks_on_the_raw_projection(name, component):
    edits = random_edits(HEADS, ARCHITECTURES[name].head_dim, component)
    plain = tiny(name)
    with hooked(plain, name, edits):
        expected = logits(plain)
    tuned = lofit(tiny(name), component)
    write_edits(tuned, name, edits)
    assert (expected - logits(plain)).abs().max() > 0.1  # the edit is worth comparing
    close(logits(tuned), expected)


@every_architecture
def test_every_head_in_head_order_when_none_are_named(name):
    edits = random_edits(ALL_HEADS, ARCHITECTURES[name].head_dim, "both")
    plain, tuned = tiny(name), lofit(tiny(name), heads=None)
    write_edits(tuned, name, edits)
    with hooked(plain, name, edits):
        close(logits(tuned), logits(plain))


@every_architecture
def test_only_the_selected_slices_of_the_input_change(name):
    tuned = lofit(tiny(name))
    randomise(tuned)
    layer = lofit_layers(tuned)[0]  # layer 1, heads 0 and 2: nothing before it differs from the base
    seen = []
    layer.base_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    logits(tuned)
    with tuned.disable_adapter():
        logits(tuned)
    width = ARCHITECTURES[name].head_dim
    after, before = (x.unflatten(-1, (4, width)) for x in seen)
    assert torch.equal(after[..., [1, 3], :], before[..., [1, 3], :])
    for row, head in enumerate((0, 2)):
        expected = before[..., head, :] * (1 + layer.lofit_scale["default"][row]) + layer.lofit_offset["default"][row]
        close(after[..., head, :], expected.detach(), 1e-6)


@every_architecture
def test_parameters_are_compact_fp32_and_only_where_heads_are(name):
    width = ARCHITECTURES[name].head_dim
    tuned = lofit(tiny(name, dtype=torch.bfloat16), heads=[(2, 3), (1, 2), (1, 0)])
    trained = {key.split(".model.", 1)[1]: p for key, p in tuned.named_parameters() if p.requires_grad}
    path = ARCHITECTURES[name].projection.removeprefix("model.")
    found = {key: (tuple(p.shape), p.dtype) for key, p in trained.items()}
    expected = {}
    for layer, heads in ((1, 2), (2, 1)):
        for kind in ("lofit_scale", "lofit_offset"):
            key = f"{path.format(layer)}.{kind}.default"
            expected[key] = ((heads, width), torch.float32)
    assert {key.removeprefix("model."): value for key, value in found.items()} == expected
    assert tuned.get_nb_trainable_parameters()[0] == 3 * width * 2
    assert len(lofit_layers(tuned)) == 2  # layer 0 is not wrapped at all
    assert tuned.dtype == torch.bfloat16 and logits(tuned).dtype == torch.bfloat16


def test_only_an_explicit_request_gives_parameters_the_bases_dtype():
    # TRL makes it with ZeRO-3, which gathers only parameters of one dtype
    for autocast, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        base = tiny("llama", dtype=torch.bfloat16)
        tuned = get_peft_model(base, LofitConfig(component="both", heads=HEADS), autocast_adapter_dtype=autocast)
        assert {p.dtype for p in tuned.parameters() if p.requires_grad} == {dtype}


def test_small_scales_count_on_a_bf16_base():
    # 1 + 0.003 rounds to 1 in bf16; computed there, the edit would be nothing
    layer = LofitLayer(nn.Linear(4, 4, bias=False, dtype=torch.bfloat16), 4)
    layer.update_layer("default", LofitConfig(component="scale", init_std=0.0), [0], inference_mode=False)
    layer.set_adapter("default")
    layer.lofit_scale["default"].data.fill_(0.003)
    z = torch.full((1, 4), 1.3984375, dtype=torch.bfloat16)  # * 1.003 is past the middle to the next bf16 number
    assert torch.equal(layer.edit(z, "default"), z.float() * 1.003)


@every_architecture
def test_autograd_stops_at_the_lowest_selected_layer(name):
    tuned = lofit(tiny(name), heads=[(2, 1)])
    blocks = ARCHITECTURES[name].projection.split(".{}")[0]
    outputs = []
    for block in tuned.get_base_model().get_submodule(blocks):
        block.register_forward_hook(
            lambda module, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
    tuned(input_ids=IDS, labels=IDS).loss.backward()
    assert [out.requires_grad for out in outputs] == [False, False, True]
    assert all(p.grad.abs().sum() > 0 for p in tuned.parameters() if p.requires_grad)


def test_a_selection_does_not_depend_on_the_order_of_the_list():
    tuned = [lofit(tiny("llama"), heads=heads) for heads in (HEADS, HEADS[::-1])]
    for model in tuned:
        randomise(model)
    assert torch.equal(logits(tuned[0]), logits(tuned[1]))
    assert tuned[1].peft_config["default"].heads == HEADS


def test_initial_values_are_normal_with_the_given_deviation():
    layer = LofitLayer(nn.Linear(4000, 4), 1000)
    layer.update_layer("default", LofitConfig(component="both", init_std=0.02), range(4), inference_mode=False)
    for rows in (layer.lofit_scale, layer.lofit_offset):
        assert rows["default"].std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(rows["default"].mean().item()) < 0.002


def test_head_norms_of_unselected_heads_are_minus_infinity():
    layer = LofitLayer(nn.Linear(8, 4), 2)
    layer.update_layer("default", LofitConfig(component="scale"), [3, 1], inference_mode=False)
    rows = torch.tensor([[3.0, 4.0], [5.0, 12.0]])
    assert head_norms(layer, rows, "default") == [-float("inf"), 5.0, -float("inf"), 13.0]


# Saving and loading


@every_architecture
def test_saved_adapters_load_bit_equal_in_every_way(name, tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tiny(name).save_pretrained(base)
    tuned = lofit(AutoModelForCausalLM.from_pretrained(base))
    randomise(tuned)
    expected = logits(tuned)
    tuned.save_pretrained(folder)

    tensors = load_file(folder / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == 3 * ARCHITECTURES[name].head_dim * 2
    assert all(".default" not in key and t.dtype == torch.float32 for key, t in tensors.items())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LOFIT" and config["heads"] == [list(head) for head in HEADS]

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    assert torch.equal(logits(loaded), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder)), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), expected)

    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain)
    plain.load_adapter(str(folder))
    assert torch.equal(logits(plain), expected)
    plain.disable_adapters()
    assert torch.equal(logits(plain), before)
    plain.enable_adapters()
    assert torch.equal(logits(plain), expected)
    plain.delete_adapter("default")
    assert torch.equal(logits(plain), before)


def test_transformers_add_adapter_trains_the_same_parameters(tmp_path):
    plain = tiny("llama")
    plain.add_adapter(LofitConfig(component="both", heads=HEADS), adapter_name="mine")
    assert sum(p.numel() for p in plain.parameters() if p.requires_grad) == 3 * 12 * 2
    randomise(plain, "mine")
    plain.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert torch.equal(logits(again), logits(plain))


def test_an_adapter_continues_training_when_loaded_trainable(tmp_path):
    tuned = lofit(tiny("llama"))
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)
    assert again.get_nb_trainable_parameters() == tuned.get_nb_trainable_parameters()


def test_adapter_for_llama_2_7b_at_three_per_cent_is_under_100_kb(tmp_path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.head_dim = 128
            self.o_proj = nn.Linear(4096, 4096, bias=False, device="meta")

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn = Attention()

    class Shapes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(32))

    # 32 heads, one in each layer: the most tensors, so the largest file, that 3 % can have
    heads = [(layer, (7 * layer) % 32) for layer in range(32)]
    tuned = get_peft_model(Shapes(), LofitConfig(heads=heads, target_modules=["self_attn.o_proj"]))
    for layer in lofit_layers(tuned):
        assert layer.lofit_offset["default"].device.type == "meta"  # as the base
        layer.lofit_offset["default"] = nn.Parameter(torch.randn(1, 128))
    tuned.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert sum(file.get_tensor(key).numel() for key in file.keys()) == 4096  # noqa: SIM118 (not a dict)
    size = sum(file.stat().st_size for file in tmp_path.iterdir() if file.name.startswith("adapter"))
    assert 4 * 4096 < size < 100_000


# Several adapters, and other tuners


def two_adapters(name: str) -> PeftModel:
    tuned = lofit(tiny(name))
    tuned.add_adapter("second", LofitConfig(component="both", heads=[(0, 1), (1, 2)]))
    randomise(tuned, "default", seed=1)
    randomise(tuned, "second", seed=2)
    return tuned


def test_add_set_disable_and_delete():
    tuned = two_adapters("llama")
    base, first, second = logits(tiny("llama")), lofit(tiny("llama")), lofit(tiny("llama"), heads=[(0, 1), (1, 2)])
    randomise(first, seed=1)
    randomise(second, seed=2)
    assert torch.equal(logits(tuned), logits(first))
    tuned.set_adapter("second")
    assert torch.equal(logits(tuned), logits(second))
    trained = [key for key, p in tuned.named_parameters() if p.requires_grad]
    assert len(trained) == 4 and all(key.endswith(".second") for key in trained)
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), base)
    assert torch.equal(logits(tuned), logits(second))
    tuned.delete_adapter("second")
    tuned.set_adapter("default")
    assert torch.equal(logits(tuned), logits(first))
    assert not [key for key, _ in tuned.named_parameters() if "second" in key]
    assert torch.equal(logits(tuned.unload()), base)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_two_active_adapters_are_their_merges_in_turn(name):
    tuned = two_adapters(name)
    tuned.base_model.set_adapter(["default", "second"])
    both = logits(tuned)
    # W ((1+a1)(.) + v1) after that W' ((1+a2)(.) + v2): the adapter merged last is the first to see z
    edits = []
    for adapter in ("second", "default"):
        edit = {}
        for index, layer in ((0, None), (1, None), (2, None)):
            path = ARCHITECTURES[name].projection.format(index)
            layer = tuned.get_base_model().get_submodule(path)
            if not isinstance(layer, LofitLayer) or adapter not in layer.selected:
                continue
            for row, head in enumerate(layer.selected[adapter]):
                edit[index, head] = (
                    layer.lofit_scale[adapter][row].detach(), layer.lofit_offset[adapter][row].detach()
                )  # fmt: skip
        edits.append(edit)
    plain = tiny(name)
    with hooked(plain, name, *edits):
        expected = logits(plain)
    with hooked(plain, name, *edits[::-1]):
        assert (logits(plain) - expected).abs().max() > 1e-2  # the order matters, so the test can fail
    close(both, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the bias is dropped on saving
        close(logits(tuned.merge_and_unload(adapter_names=["default", "second"])), expected)


@every_architecture
def test_merge_equals_the_adapter_and_unmerge_restores_every_bit(name):
    tuned = two_adapters(name)
    base = tuned.get_base_model()
    before = {key: t.clone() for key, t in base.state_dict().items()}
    projection = base.get_submodule(ARCHITECTURES[name].projection.format(1)).get_base_layer()
    assert (projection.bias is not None) == ARCHITECTURES[name].has_bias
    tuned.base_model.set_adapter(["default", "second"])
    expected = logits(tuned)
    tuned.merge_adapter()
    assert projection.bias is not None and lofit_layers(tuned)[1].merged
    close(logits(tuned), expected)
    with pytest.warns(UserWarning, match="Already"):
        tuned.merge_adapter()
    close(logits(tuned), expected)
    tuned.unmerge_adapter()
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert (projection.bias is not None) == ARCHITECTURES[name].has_bias
    assert torch.equal(logits(tuned), expected)
    with pytest.warns(UserWarning, match="Already unmerged"):
        tuned.unmerge_adapter()


def test_disabling_a_merged_adapter_gives_the_base():
    tuned = lofit(tiny("llama"))
    randomise(tuned)
    tuned.merge_adapter()
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), logits(tiny("llama")))


def test_bf16_merge_rounds_once_from_fp32():
    tuned = lofit(tiny("gpt2", dtype=torch.bfloat16))
    randomise(tuned)
    layer = lofit_layers(tuned)[0]
    weight, bias = layer.base_layer.weight.float(), layer.base_layer.bias.float()
    offset = torch.zeros(32).index_copy(
        0, torch.tensor([*range(8), *range(16, 24)]), layer.lofit_offset["default"].flatten()
    )
    factor = torch.ones(32).index_copy(
        0, torch.tensor([*range(8), *range(16, 24)]), 1 + layer.lofit_scale["default"].flatten()
    )
    tuned.merge_adapter()
    assert torch.equal(layer.base_layer.bias, (bias + offset @ weight).bfloat16())
    assert torch.equal(layer.base_layer.weight, (weight * factor[:, None]).bfloat16())


@every_architecture
def test_merge_and_unload_leaves_a_plain_model_and_warns_of_biases_that_saving_would_drop(name):
    tuned = lofit(tiny(name))
    randomise(tuned)
    expected = logits(tuned)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = tuned.merge_and_unload(safe_merge=True)
    assert not lofit_layers(merged) and type(merged) is type(tiny(name))
    close(logits(merged), expected)
    warned = [w for w in caught if "export_merged" in str(w.message)]
    assert len(warned) == (0 if ARCHITECTURES[name].has_bias else 1)


def test_scales_alone_merge_without_a_warning_or_a_bias():
    tuned = lofit(tiny("llama"), "scale")
    randomise(tuned)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = tuned.merge_and_unload()
    assert merged.model.layers[1].self_attn.o_proj.bias is None


@every_component
def test_safe_merge_refuses_nan_and_changes_nothing(component):
    tuned = lofit(tiny("llama"), component)
    before = {key: t.clone() for key, t in tuned.state_dict().items()}
    layer = lofit_layers(tuned)[0]
    rows = layer.lofit_offset if component == "offset" else layer.lofit_scale
    rows["default"].data[0, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        tuned.merge_adapter(safe_merge=True)
    base = {key: t for key, t in tuned.state_dict().items() if "lofit_" not in key}
    assert all(torch.equal(t, before[key]) for key, t in base.items()) and not layer.merged


@pytest.mark.parametrize("lora_first", [True, False])
@pytest.mark.parametrize("target", ["q_proj", "o_proj"])
def test_lora_beside_lofit_in_one_model(lora_first, target):
    lora = LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    both = LofitConfig(component="both", heads=HEADS)
    model = tiny("llama")
    adapters = [("lora", lora), ("lofit", both)]
    for adapter, config in adapters if lora_first else adapters[::-1]:
        model.add_adapter(config, adapter_name=adapter)
    model.set_adapter(["lora", "lofit"])
    edits = random_edits(HEADS, 12, "both")
    rows = {(index, head): [] for index, head in edits}
    assert rows
    for index in (1, 2):
        layer = next(
            m for m in model.model.layers[index].self_attn.modules() if isinstance(m, LofitLayer)
        )  # fmt: skip
        for row, head in enumerate(layer.selected["lofit"]):
            layer.lofit_scale["lofit"].data[row], layer.lofit_offset["lofit"].data[row] = edits[index, head]
    tuned = logits(model)

    # by hand: LoRA's delta as a weight; whichever wraps the other sees z first
    plain = tiny("llama")
    scaling, deltas = 8 / 2, {}
    for index in range(LAYERS):
        layer = next(
            m for m in model.model.layers[index].self_attn.modules()
            if "lora" in getattr(m, "lora_A", {}) and m.get_base_layer().out_features
        )  # fmt: skip
        deltas[index] = scaling * layer.lora_B["lora"].weight.data @ layer.lora_A["lora"].weight.data
        projection = getattr(plain.model.layers[index].self_attn, target)
        if target == "q_proj" or lora_first:
            projection.weight.data += deltas[index]
        else:  # LoRA around LoFiT: its delta acts on the unedited z
            projection.register_forward_pre_hook(lambda module, args: setattr(module, "unedited", args[0]))
            projection.register_forward_hook(
                lambda module, args, out, delta=deltas[index]: out + module.unedited @ delta.T
            )
    with hooked(plain, "llama", edits):
        close(logits(plain), tuned, 3e-5)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(tiny("llama")))


def test_peft_model_with_a_lora_adapter_added():
    tuned = lofit(tiny("llama"))
    randomise(tuned)
    expected = logits(tuned)
    with pytest.raises(ValueError, match="(?i)adapter|peft"):  # PEFT wants its mixed model for that
        tuned.add_adapter("lora", LoraConfig(r=2))
    assert torch.equal(logits(tuned), expected)


def test_scales_refuse_to_merge_around_lora():
    model = tiny("llama")
    model.add_adapter(LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False), adapter_name="lora")
    model.add_adapter(LofitConfig(component="both", heads=HEADS), adapter_name="lofit")
    layer = lofit_layers(model)[0]
    with pytest.raises(ValueError, match="another tuner"):
        layer.merge(adapter_names=["lofit"])


# Errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"component": "bias"}, "component='bias'"),
        ({"init_std": -1.0}, "init_std=-1.0"),
        ({"init_std": float("nan")}, "init_std=nan"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"heads": []}, r"heads=\[\]"),
        ({"heads": [(1, 0), (1, 0)]}, "more than once"),
        ({"heads": [(1, -1)]}, r"\(1, -1\)"),
        ({"heads": [(1, 2, 3)]}, "pair"),
        ({"heads": [(1.0, 2)]}, "pair"),
        ({"heads": [3]}, "pair"),
    ],
)
def test_bad_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        LofitConfig(**fields)


@pytest.mark.parametrize("head", [(3, 0), (0, 4), (99, 99)])
def test_heads_that_the_model_does_not_have(head):
    model = tiny("llama")
    with pytest.raises(ValueError, match="layers 0-2 with 4 heads"):
        lofit(model, heads=[(0, 0), head])
    assert not lofit_layers(model)


def test_unknown_architecture_needs_target_modules():
    bert = BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    )
    with pytest.raises(ValueError, match="'bert'.*target_modules"):
        get_peft_model(bert, LofitConfig())
    with pytest.raises(ValueError, match=r"head_dim"):
        get_peft_model(bert, LofitConfig(target_modules=["attention.output.dense"]))
    tuned = get_peft_model(bert, LofitConfig(target_modules=["attention.output.dense"], head_dim=8, heads=[(1, 1)]))
    assert len(lofit_layers(tuned)) == 1 and lofit_layers(tuned)[0].num_heads == 2


def test_wrong_projections_are_refused():
    with pytest.raises(ValueError, match="multiple of head_dim=7"):
        lofit(tiny("llama"), head_dim=7)
    with pytest.raises(ValueError, match="4 heads"):  # q_proj takes the hidden size, not heads * head_dim
        get_peft_model(tiny_llama(hidden_size=24), LofitConfig(target_modules=["self_attn.q_proj"]))
    with pytest.raises(ValueError, match="Embedding"):
        get_peft_model(tiny("llama"), LofitConfig(target_modules=["embed_tokens"], head_dim=8))


# Oracles


def test_ia3_on_the_projection_equals_scales_with_gradients():
    scaled = lofit(tiny("llama"), "scale", heads=None)
    randomise(scaled)
    ia3 = get_peft_model(
        tiny("llama"), IA3Config(target_modules=["o_proj"], feedforward_modules=["o_proj"], task_type="CAUSAL_LM")
    )
    vectors = [p for key, p in ia3.named_parameters() if "ia3_l" in key]
    scales = [layer.lofit_scale["default"] for layer in lofit_layers(scaled)]
    for vector, scale in zip(vectors, scales, strict=True):
        vector.data.copy_(1 + scale.data.reshape(vector.shape))
    close(logits(scaled), logits(ia3), 1e-6)
    for model in (scaled, ia3):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for vector, scale in zip(vectors, scales, strict=True):
        assert scale.grad.abs().max() > 1e-3
        close(scale.grad.flatten(), vector.grad.flatten(), 1e-6)


def test_bias_tuning_of_values_equals_all_offsets_with_multi_head_attention():
    offsets = lofit(tiny_llama(num_key_value_heads=4), "offset", heads=None)
    randomise(offsets)
    biases = get_peft_model(
        tiny_llama(num_key_value_heads=4), BeftConfig(target_modules=["v_proj"], task_type="CAUSAL_LM")
    )
    rows = [p for key, p in biases.named_parameters() if "beft_" in key]
    for bias, layer in zip(rows, lofit_layers(offsets), strict=True):
        bias.data.copy_(layer.lofit_offset["default"].data.reshape(bias.shape))
    close(logits(offsets), logits(biases), 2e-6)


def test_gradients_are_sum_g_z_and_sum_g_in_float64():
    """A hand model `sum(c * (W edit(z)))`, where g is known in closed form, against autograd and against the layer."""
    torch.manual_seed(3)
    layer = LofitLayer(nn.Linear(12, 5).double(), 4)
    layer.update_layer("default", LofitConfig(component="both"), [0, 2], inference_mode=False)
    layer.set_adapter("default")
    layer.double()
    z = torch.randn(2, 7, 12, dtype=torch.float64)
    c = torch.randn(2, 7, 5, dtype=torch.float64)
    y = layer(z)
    (c * y.tanh()).sum().backward()
    g = (c * (1 - y.detach().tanh() ** 2)) @ layer.base_layer.weight.detach()  # dL/d(edited z)
    by_head = g.unflatten(-1, (3, 4))[..., [0, 2], :]
    picked = z.unflatten(-1, (3, 4))[..., [0, 2], :]
    close(layer.lofit_scale["default"].grad, (by_head * picked).sum((0, 1)), 1e-12)
    close(layer.lofit_offset["default"].grad, by_head.sum((0, 1)), 1e-12)
    parameters = (layer.lofit_scale["default"], layer.lofit_offset["default"])
    assert torch.autograd.gradcheck(lambda *_: layer(z), parameters)


# Inference


def test_cache_padding_and_kernels_agree():
    tuned = lofit(tiny("llama"))
    randomise(tuned)
    whole = logits(tuned)
    steps, cache = [], None
    for t in range(IDS.shape[1]):
        with torch.no_grad():
            out = tuned(input_ids=IDS[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    close(torch.cat(steps, 1), whole)

    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], 1)
    mask = (torch.arange(13) >= 3).long().expand(2, 13)
    with torch.no_grad():
        left = tuned(input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    close(left[:, 3:], whole)

    eager = lofit(tiny_llama(attn_implementation="eager"))
    sdpa = lofit(tiny_llama(attn_implementation="sdpa"))
    assert eager.config._attn_implementation == "eager" and sdpa.config._attn_implementation == "sdpa"
    for model in (eager, sdpa):
        randomise(model)
    close(logits(eager), logits(sdpa))


def test_generate_is_greedy_decoding_with_and_without_cache_or_padding():
    tuned = lofit(tiny("llama"))
    randomise(tuned)
    expected = IDS.clone()
    for _ in range(8):
        expected = torch.cat([expected, logits(tuned, expected)[:, -1:].argmax(-1)], 1)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(IDS)
    for cache in (True, False):
        got = tuned.generate(input_ids=IDS, attention_mask=mask, use_cache=cache, **settings)
        assert torch.equal(got, expected)
    padded, mask = (torch.cat([torch.zeros(2, 3, dtype=torch.long), x], 1) for x in (IDS, mask))
    assert torch.equal(tuned.generate(input_ids=padded, attention_mask=mask, **settings)[:, 3:], expected)
    with tuned.disable_adapter():
        assert not torch.equal(tuned.generate(input_ids=IDS, attention_mask=mask[:, 3:], **settings), expected)


# A fresh process: registration and what importing costs


def test_registration_in_a_fresh_process(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "base")
    tuned = lofit(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    randomise(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    torch.save(logits(tuned), tmp_path / "expected.pt")
    package = Path(sys.modules["steerbook"].__file__).parent
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "otherbook").symlink_to(package)  # the same files under a second name
    script = textwrap.dedent("""
        import sys
        import steerbook, steerbook.trainers
        import steerbook.data_builders.lofit
        heavy = {"torch", "peft", "transformers", "trl"} & set(sys.modules)
        assert not heavy, f"importing data builders loads {heavy}"

        import torch
        from transformers import AutoModelForCausalLM
        assert "peft" not in sys.modules
        ids = torch.tensor(IDS)
        expected = torch.load("expected.pt")
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained("adapter")  # transformers imports PEFT by itself
            assert torch.equal(model(input_ids=ids).logits, expected), "AutoModelForCausalLM"
            from peft import PeftModel
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter")
            assert torch.equal(model(input_ids=ids).logits, expected), "PeftModel"
        assert "trl" not in sys.modules, "loading an adapter imports TRL"

        from steerbook.trainers.lofit import LofitConfig
        from steerbook.trainers.lofit.model import register
        import pickle
        assert pickle.loads(pickle.dumps(LofitConfig())).peft_type == LofitConfig().peft_type
        register()  # again: nothing to do
        try:
            import otherbook.trainers.lofit
        except ImportError as error:
            assert "two names" in str(error), error
        else:
            raise AssertionError("a second copy of the package registered itself")
        print("all good")
    """).replace("IDS", repr(IDS.tolist()))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "path")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.endswith("all good\n"), done.stderr
