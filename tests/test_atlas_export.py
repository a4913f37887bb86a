"""Folded models, saved coefficients, LoRA adapters and mergekit recipes: each gives the composed function again."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from lora_vectors import lora_vectors, quantised_llama, randomised
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_lofit_export import assert_nothing_written
from tiny_models import IDS, char_tokenizer, logits, tiny, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPConfig, CLIPModel, LlamaForCausalLM

from steerbook.trainers import Composer, TaskVector, export
from steerbook.trainers.atlas.blocks import BLOCKS
from steerbook.trainers.atlas.coefficients import apply_coefficients, load_coefficients, save_coefficients
from steerbook.trainers.atlas.export import export_adapter, export_folded, mergekit_yaml
from steerbook.trainers.atlas.extract import task_vector
from steerbook.trainers.atlas.low_rank import LowRankComposer


def dense_vectors(model, n=3) -> list[TaskVector]:
    generator = torch.Generator().manual_seed(4)
    return [
        TaskVector(
            {k: 0.05 * torch.randn(p.shape, generator=generator).to(p.dtype) for k, p in model.named_parameters()}
        )
        for _ in range(n)
    ]


def composed(model, **options) -> Composer:
    composer = Composer(model, dense_vectors(model), **options)
    randomised(composer)
    composer.compose()
    return composer


def low_rank(model, mode="per_product", vectors=None) -> LowRankComposer:
    composer = LowRankComposer(model, vectors or lora_vectors(model), mode)
    randomised(composer)
    return composer


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def tiny_clip() -> CLIPModel:
    shared = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    return CLIPModel(
        CLIPConfig(
            text_config={**shared, "vocab_size": 30, "max_position_embeddings": 8},
            vision_config={**shared, "image_size": 8, "patch_size": 4},
            projection_dim=12,
        )
    ).eval()


# Plain folders


@pytest.mark.parametrize("options", [{"blocks": "tensor"}, {"exclude": (), "partitions": 3}], ids=str)
@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
def test_a_folded_model_reloads_to_the_same_bits(name, options, tmp_path):
    model = tiny_llama(tie_word_embeddings=True) if name == "tied" else tiny(name)
    base = logits(model)
    composer = composed(model, **options)
    before, coefficients = snapshot(model), composer.coefficients.detach().clone()
    model.train()
    out = export_folded(composer, char_tokenizer(), tmp_path / "deep" / "out")
    assert model.training and torch.equal(composer.coefficients, coefficients)
    assert_same(model.state_dict(), before)

    plain = AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(plain) is type(model)
    assert_same(plain.state_dict(), before)
    assert torch.equal(logits(plain), logits(model.eval())) and (logits(plain) - base).abs().max() > 0.05
    assert len(AutoTokenizer.from_pretrained(out)) == len(char_tokenizer())
    assert {path.name for path in out.parent.iterdir()} == {"out"}
    assert list(out.glob("*.safetensors")) and not list(out.glob("*.bin"))


def test_clip_folds_too(tmp_path):
    model = tiny_clip()
    composer = composed(model, exclude=("text_model", "text_projection", "logit_scale"))
    out = export_folded(composer, None, tmp_path / "out")
    assert_same(CLIPModel.from_pretrained(out).state_dict(), model.state_dict())


def test_folding_rounds_to_nearest_and_training_goes_on_where_it_was(tmp_path):
    model = tiny("llama", dtype=torch.bfloat16)
    base = snapshot(model)
    composer = composed(model, rounding="stochastic")
    before, count = snapshot(model), composer.compositions
    out = export_folded(composer, None, tmp_path / "out")
    assert_same(model.state_dict(), before)
    assert (composer.rounding, composer.compositions) == ("stochastic", count)
    found = load_file(out / "model.safetensors")
    vectors = dense_vectors(tiny("llama", dtype=torch.bfloat16))
    for column, name in enumerate(composer.block_names):
        terms = [composer.coefficients[i, column].detach() * v[name].double() for i, v in enumerate(vectors)]
        exact = base[name].double() + torch.stack(terms).sum(0)
        # half a unit in the last place; at a tie fp32 sums may fall to either side
        assert ((found[name].double() - exact).abs() <= exact.abs() * 2**-8 + 1e-7).all()
        other = before[name].double() - exact
        assert (found[name].double() - exact).abs().sum() < other.abs().sum()


@pytest.mark.parametrize("mode", ["per_product", "per_factor"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_low_rank_composition_folds_into_a_plain_model(name, mode, tmp_path):
    composer = low_rank(tiny(name), mode)
    composer.model.train()
    before = snapshot(composer.model)
    out = export_folded(composer, char_tokenizer(), tmp_path / "out")
    assert composer.model.training
    assert_same(composer.model.state_dict(), before)
    plain = AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(plain) is type(tiny(name)) and plain.state_dict().keys() == tiny(name).state_dict().keys()
    torch.testing.assert_close(logits(plain), logits(composer.model.eval()), rtol=0, atol=2e-5)


def test_a_quantised_base_is_not_folded(tmp_path):
    model, vectors = quantised_llama(tmp_path / "base", "4bit")
    with pytest.raises(ValueError, match="is quantised.*unquantised base"):
        export_folded(low_rank(model, vectors=vectors), None, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


@pytest.mark.parametrize("failure", ["logits", "weights", "disk"])
@pytest.mark.parametrize("make", [composed, low_rank])
def test_nothing_is_left_when_folding_fails(make, failure, tmp_path, monkeypatch):
    composer = make(tiny("llama"))
    before = snapshot(composer.model)
    if failure == "logits":
        monkeypatch.setitem(export.TOLERANCE, torch.float32, -1.0)
    else:
        save = LlamaForCausalLM.save_pretrained

        def broken(self, folder, *args, **kwargs):
            save(self, folder, *args, **kwargs)
            if failure == "disk":
                raise OSError(28, "No space left on device")
            tensors = load_file(folder / "model.safetensors")
            tensors["model.norm.weight"][3] += 1e-6
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})

        monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", broken)
    error = OSError if failure == "disk" else RuntimeError
    with pytest.raises(error, match=r"differ by|other values in \['model.norm.weight'\]|No space"):
        export_folded(composer, None, tmp_path / "out")
    assert_nothing_written(tmp_path)
    assert_same(composer.model.state_dict(), before)


def test_exports_refuse_existing_folders_and_coefficients_that_are_not_finite(tmp_path):
    composer, low = composed(tiny("llama")), low_rank(tiny("llama"))
    (tmp_path / "out").mkdir()
    for call in (
        lambda: export_folded(composer, None, tmp_path / "out"),
        lambda: export_adapter(low, tmp_path / "out"),
    ):
        with pytest.raises(FileExistsError, match="never overwrites"):
            call()
    assert list((tmp_path / "out").iterdir()) == []
    composer.coefficients.data[1, 2] = low.coefficients.data[1, 2] = float("nan")
    (tmp_path / "out").rmdir()
    for call in (
        lambda: export_folded(composer, None, tmp_path / "out"),
        lambda: export_adapter(low, tmp_path / "out"),
        lambda: save_coefficients(tmp_path / "out", composer, sources="abc"),
        lambda: mergekit_yaml(composer, "base", list("abc")),
    ):
        with pytest.raises(ValueError, match="NaN or infinite"):
            call()
    assert_nothing_written(tmp_path)


# coefficients.json


@pytest.mark.parametrize(
    "options",
    [{"blocks": kind} for kind in BLOCKS]
    + [{"partitions": 3, "seed": 7}, {"dtype": torch.float64}, {"exclude": (), "include": (r"layers\.[01]\.",)}],
    ids=str,
)
def test_coefficients_come_back_to_the_same_bits_and_weights(options, tmp_path):
    composer = composed(tiny("qwen2"), **options)
    sources = ["org/one", "org/two", "some/folder"]
    save_coefficients(tmp_path / "coefficients.json", composer, sources=sources)
    saved = load_coefficients(tmp_path / "coefficients.json")
    assert saved.sources == sources and saved.kind == options.get("blocks", "tensor")
    assert list(saved.blocks) == composer.block_names and saved.partitions == options.get("partitions", 1)
    assert torch.equal(saved.tensor, composer.coefficients.double())

    other = Composer(tiny("qwen2"), dense_vectors(tiny("qwen2")), **options)
    apply_coefficients(other, saved)
    assert torch.equal(other.coefficients, composer.coefficients)
    assert_same(other.model.state_dict(), composer.model.state_dict())


@pytest.mark.parametrize("mode", ["per_product", "per_factor"])
def test_coefficients_of_a_low_rank_composer(mode, tmp_path):
    composer = low_rank(tiny("llama"), mode)
    save_coefficients(tmp_path / "c.json", composer, sources=["a", "b", "c"])
    saved = load_coefficients(tmp_path / "c.json")
    other = LowRankComposer(tiny("llama"), lora_vectors(tiny("llama")), mode)
    apply_coefficients(other, saved)
    assert torch.equal(logits(other.model), logits(composer.model))
    wrong = low_rank(tiny("llama"), "per_factor" if mode == "per_product" else "per_product")
    with pytest.raises(ValueError, match="they are '.*', these '.*'"):
        apply_coefficients(wrong, saved)


def test_low_rank_coefficients_learned_on_a_quantised_base_fold_into_the_plain_one(tmp_path):
    model, vectors = quantised_llama(tmp_path / "base", "8bit")
    low = low_rank(model, vectors=vectors)
    save_coefficients(tmp_path / "c.json", low, sources=["a", "b", "c"])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = low_rank(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), vectors=vectors)
    composer = Composer(plain, vectors)
    apply_coefficients(composer, load_coefficients(tmp_path / "c.json"))
    torch.testing.assert_close(logits(plain), logits(expected.model), rtol=0, atol=2e-5)


def saved_from(tmp_path, **options):
    save_coefficients(tmp_path / "c.json", composed(tiny("llama"), **options), sources=["a", "b", "c"])
    return load_coefficients(tmp_path / "c.json")


OTHERS = {
    "blocks": (
        {"blocks": "layer"},
        {},
        "for 4 layer blocks, here are 28 tensor blocks, only they have model.l",
    ),
    "names": ({}, {"exclude": ("norm",)}, "only they have .*norm.weight.* and 2 more, only here are lm_head.weight"),
    "partitions": ({"partitions": 2}, {"partitions": 3}, "partitions=2, seed=0; here are partitions=3"),
    "seed": ({"partitions": 2, "seed": 1}, {"partitions": 2, "seed": 2}, "seed=1; here are partitions=2, seed=2"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_coefficients_of_other_blocks_are_refused(case, tmp_path):
    theirs, ours, message = OTHERS[case]
    saved = saved_from(tmp_path, **theirs)
    composer = composed(tiny("llama"), **ours)
    before, weights = composer.coefficients.detach().clone(), snapshot(composer.model)
    with pytest.raises(ValueError, match=message):
        apply_coefficients(composer, saved)
    assert torch.equal(composer.coefficients, before)
    assert_same(composer.model.state_dict(), weights)


def test_coefficients_of_other_vectors_and_another_base_are_refused_and_all_is_said(tmp_path):
    saved = saved_from(tmp_path)
    model = tiny("llama", seed=1)
    composer = Composer(model, dense_vectors(model, n=2))
    with pytest.raises(ValueError, match=r"base \w{16}, this one is \w{16}; .*3 task vectors \(a, b, c\), here are 2"):
        apply_coefficients(composer, saved)
    with pytest.raises(ValueError, match="1 sources .* for 2 task vectors"):
        save_coefficients(tmp_path / "d.json", composer, sources=["a"])
    assert {path.name for path in tmp_path.iterdir()} == {"c.json"}


def test_files_that_are_no_coefficients(tmp_path):
    saved_from(tmp_path)
    content = json.loads((tmp_path / "c.json").read_text())
    path = tmp_path / "d.json"
    changes = {
        "another format": {"format": "x"},
        "unexpected keyword": {"more": 1},
        "values of shape": {"sources": ["a", "b"]},
        "expected sequence|not a sequence": {"values": [[1.0], [2.0, 3.0]]},
        "NaN or infinite": {"values": [[float("nan")] * 28] * 3},
    }
    for message, change in changes.items():
        path.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=message) as error:
            load_coefficients(path)
        assert "d.json" in str(error.value)
    for text in ((tmp_path / "c.json").read_text()[:-20], "[1]", "", "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="d.json is no file of coefficients"):
            load_coefficients(path)
    with pytest.raises(FileNotFoundError):
        load_coefficients(tmp_path / "absent.json")


# mergekit recipes


def merge(recipe: str, folders) -> dict[str, torch.Tensor]:
    """mergekit's `task_arithmetic`, as its documentation has it: base + sum of weight * (model - base), the weight
    being the value of the first entry whose filter occurs in the tensor's name."""
    settings = yaml.safe_load(recipe)
    assert settings["merge_method"] == "task_arithmetic" and settings["parameters"] == {"normalize": False}
    dtype = getattr(torch, settings["dtype"])
    base = folders[settings["base_model"]]
    merged = {}
    for name, tensor in base.items():
        total = tensor.to(dtype)
        for model in settings["models"]:
            entries = model["parameters"]["weight"]
            weight = next(entry["value"] for entry in entries if entry["filter"] in name)
            total = total + weight * (folders[model["model"]][name].to(dtype) - tensor.to(dtype))
        merged[name] = total.to(getattr(torch, settings["out_dtype"]))
    return merged


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {"blocks": kind}) for kind in BLOCKS]
    + [
        ("llama", {"exclude": ()}),
        ("llama", {"include": ("mlp", r"model\.norm")}),
        ("gpt2", {}),
        ("tied", {"exclude": ()}),
    ],
    ids=str,
)
def test_a_mergekit_recipe_gives_the_composed_weights(name, options):
    def make():
        return tiny_llama(tie_word_embeddings=True) if name == "tied" else tiny(name)

    model = make()
    vectors = dense_vectors(model)
    folders = {"org/base": make().state_dict()}
    folders |= {f"org/tuned-{i}": vector.apply(make()).state_dict() for i, vector in enumerate(vectors)}
    composer = composed(model, **options)
    recipe = mergekit_yaml(composer, "org/base", [f"org/tuned-{i}" for i in range(3)])
    merged = merge(recipe, folders)
    expected = model.state_dict()
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=2e-6, msg=key)
    untouched = {key for key in expected if torch.equal(expected[key], folders["org/base"][key])}
    assert all(torch.equal(merged[key], folders["org/base"][key]) for key in untouched)
    assert len(untouched) < len(expected)
    # some checkpoints, and mergekit's own tables, leave the prefix off
    prefix = f"{model.base_model_prefix}."
    stripped = {source: {k.removeprefix(prefix): t for k, t in tensors.items()} for source, tensors in folders.items()}
    assert_same(merge(recipe, stripped), {k.removeprefix(prefix): t for k, t in merged.items()})


def test_filters_that_occur_in_one_another_are_told_apart_and_unknown_tensors_have_no_weight():
    model = tiny("llama")
    model.model.layers = model.model._modules.pop("layers")  # now "norm.weight" is the first name, and in many others
    composer = composed(model)
    assert composer.block_names[0] == "model.norm.weight"
    recipe = mergekit_yaml(composer, "base", ["a", "b", "c"])
    entries = yaml.safe_load(recipe)["models"][1]["parameters"]["weight"]
    names = [entry["filter"] for entry in entries]
    assert any(one != other and one in other for one in names for other in names)  # the trap is there
    values = {entry["filter"]: entry["value"] for entry in entries}
    row = dict(zip(composer.block_names, composer.coefficients[1].tolist(), strict=True))
    for name, _ in composer.model.named_parameters():
        found = next(entry["value"] for entry in entries if entry["filter"] in name)
        assert found == row.get(name, 0.0) == values[name.removeprefix("model.")]  # the same bits
    assert not [entry for entry in entries if entry["filter"] in "model.layers.3.mlp.up_proj.weight"]
    assert set(row) < {name for name, _ in composer.model.named_parameters()}  # the embeddings' entries are zeros


@pytest.mark.parametrize("mode", ["per_product", "per_factor"])
def test_a_mergekit_recipe_for_adapters(mode):
    composer = low_rank(tiny("gpt2"), mode)
    vectors = lora_vectors(tiny("gpt2"))
    sources = [f"org/base+org/lora-{i}" for i in range(3)]
    folders = {"org/base": tiny("gpt2").state_dict()}
    folders |= {source: v.apply(tiny("gpt2")).state_dict() for source, v in zip(sources, vectors, strict=True)}
    model = tiny("gpt2")
    model.load_state_dict(merge(mergekit_yaml(composer, "org/base", sources), folders))
    torch.testing.assert_close(logits(model), logits(composer.model), rtol=0, atol=5e-5)


def test_what_mergekit_cannot_express():
    composer = composed(tiny("llama"), partitions=2)
    with pytest.raises(ValueError, match="one weight a tensor.*2 parts"):
        mergekit_yaml(composer, "base", ["a", "b", "c"])
    composer.remove()
    composer = composed(tiny("llama"))
    for sources in (["a", "b"], ["a", "b", "a"], ["a", "b", "base"]):
        with pytest.raises(ValueError, match="name 3 different models that are not the base"):
            mergekit_yaml(composer, "base", sources)
    with pytest.raises(ValueError, match="torch.float64"):
        mergekit_yaml(composed(tiny("llama", dtype=torch.float64)), "base", ["a", "b", "c"])
    recipe = yaml.safe_load(mergekit_yaml(composed(tiny("llama", dtype=torch.bfloat16)), "base", ["a", "b", "c"]))
    assert (recipe["dtype"], recipe["out_dtype"]) == ("float32", "bfloat16")


# Adapters


@pytest.mark.parametrize("mode", ["per_product", "per_factor"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_the_adapter_is_an_ordinary_lora_with_the_same_logits(name, mode, tmp_path):
    tiny(name).save_pretrained(tmp_path / "base")
    composer = low_rank(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), mode)
    before, expected = snapshot(composer.model), logits(composer.model.eval())
    errors = export_adapter(composer, tmp_path / "out")
    assert errors == dict.fromkeys(composer.block_names, 0.0)
    assert_same(composer.model.state_dict(), before)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and settings["base_model_name_or_path"] == str(tmp_path / "base")

    tuned = PeftModel.from_pretrained(tiny(name), tmp_path / "out").eval()
    assert (expected - logits(tiny(name))).abs().max() > 0.1
    torch.testing.assert_close(logits(tuned), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(logits(tuned.merge_and_unload()), expected, rtol=0, atol=1e-4)

    again = task_vector(str(tmp_path / "base"), str(tmp_path / "out"))  # it is a task vector itself
    for column, target in enumerate(composer.block_names):
        whole = composer.folded(column).dense()
        whole = whole.T if name == "gpt2" else whole
        torch.testing.assert_close(again.dense(target), whole, rtol=0, atol=1e-6)


def test_an_adapter_cut_to_a_rank_says_what_it_lost(tmp_path):
    composer = low_rank(tiny("llama"))
    errors = export_adapter(composer, tmp_path / "out", rank=4)
    tiny("llama").save_pretrained(tmp_path / "base")
    found = task_vector(str(tmp_path / "base"), str(tmp_path / "out"))
    cut = 0
    for column, target in enumerate(composer.block_names):
        whole = composer.folded(column).dense().double()
        u, sizes, v = torch.linalg.svd(whole, full_matrices=False)
        best = (u[:, :4] * sizes[:4]) @ v[:4]
        assert found[target].a.shape[0] == 4
        torch.testing.assert_close(found.dense(target).double(), best, rtol=0, atol=1e-5)
        assert errors[target] == pytest.approx(float((whole - best).norm() / whole.norm()), rel=1e-4)
        cut += errors[target] > 0.05
    assert cut == len(errors)
    assert set(export_adapter(composer, tmp_path / "high", rank=50).values()) == {0.0}
    with pytest.raises(ValueError, match="rank=0"):
        export_adapter(composer, tmp_path / "none", rank=0)
    assert not (tmp_path / "none").exists()


def test_coefficients_of_zero_export_too(tmp_path):
    composer = LowRankComposer(tiny("llama"), lora_vectors(tiny("llama")))
    assert set(export_adapter(composer, tmp_path / "out", rank=2).values()) == {0.0}
    tuned = PeftModel.from_pretrained(tiny("llama"), tmp_path / "out")
    assert torch.equal(logits(tuned), logits(tiny("llama")))


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_an_adapter_from_a_quantised_base_loads_on_it(kind, tmp_path):
    model, vectors = quantised_llama(tmp_path / "base", kind)
    composer = low_rank(model, vectors=vectors)
    composer.model.train()  # see tests/test_atlas_low_rank.py
    with torch.no_grad():
        expected = composer.model(input_ids=IDS).logits
        export_adapter(composer, tmp_path / "out")
        composer.remove()
        tuned = PeftModel.from_pretrained(model, tmp_path / "out").train()
        torch.testing.assert_close(tuned(input_ids=IDS).logits, expected, rtol=0, atol=1e-4)


def test_nothing_is_left_when_an_adapter_cannot_be_written(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    composer = low_rank(tiny("llama"))
    monkeypatch.setattr("steerbook.trainers.atlas.export.save_file", full)
    with pytest.raises(OSError, match="No space"):
        export_adapter(composer, tmp_path / "out")
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("kind", ["resident", "stream", "low rank"])
def test_coefficients_of_other_vectors_are_refused(kind, tmp_path):
    """And of the same ones in another order; kept in bf16 they are the same."""

    def build(vectors):
        if kind == "low rank":
            return LowRankComposer(tiny("llama"), vectors)
        return Composer(tiny("llama"), vectors, placement=kind)

    model = tiny("llama")
    vectors = lora_vectors(model) if kind == "low rank" else dense_vectors(model)
    composer = build(vectors)
    assert len(set(composer.vector_ids)) == 3
    save_coefficients(tmp_path / "c.json", composer, sources=["a", "b", "c"])
    saved = load_coefficients(tmp_path / "c.json")
    apply_coefficients(build(vectors), saved)
    with pytest.raises(ValueError, match="learned for other task vectors than a, b, or in another order"):
        apply_coefficients(build([vectors[1], vectors[0], vectors[2]]), saved)
    with pytest.raises(ValueError, match="learned for other task vectors than c, or"):
        apply_coefficients(build([vectors[0], vectors[1], 2 * vectors[2]]), saved)
    if kind != "low rank":
        rounded = [TaskVector({name: entry.bfloat16() for name, entry in vector.items()}) for vector in vectors]
        apply_coefficients(build(rounded), saved)
