"""Vectors from model folders and LoRA adapters, against the loaded models and PEFT's own delta weights."""

import json
import os
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny, tiny_llama
from transformers import AutoModelForCausalLM

from steerbook.trainers import Composer, TaskVector
from steerbook.trainers.atlas.entries import LowRank
from steerbook.trainers.atlas.extract import main, task_vector
from steerbook.trainers.fingerprint import model_fingerprint

MAKE = {
    "llama": lambda seed: tiny_llama(seed),
    "llama_tied": lambda seed: tiny_llama(seed, tie_word_embeddings=True),
    "gpt2": lambda seed: tiny("gpt2", seed),
}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """`folders(name)`: base and tuned model, saved as `base` and `tuned` in the working folder."""
    monkeypatch.chdir(tmp_path)

    def save(name, dtype=torch.float32, **how):
        models = []
        for seed, folder in enumerate(("base", "tuned")):
            model = MAKE[name](seed).to(dtype)
            model.save_pretrained(folder, **how)
            models.append(model)
        return models

    return save


def check(vector, base, tuned):
    """The vector holds just the difference of these two models' parameters, and belongs to the base."""
    expected = dict(tuned.named_parameters())
    assert list(vector.shapes) == list(expected)
    for name, parameter in base.named_parameters():
        difference = (expected[name].float() - parameter.float()).to(expected[name].dtype)
        assert torch.equal(vector[name], difference), name
    assert vector.base == model_fingerprint(base)


def rewrite(folder, change):
    """Save the folder's tensors again after `change(tensors)`."""
    tensors = load_file(f"{folder}/model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, f"{folder}/model.safetensors")


def reconfigure(file, **changes):
    settings = json.loads(open(file).read())
    with open(file, "w") as out:
        json.dump({**settings, **changes}, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MAKE)
def test_difference_of_two_folders(name, dtype, folders):
    base, tuned = folders(name, dtype)
    vector = task_vector("base", "tuned")
    check(vector, base, tuned)
    assert vector.source == "tuned"
    loaded = AutoModelForCausalLM.from_pretrained("base", dtype=dtype)
    assert vector.base == model_fingerprint(loaded)
    Composer(loaded, [vector], exclude=())  # fits


def test_sharded_folders(folders):
    base, tuned = folders("llama", max_shard_size="20KB")
    assert not (os.path.exists("base/model.safetensors"))
    check(task_vector("base", "tuned"), base, tuned)
    tuned.save_pretrained("whole")  # the other one need not be
    check(task_vector("base", "whole"), base, tuned)


def test_dtype_of_the_differences(folders):
    base, tuned = folders("llama")
    tuned.bfloat16().save_pretrained("tuned")
    exact = tuned.model.norm.weight.float() - base.model.norm.weight
    assert torch.equal(task_vector("base", "tuned")["model.norm.weight"], exact.bfloat16())
    assert torch.equal(task_vector("base", "tuned", dtype=torch.float32)["model.norm.weight"], exact)


def test_tied_head_in_the_file_or_not(folders):
    base, tuned = folders("llama_tied")
    assert "lm_head.weight" not in load_file("tuned/model.safetensors")
    expected = task_vector("base", "tuned")

    def both(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def head_only(tensors):
        both(tensors)
        del tensors["model.embed_tokens.weight"]

    for change in (both, head_only):
        rewrite("tuned", change)
        vector = task_vector("base", "tuned")
        check(vector, base, tuned)
        assert vector.base == expected.base
        tuned.save_pretrained("tuned")


def test_tied_head_that_was_trained_apart(folders):
    """transformers unties a head that a file holds with other values, whatever the configuration says."""
    base, _ = folders("llama_tied")

    def apart(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    rewrite("tuned", apart)
    with pytest.raises(ValueError, match="base has no lm_head.weight"):
        task_vector("base", "tuned")
    rewrite("base", apart)  # both: two parameters in either
    vector = task_vector("base", "tuned")
    loaded = AutoModelForCausalLM.from_pretrained("base")
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    assert vector.base == model_fingerprint(loaded)
    assert set(vector) == {name for name, _ in loaded.named_parameters()}
    with pytest.raises(ValueError, match="embed_tokens.weight and lm_head.weight are one tensor in this model"):
        tied = MAKE["llama_tied"](0)
        rewrite("tuned", lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"] + 1}))
        TaskVector(task_vector("base", "tuned")).apply(tied)


def test_gpt2_files_without_the_models_prefix(folders):
    """As on the Hub: saved from GPT2Model, without `transformer.`."""
    base, tuned = folders("gpt2")

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    for folder in ("base", "tuned"):
        rewrite(folder, strip)
        check(task_vector("base", "tuned"), base, tuned)


def test_saved_vectors_are_taken_for_their_base(folders):
    folders("llama")
    task_vector("base", "tuned").save("v.safetensors")
    assert set(task_vector("base", "v.safetensors")) == set(task_vector("base", "tuned"))
    with pytest.raises(ValueError, match=r"v.safetensors was made from the base \w{16}, but tuned is \w{16}"):
        task_vector("tuned", "v.safetensors")
    with pytest.raises(ValueError, match="was made from the base"):
        Composer(MAKE["llama"](1), [TaskVector.load("v.safetensors")])


def test_other_models_are_refused(folders):
    base, _ = folders("llama")
    tiny("gpt2").save_pretrained("gpt2")
    tiny_llama(1, vocab_size=60).save_pretrained("vocabulary")
    tiny_llama(1, num_hidden_layers=4).save_pretrained("deeper")
    for tuned, message in (
        ("gpt2", "gpt2 is a 'gpt2' model, the base base 'llama'"),
        ("vocabulary", r"embed_tokens.weight \[48, 32\] and \[60, 32\]; the vocabularies differ"),
        ("deeper", "base has no model.layers.3.*and 4 more"),
    ):
        with pytest.raises(ValueError, match=message):
            task_vector("base", tuned)


def test_incomplete_and_corrupt_folders(folders):
    _, tuned = folders("llama", max_shard_size="20KB")
    shards = sorted(os.listdir("tuned"))
    shards = [name for name in shards if name.endswith(".safetensors")]
    assert len(shards) > 3

    def fails(error, message, tuned="tuned", base="base"):
        with pytest.raises(error, match=message) as caught:
            task_vector(base, tuned)
        assert "\n" not in str(caught.value)

    good = open(f"tuned/{shards[2]}", "rb").read()
    for content in (good[: len(good) // 2], good[:4], b"<html>not found</html>"):
        with open(f"tuned/{shards[2]}", "wb") as file:
            file.write(content)
        fails(OSError, f"{shards[2]} is not a readable safetensors file .*; copy or download it again")
    save_file({"something": torch.ones(2)}, f"tuned/{shards[2]}")
    fails(OSError, f"{shards[2]} lacks model.* which its index puts there")
    os.remove(f"tuned/{shards[2]}")
    fails(FileNotFoundError, f"tuned lacks {shards[2]}, which its index names")
    with open("tuned/model.safetensors.index.json", "w") as file:
        file.write("{")
    fails(ValueError, "model.safetensors.index.json is not valid JSON")
    shutil.rmtree("tuned")
    tuned.save_pretrained("tuned")
    rewrite("tuned", lambda tensors: [tensors.pop(name) for name in list(tensors) if "mlp" in name])
    fails(ValueError, "tuned lacks model.layers.0.mlp.gate_proj.weight, .* and 4 more: its files do not hold")
    reconfigure("tuned/config.json", architectures=["SomethingForCausalLM"])
    fails(ValueError, r"names the architecture \['SomethingForCausalLM'\]")
    reconfigure("tuned/config.json", model_type="something", architectures=None)
    fails(ValueError, "tuned/config.json: .*something")
    with open("tuned/config.json", "w") as file:
        file.write("{")
    fails(ValueError, "tuned/config.json: ")
    os.remove("tuned/config.json")
    fails(FileNotFoundError, "tuned has no config.json")
    tuned.save_pretrained("tuned")
    reconfigure("tuned/config.json", quantization_config={"quant_method": "fp8"})
    fails(ValueError, "tuned holds quantised weights")
    shutil.rmtree("tuned")
    fails(FileNotFoundError, "tuned: no such folder")
    fails(FileNotFoundError, "no such folder", base="./elsewhere")
    fails(OSError, "owner/name: neither a folder nor to be had from the Hub", "owner/name")


# LoRA


def adapter(model, folder="adapter", seed=0, **settings):
    """Random factors on a fresh adapter, saved; returns PEFT's own delta weight of every target."""
    torch.manual_seed(seed)
    peft = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **settings}))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter)
    peft.save_pretrained(folder)
    return {
        f"{name.removeprefix('base_model.model.')}.weight": module.get_delta_weight("default")
        for name, module in peft.named_modules()
        if hasattr(module, "get_delta_weight")
    }


LORA = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "all linear": ("llama_tied", {"target_modules": "all-linear"}),
    "rslora": ("llama", {"target_modules": ["down_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "o_proj", "up_proj"],
            "rank_pattern": {"o_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
            "alpha_pattern": {r"layers\.[01]\.self_attn\.q_proj": 11, "up_proj": 3, "proj": 100},
        },
    ),
    "patterns and rslora": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj"],
            "rank_pattern": {"^model.layers.1.self_attn.k_proj": 3},
            "alpha_pattern": {"q_proj": 5},
            "use_rslora": True,
        },
    ),
    "layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [2]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv1d, flag wrong": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": False}),
    "gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize("case", LORA)
def test_adapters_are_pefts_delta_weights(case, folders):
    name, settings = LORA[case]
    base, _ = folders(name)
    fingerprint = model_fingerprint(base)
    deltas = adapter(base, **settings)
    if case == "conv1d, flag wrong":  # PEFT writes down what it overruled; undo that
        reconfigure("adapter/adapter_config.json", fan_in_fan_out=False)
    vector = task_vector("base", "adapter")
    assert set(vector) == set(deltas) == set(vector.low_rank) and len(deltas) > 0
    for target, expected in deltas.items():
        entry = vector[target]
        assert isinstance(entry, LowRank) and entry.shape == vector.shapes[target] == expected.shape
        assert (entry.dense() - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (vector.base, vector.source) == (fingerprint, "adapter")
    vector.save("v.safetensors")
    saved = TaskVector.load("v.safetensors")
    assert all(torch.equal(saved.dense(target), vector.dense(target)) for target in deltas)


def test_an_adapters_vector_gives_the_merged_model(folders):
    folders("gpt2")
    base = AutoModelForCausalLM.from_pretrained("base")
    peft = AutoModelForCausalLM.from_pretrained("base")
    adapter(peft, target_modules=["c_attn"], fan_in_fan_out=True)
    composer = Composer(base, [task_vector("base", "adapter")])
    with torch.no_grad():
        composer.coefficients.fill_(1.0)
    composer.compose()
    ids = torch.tensor([[1, 5, 9, 30]])
    with torch.no_grad():
        assert (base(ids).logits - peft(ids).logits).abs().max() < 1e-3 * peft(ids).logits.abs().max()


def test_adapters_with_different_targets_compose(folders):
    folders("llama")
    for folder, targets in (("one", ["q_proj"]), ("two", ["up_proj", "q_proj"])):
        adapter(MAKE["llama"](0), folder, target_modules=targets)
    vectors = [task_vector("base", folder) for folder in ("one", "two")]
    composer = Composer(MAKE["llama"](0), vectors)
    assert len(composer.block_names) == 6


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices=\[3\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore")
def test_adapters_that_are_more_than_factors(settings, named, folders):
    base, _ = folders("llama")
    adapter(base, target_modules=["q_proj"], **settings)
    with pytest.raises(ValueError, match=f"adapter is not a plain LoRA adapter .*{named}.*merge it into its base"):
        task_vector("base", "adapter")


def test_adapters_of_other_models_and_broken_ones(folders):
    folders("llama")
    adapter(tiny_llama(0, num_hidden_layers=5), "deeper", target_modules=["q_proj"])
    with pytest.raises(
        ValueError, match="deeper adapts model.layers.3.self_attn.q_proj, which the base base does not"
    ):
        task_vector("base", "deeper")
    adapter(tiny_llama(0, hidden_size=40), "wider", target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"shapes differ \(base, wider\): .*q_proj.weight \[48, 32\] and \[48, 40\]"):
        task_vector("base", "wider")
    adapter(tiny("gpt2"), "gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(ValueError, match="gpt2 adapts transformer.h.0.attn.c_attn, which the base base does not"):
        task_vector("base", "gpt2")
    adapter(MAKE["llama"](0), "embedding", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ValueError, match="embedding holds .*lora_embedding_A.*, not just LoRA matrices"):
        task_vector("base", "embedding")
    adapter(MAKE["llama"](0), "good", target_modules=["q_proj"])
    reconfigure("good/adapter_config.json", peft_type="IA3")
    with pytest.raises(ValueError, match="peft_type='IA3'"):
        task_vector("base", "good")
    reconfigure("good/adapter_config.json", peft_type="LORA")
    with open("good/adapter_model.safetensors", "r+b") as file:
        file.truncate(3000)
    with pytest.raises(OSError, match="good/adapter_model.safetensors is not a readable safetensors file"):
        task_vector("base", "good")
    os.remove("good/adapter_model.safetensors")
    with pytest.raises(FileNotFoundError, match="good has no adapter_model.safetensors"):
        task_vector("base", "good")
    with open("good/adapter_config.json", "w") as file:
        file.write("[")
    with pytest.raises(ValueError, match="good/adapter_config.json is not valid JSON"):
        task_vector("base", "good")


# The command


def test_the_command_writes_one_file(folders, capsys):
    base, tuned = folders("gpt2")
    main(["base", "tuned", "out/v.safetensors"])
    vector = TaskVector.load("out/v.safetensors")
    assert capsys.readouterr().out == (
        f"out/v.safetensors: {len(vector)} tensors, norm {vector.norm():.4g}, base {model_fingerprint(base)}\n"
    )
    for name, tensor in task_vector("base", "tuned").items():
        assert torch.equal(vector[name], tensor)
    vector.apply(base)
    for found, expected in zip(base.parameters(), tuned.parameters(), strict=True):
        assert (found - expected).abs().max() < 1e-5
    main(["base", "tuned", "half.safetensors", "--dtype", "bfloat16"])
    assert {tensor.dtype for tensor in TaskVector.load("half.safetensors").values()} == {torch.bfloat16}


def test_the_command_writes_an_adapters_factors(folders):
    base, _ = folders("llama")
    deltas = adapter(base, target_modules=["q_proj"])
    main(["base", "adapter", "v.safetensors"])
    vector = TaskVector.load("v.safetensors")
    assert vector.low_rank == set(deltas)


def test_the_commands_errors_are_one_line_and_leave_nothing(folders):
    base, _ = folders("llama")
    shutil.copytree("tuned", "nan")
    rewrite("nan", lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    shutil.copytree("tuned", "cut")
    with open("cut/model.safetensors", "r+b") as file:
        file.truncate(5000)
    tiny("gpt2").save_pretrained("gpt2")
    with open("there.safetensors", "w") as file:
        file.write("mine")
    before = sorted(os.listdir())
    for arguments, message in (
        (["base", "nan", "v.safetensors"], "model.norm.weight holds 32 NaN or infinite values"),
        (["base", "base", "v.safetensors"], "base is zero everywhere: base and tuned model are the same"),
        (["base", "cut", "v.safetensors"], "cut/model.safetensors is not a readable safetensors file"),
        (["base", "gpt2", "v.safetensors"], "gpt2 is a 'gpt2' model"),
        (["base", "nowhere", "v.safetensors"], "nowhere: no such folder"),
        (["base", "owner/name", "v.safetensors"], "owner/name: neither a folder nor to be had from the Hub"),
        (["base", "tuned", "v.bin"], "the file's name must end in .safetensors"),
        (["base", "tuned", "there.safetensors"], "there.safetensors exists already; nothing was changed"),
        (["base", "tuned", "v.safetensors", "--dtype", "int8"], "--dtype int8: choose float32, float16 or bfloat16"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        text = str(caught.value)
        assert text.startswith("error: ") and message in text and "\n" not in text
    assert sorted(os.listdir()) == before
    assert open("there.safetensors").read() == "mine"
