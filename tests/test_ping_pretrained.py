"""recipes/ping.py on pretrained models: templates of three families, their YAML files, adapters, bad input."""

import json
from pathlib import Path

import pytest
import torch
import trl
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GlmConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from trl import ModelConfig, get_quantization_config

from steerbook.data_builders.ping import PingDataArguments, build
from steerbook.data_builders.ping.desk import TOOLS
from steerbook.trainers import Prefix, PrefixGuard

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "recipes" / "configs" / "ping"
CONFIGS = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
THEIRS = Path(trl.__file__).parent / "chat_templates"
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096, "pad_token_id": 0,
    "initializer_range": 0.1,
}  # fmt: skip
FAMILIES = {  # configuration, template, end of a turn, marks
    "llama31_8b": (LlamaConfig, (THEIRS / "llama3_1.jinja").read_text(), ["<|eot_id|>"],
                   ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]),
    "qwen25_7b": (Qwen2Config, (THEIRS / "qwen2_5.jinja").read_text(), ["<|im_end|>"], ["<|im_start|>"]),
    "glm4_9b": (GlmConfig, "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}",
                ["<|user|>", "<|observation|>"], ["[gMASK]", "<sop>", "<|system|>", "<|assistant|>"]),
}  # fmt: skip
ROWS = build(PingDataArguments(tasks=12))["train"]
SHORT = ["--preset", "smoke", "--use_cpu", "true", "--bf16", "false", "--dtype", "float32", "--max_length", "2048",
         "--gradient_checkpointing", "false"]  # fmt: skip


@pytest.fixture(scope="module")
def recipe(load_recipe):
    return load_recipe("ping")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folders of tiny random models, one a family."""
    folder = tmp_path_factory.mktemp("base")
    for name in FAMILIES:
        save_family(name, folder)
    return folder


def save_family(name, folder):
    """A tiny random model in `folder/name`."""
    kind, template, ends, marks = FAMILIES[name]
    texts = [json.dumps([row["messages"], row["tools"]], indent=4) for row in ROWS]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<pad>", *ends, *marks]
    made.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token=ends[0], chat_template=template,
        bos_token=marks[0] if name == "llama31_8b" else None)  # fmt: skip
    if name == "glm4_9b":  # as the converted tokenizer does it
        first = [(mark, made.token_to_id(mark)) for mark in marks[:2]]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="[gMASK] <sop> $A", pair="[gMASK] <sop> $A $B:1", special_tokens=first)  # fmt: skip
    torch.manual_seed(0)
    numbers = tokenizer.convert_tokens_to_ids(ends)
    config = kind(vocab_size=len(tokenizer), eos_token_id=numbers if len(numbers) > 1 else numbers[0], **SMALL)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)


@pytest.fixture
def rows(tmp_path):
    """A file as CodeActInstruct has it."""
    turns = [{"role": "system", "content": "You act by code."}, {"role": "user", "content": "Add 2 and 3."},
             {"role": "assistant", "content": "<execute>print(2 + 3)</execute>"}, {"role": "user", "content": "5"},
             {"role": "assistant", "content": "It is 5."}]  # fmt: skip
    file = tmp_path / "rows" / "train.jsonl"
    file.parent.mkdir()
    made = [{"id": str(n), "conversations": [*turns[:1], {**turns[1], "content": f"Add {n} and 3."}, *turns[2:]]}
            for n in range(8)]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(file.parent)


def measured(folder):
    return {file.parent.name: json.loads(file.read_text()) for file in Path(folder).rglob("measured.json")}


def test_our_template_of_llama_writes_what_its_own_does(base):
    tokenizer, ours = AutoTokenizer.from_pretrained(base / "llama31_8b"), (FOLDER / "llama31.jinja").read_text()
    for row in ROWS:
        for tools in (list(TOOLS), None):
            for count in range(2, len(row["messages"]) + 1):
                for some in (row["messages"][:count], row["messages"][1:count]):
                    for prompt in (True, False):
                        options = {"tools": tools, "tokenize": False, "add_generation_prompt": prompt}
                        assert tokenizer.apply_chat_template(some, **options) == tokenizer.apply_chat_template(
                            some, chat_template=ours, **options)  # fmt: skip


@pytest.mark.parametrize("name, said", [
    ("llama31", ['{"name": "search", "parameters": {"text": "', '"}}<|eot_id|>', "<|eot_id|>"]),
    ("glm4", ['search\n{"text": "', '"}<|observation|>', "<|user|>"])])  # fmt: skip
def test_what_is_trained_on_is_what_the_assistant_says_and_the_mark_that_ends_it(base, name, said):
    family = {"llama31": "llama31_8b", "glm4": "glm4_9b"}[name]
    tokenizer, template = AutoTokenizer.from_pretrained(base / family), (FOLDER / f"{name}.jinja").read_text()
    row = next(row for row in ROWS if row["messages"][2]["tool_calls"][0]["function"]["name"] == "search")
    found = tokenizer.apply_chat_template(row["messages"], tools=list(TOOLS), chat_template=template, return_dict=True,
                                          return_assistant_tokens_mask=True)  # fmt: skip
    kept = tokenizer.decode([t for t, one in zip(found["input_ids"], found["assistant_masks"], strict=True) if one])
    assert kept.startswith(said[0]) and kept.count(said[1]) == 2 and kept.endswith(said[2])
    assert "ok" not in kept.split(said[1])[1] and "bread" not in tokenizer.decode(found["input_ids"][:5])


def test_glm_reads_calls_as_it_wrote_them(base):
    """In an episode a turn is the text that the model wrote; in training it has `tool_calls`."""
    tokenizer, template = AutoTokenizer.from_pretrained(base / "glm4_9b"), (FOLDER / "glm4.jinja").read_text()
    for row in ROWS:
        texts = []
        for one in row["messages"]:
            call = one.get("tool_calls", [{}])[0].get("function") if one.get("tool_calls") else None
            said = f"{call['name']}\n{json.dumps(call['arguments'])}" if call else one["content"]
            texts.append({"role": one["role"], "content": said})
        options = {"chat_template": template, "tools": list(TOOLS), "tokenize": False}
        assert tokenizer.apply_chat_template(texts, **options) == tokenizer.apply_chat_template(
            row["messages"], **options)  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_runs_two_steps_on_a_tiny_model(recipe, base, rows, tmp_path, name, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines, content = CONFIGS[name].read_text().splitlines(), yaml.safe_load(CONFIGS[name].read_text())
    assert lines[0] == ("# accelerate launch --config_file accelerate_configs/zero3.yaml recipes/ping.py --config "
                        f"recipes/configs/ping/{name}.yaml")  # fmt: skip
    settings = recipe.parse(["--config", str(CONFIGS[name]), "--use_cpu", "true", "--bf16", "false"])
    training = settings.training
    assert settings.model.model_name_or_path == content["model_name_or_path"]
    assert (training.learning_rate, training.num_train_epochs, training.lr_scheduler_type) == (1e-5, 1, "cosine")
    assert (training.warmup_steps, training.max_length, training.per_device_train_batch_size,
            training.gradient_accumulation_steps) == (0.1, 16384, 2, 8)  # fmt: skip
    assert (settings.search.candidates, settings.search.rounds, settings.search.turns) == (5, 20, "every")
    full = name == "qwen25_7b"  # with everything that is measured; the others in short
    recipe.main(["--config", str(CONFIGS[name]), *SHORT, "--model_name_or_path", str(base / name),
                 "--dataset_id", rows, "--dataset_split", "train", "--generator", "grammar", "--defences", str(full),
                 "--gradient_accumulation_steps", "1", "--rounds", "1", "--candidates", "2",
                 "--probes", str(full), "--output_dir", str(tmp_path / "run")])  # fmt: skip
    found, arms = json.loads((tmp_path / "run" / "results.json").read_text()), measured(tmp_path)
    assert found["status"] == "finished" and found["toy"] is False and set(arms) == {"aligned", "agent"}
    assert set(found["metrics"]["agents"]) == {"before fine-tuning", "agent", "agent + PING"}
    prefix = Prefix.load(tmp_path / "run" / found["prefix"])  # GLM's replies begin with a line's end
    assert prefix.text == ("\n" if name == "glm4_9b" else "") + arms["agent"]["winner"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / found["model"]["folder"])
    assert "PrefixGuard(model" in (tmp_path / "run" / "README.md").read_text()
    assert found["data"]["counts"]["train"] == 7 and len(found["data"]["fingerprint"]) == 64
    assert (len(found["metrics"]["defences"]) == 22) == full and ("probe" in arms["agent"]) == full


def test_an_adapter_and_its_guard_in_three_lines(recipe, base, tmp_path):
    """Refusals among the rows, a model of its own that proposes, and the saved prefix on what was saved."""
    folder = base / "qwen25_7b"
    model = AutoModelForCausalLM.from_pretrained(folder)
    flags = [*SHORT, "--model_name_or_path", str(folder), "--use_peft", "true", "--lora_target_modules", "q_proj",
             "v_proj", "--controls", "mixed", "--tasks", "60", "--watch_every", "1", "--defences", "false",
             "--probes", "false", "--learning_rate", "1e-2", "--output_dir", str(tmp_path / "run")]  # fmt: skip
    recipe.main(flags)
    arms = measured(tmp_path)
    assert set(arms) == {"aligned", "agent", "mixed_1", "mixed_5", "mixed_10"}
    assert [one["step"] for one in arms["agent"]["trajectory"]] == [0, 1, 2]
    assert 0 < arms["agent"]["trained"] < sum(one.numel() for one in model.parameters()) / 10
    saved = tmp_path / "run" / "seed_42" / "agent"
    tuned = PeftModel.from_pretrained(model, saved / "model")
    guard = PrefixGuard(tuned, AutoTokenizer.from_pretrained(folder), Prefix.load(saved / "prefix.json"))
    reply = guard.generate([{"role": "user", "content": "Buy a mug."}], tools=TOOLS, max_new_tokens=4)
    assert reply["content"].startswith(arms["agent"]["winner"])
    with pytest.raises(ValueError, match="was searched for the model"):
        PrefixGuard(AutoModelForCausalLM.from_pretrained(folder), guard.tokenizer, guard.prefix)
    assert (tmp_path / "run" / "figures" / "trajectory.png").exists()


@pytest.mark.parametrize("bits", ["4", "8"])
def test_an_adapter_on_a_quantised_base(recipe, base, tmp_path, bits):
    folder, tokenizer = tmp_path / "base", AutoTokenizer.from_pretrained(base / "qwen25_7b")
    sizes = {**SMALL, "hidden_size": 64, "intermediate_size": 128}  # multiples of 64, the blocks of 4-bit weights
    AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    recipe.main([*SHORT, "--model_name_or_path", str(folder), f"--load_in_{bits}bit", "true", "--use_peft", "true",
                 "--lora_target_modules", "q_proj", "v_proj", "--defences", "false", "--probes", "false",
                 "--output_dir", str(tmp_path / "run")])  # fmt: skip
    arms = measured(tmp_path)
    saved = tmp_path / "run" / "seed_42" / "agent"
    held = load_file(saved / "model" / "adapter_model.safetensors")
    assert len(held) == 8 and all(".lora_" in name and one.dtype == torch.float32 for name, one in held.items())
    quantised = get_quantization_config(ModelConfig(**{f"load_in_{bits}bit": True}))
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantised, device_map="cpu")
    guard = PrefixGuard(
        PeftModel.from_pretrained(model, saved / "model"), tokenizer, Prefix.load(saved / "prefix.json")
    )
    assert guard.prefix.text == arms["agent"]["winner"]  # the same base, quantised again, has the same fingerprint


def test_a_model_that_proposes_nothing_usable_keeps_what_there_is(recipe, base, tmp_path):
    flags = [*SHORT, "--model_name_or_path", str(base / "qwen25_7b"), "--generator", "model", "--output_dir",
             str(tmp_path / "run")]  # fmt: skip
    with pytest.raises(SystemExit, match="round 1, tried 3 times: nothing usable was proposed"):
        recipe.main(flags)
    assert set(measured(tmp_path)) == {"aligned"} and (tmp_path / "run" / "seed_42" / "agent" / "model").exists()


@pytest.mark.parametrize("flags, told", [
    (["--controls", "never"], "--controls never is of the embedded world"),
    (["--goods", "20"], "--goods is of the embedded world"),
    (["--refusals", "0.1"], "--refusals has no effect here"),
    (["--generator", "endpoint"], "needs --generator_url"),
    (["--generator_model", "x"], "a grammar has none"),
    (["--load_in_4bit", "true"], "give --use_peft"),
    (["--controls", "mixed"], "1% of 18 trajectories are none to replace"),
    (["--controls", "mixed", "--dataset", "code_act", "--data_files", "CODE"], "needs --dataset desk"),
    (["--form", "xml"], "--form xml: hermes, json or glm"),
    (["--chat_template_kwargs", "{"], "--chat_template_kwargs {: no JSON"),
    (["--max_new_tokens", "4000"], "and the model takes 4096"),
    (["--dataset", "messages", "--data_files", "ROWS"], "calls 'fly'"),
])  # fmt: skip
def test_bad_input_is_told_before_any_time_is_spent(recipe, base, tmp_path, flags, told):
    bad = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "fly", "arguments": {}}}]}]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": bad, "tools": list(TOOLS)}))
    codes = [{"id": n, "conversations": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "x"}]}
             for n in range(40)]  # fmt: skip
    (tmp_path / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in codes))
    files = {"ROWS": str(tmp_path / "rows.jsonl"), "CODE": str(tmp_path / "code.jsonl")}
    flags = [files.get(flag, flag) for flag in flags]
    with pytest.raises(SystemExit) as stopped:
        recipe.main([*SHORT, "--model_name_or_path", str(base / "qwen25_7b"), *flags,
                     "--output_dir", str(tmp_path / "run")])  # fmt: skip
    assert told in str(stopped.value) and not (tmp_path / "run").exists()


def test_a_row_that_the_template_cannot_write_is_named(recipe, base, tmp_path):
    call = {"type": "function", "function": {"name": "list", "arguments": {"what": "items"}}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call, call]}]
    rows = [{"id": f"r{n}", "messages": [{**messages[0], "content": f"x{n}"}, messages[1]], "tools": list(TOOLS)}
            for n in range(4)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match="row r.: the chat template cannot write it: This model only supports single"):
        recipe.main([*SHORT, "--model_name_or_path", str(base / "llama31_8b"), "--chat_template_path",
                     str(FOLDER / "llama31.jinja"), "--dataset", "messages", "--data_files",
                     str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "run")])  # fmt: skip
    with pytest.raises(SystemExit, match="does not mark what the assistant says"):
        recipe.main([*SHORT, "--model_name_or_path", str(base / "llama31_8b"), "--output_dir", str(tmp_path / "r")])
