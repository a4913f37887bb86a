"""recipes/self_interpretability.py on pretrained models: LoRA and all weights, chat templates, the YAML files."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from chat_models import CHAT
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from steerbook.data_builders.self_interpretability import PreferenceDataArguments
from steerbook.data_builders.self_interpretability.text_experiment import TextExperiment
from steerbook.eval.prompts import prompt_text
from steerbook.trainers.self_interpretability.stages import templated
from steerbook.trainers.self_interpretability.trainer import PreferenceConfig, PreferenceTrainer
from steerbook.trainers.tiny_lm import build_tokenizer

ROOT = Path(__file__).parents[1]
CONFIGS = {path.stem: path for path in sorted((ROOT / "recipes" / "configs" / "self_interpretability").glob("*.yaml"))}
SMALL = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "qwen25_7b": Qwen2Config(**SMALL),
    "qwen3_06b": Qwen3Config(head_dim=16, **SMALL),
    "llama32_1b": LlamaConfig(tie_word_embeddings=True, **SMALL),
}
# As Qwen3's: an answer has an empty thinking block, a prompt has one only where thinking is switched off
THINKING = CHAT.replace(
    "<{{ m.role }}>", "<{{ m.role }}>{% if m.role == 'assistant' %}<think></think>{% endif %}"
).replace("<assistant>", "<assistant>{% if enable_thinking is false %}<think></think>{% endif %}")
TEMPLATES = {
    "qwen25_7b": CHAT,
    "qwen3_06b": THINKING,
    "llama32_1b": CHAT.replace("{% for", "{{ date_string or 'today' }}{% for", 1),
}
SHORT = ["--preset", "smoke", "--use_cpu", "true", "--instilled", "4", "--native", "2", "--never", "1", "--asked", "1",
         "--choices", "3", "--eval_batch_size", "402"]  # fmt: skip


@pytest.fixture(scope="module")
def recipe(load_recipe):
    return load_recipe("self_interpretability")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Contexts of two attributes: 201 numbers of each are scored."""
    file = tmp_path_factory.mktemp("few") / "contexts.jsonl"
    rows = [
        {"short_name": f"c{n}", "question": f"As {n}?",
         "attributes": [{"name": f"{name}{n}", "units": "", "range": [0, 9]} for name in "wh"]}
        for n in range(7)
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--scenarios", str(file)]


def tiny(name):
    torch.manual_seed(0)
    tokenizer = build_tokenizer([], "byte")
    tokenizer.chat_template = TEMPLATES[name]
    return AutoModelForCausalLM.from_config(FAMILIES[name]).eval(), tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    for name in FAMILIES:
        for part in tiny(name):
            part.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_runs_two_steps_on_a_tiny_model(recipe, base, few, tmp_path, name):
    lines, content = CONFIGS[name].read_text().splitlines(), yaml.safe_load(CONFIGS[name].read_text())
    command = "accelerate launch recipes/self_interpretability.py --config recipes/configs/self_interpretability"
    assert lines[1] == f"#   {command}/{name}.yaml" and content["output_dir"] == f"runs/self_interpretability-{name}"
    settings = recipe.parse(["--config", str(CONFIGS[name]), "--use_cpu", "true", "--bf16", "false"])
    assert settings.model.model_name_or_path == content["model_name_or_path"] and settings.recipe.seeds == [0, 1, 2]
    assert settings.training.num_train_epochs == 3 and settings.training.lr_scheduler_type == "cosine"
    recipe.main(["--config", str(CONFIGS[name]), *SHORT, *few, "--model_name_or_path", str(base / name),
                 "--seeds", "0",
                 "--bf16", "false", "--dtype", "float32", "--reports_each", "1", "--trials", "12", "--folds", "0",
                 "--max_steps", "2", "--report_max_steps", "2", "--gate", "-1", "--output_dir",
                 str(tmp_path / "run")])  # fmt: skip
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["status"] == "finished" and found["toy"] is False
    arms = {file.parent.name: json.loads(file.read_text()) for file in tmp_path.rglob("measured.json")}
    assert set(arms) == {"base", "instilled", "reported_0", "shuffled", "other", "reinstil"}
    for one in arms.values():
        assert set(one["contexts"]) == set(arms["base"]["contexts"]) and len(one["contexts"]) == 7
        assert all(context["replies"] == 1 and 0 <= context["valid"] <= 1 for context in one["contexts"].values())
    saved = {path.parent.parent.name for path in tmp_path.rglob("adapter_model.safetensors")}
    assert {"instilled", "reported_0"} <= saved


def test_all_weights_with_only_the_embeddings_and_the_last_layer(recipe, base, few, tmp_path):
    recipe.main([*SHORT, *few, "--model_name_or_path", str(base / "qwen25_7b"), "--levels", "L0", "L3", "--controls",
                 "reinstil", "--output_dir", str(tmp_path / "run")])  # fmt: skip
    first, folder = AutoModelForCausalLM.from_pretrained(base / "qwen25_7b"), tmp_path / "run" / "seed_0"
    changed = {}
    for arm in ("instilled", "instilled_L3"):
        after = AutoModelForCausalLM.from_pretrained(folder / arm / "model").state_dict()
        changed[arm] = {name for name, value in first.state_dict().items() if not torch.equal(value, after[name])}
    assert changed["instilled"] == {"model.embed_tokens.weight"}
    assert {name.split(".")[2] for name in changed["instilled_L3"] if ".layers." in name} == {"1"}


def test_an_adapter_on_the_first_half_is_for_instilling_alone(recipe, base, few, tmp_path):
    recipe.main([*SHORT, *few, "--model_name_or_path", str(base / "qwen25_7b"), "--use_peft", "true",
                 "--first_half", "true",
                 "--lora_target_modules", "q_proj", "v_proj", "--output_dir", str(tmp_path / "run")])  # fmt: skip
    layers = {}
    for arm in ("instilled", "reported_0"):
        config = json.loads((tmp_path / "run" / "seed_0" / arm / "model" / "adapter_config.json").read_text())
        layers[arm] = config["layers_to_transform"]
    assert layers == {"instilled": [0], "reported_0": None}


@pytest.mark.parametrize("name", FAMILIES)
def test_training_reads_what_measuring_does(tmp_path, name):
    """The tokens in front of the answer that the trainer learns are those behind which choices are measured."""
    model, tokenizer = tiny(name)
    given = {"qwen3_06b": {"enable_thinking": False}, "llama32_1b": {"date_string": "26 Jul 2024"}}.get(name, {})
    data = TextExperiment(PreferenceDataArguments(instilled=4, native=0, never=0, choices=2))
    rows = data.instil(data.instilled, data.weights)
    args = PreferenceConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    trained = PreferenceTrainer(model, args, templated(rows, given), processing_class=tokenizer).train_dataset
    for row, one in zip(rows, trained, strict=True):
        text = prompt_text(tokenizer, row["prompt"], given)
        before = tokenizer(text)["input_ids"]
        assert one["input_ids"][: len(before)] == before
        scored = [label for label in one["labels"] if label != -100]
        assert one["labels"][: len(before)] == [-100] * len(before)
        assert tokenizer.decode(scored[:1]) == row["completion"][0]["content"]


def test_a_template_that_puts_thinking_between_is_refused(recipe, base, tmp_path):
    with pytest.raises(SystemExit, match="give enable_thinking false"):
        recipe.main([*SHORT, "--model_name_or_path", str(base / "qwen3_06b"), "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--levels", "L2"], ["--levels L2", "embedded world"]),
        (["--levels", "L0", "--use_peft", "true"], ["an adapter has weights of its own"]),
        (["--first_half", "true"], ["--first_half is for adapters"]),
        (["--known", "5"], ["--known is of the embedded world"]),
        (["--rows_seed", "1"], ["--rows_seed has no effect here", "--seeds"]),
        (["--max_length", "300"], ["300 are allowed", "--max_length"]),
        (["--chat_template_kwargs", "so"], ["--chat_template_kwargs so", "no JSON"]),
        (["--reports_each", "50", "--replay", "0.9"], ["--replay 0.9 of", "replay less"]),
        (["--chat_template_kwargs", "[1]"], ["--chat_template_kwargs", "a JSON object"]),
        (["--scenarios", "none.csv"], ["none.csv"]),
    ],
)
def test_bad_input_is_said_before_any_training(recipe, base, tmp_path, flags, parts):
    given = [*SHORT, "--model_name_or_path", str(base / "qwen25_7b"), *flags]
    with pytest.raises(SystemExit) as caught:
        recipe.main([*given, "--output_dir", str(tmp_path / "run")])
    text = str(caught.value.code)
    assert text.startswith("error: ") and all(part in text for part in parts), text
    assert not list(tmp_path.rglob("measured.json"))


def test_flags_of_pretrained_models_need_one(recipe, tmp_path):
    for flags in (["--use_peft", "true"], ["--choices", "7"], ["--first_half", "true"]):
        with pytest.raises(SystemExit, match=f"{flags[0]} is for a pretrained model"):
            recipe.main(["--preset", "smoke", *flags, "--output_dir", str(tmp_path / "run")])
