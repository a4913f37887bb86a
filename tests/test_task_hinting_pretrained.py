"""recipes/task_hinting.py on pretrained models: the tasks as text, full fine-tuning and LoRA, the YAML files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config
from trl import SFTConfig, SFTTrainer

from steerbook.data_builders.task_hinting import HintingDataArguments, build, make_stream, text_tests
from steerbook.eval.task_hinting import collateral, evaluate
from steerbook.trainers.task_hinting.softmax import load
from steerbook.trainers.task_hinting.text_stream import TextStream
from steerbook.trainers.task_hinting.trainer import HintingConfig, HintingTrainer
from steerbook.trainers.tiny_lm import build_tokenizer

ROOT = Path(__file__).parents[1]
CONFIGS = {path.stem: path for path in sorted((ROOT / "recipes" / "configs" / "task_hinting").glob("*.yaml"))}
SMALL = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "qwen3_06b": Qwen3Config(head_dim=16, **SMALL),
    "llama32_1b": LlamaConfig(tie_word_embeddings=True, **SMALL),
}
SHORT = ["--preset", "smoke", "--use_cpu", "true", "--test_rows", "4", "--test_lengths", "3", "5", "--longest", "3"]


@pytest.fixture(scope="module")
def recipe(load_recipe):
    return load_recipe("task_hinting")


def tiny(name="qwen3_06b"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[name]).eval(), build_tokenizer([], "byte")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    for name in FAMILIES:
        for part in tiny(name):
            part.save_pretrained(folder / name)
    return folder


# ---- rows ----


def addition(**changes):
    few = {"longest": 3, "main_rows": 6, "hint_rows": 2, "queries": 1, "test_lengths": [3, 5], "test_rows": 6}
    return HintingDataArguments(**{"main": "addition", "hints": ["carry"]} | few | changes)


def test_a_streams_texts_are_those_of_the_builder_tokenised_as_trl_does(tmp_path):
    """TRL's own trainer on the rows of `build` is the oracle."""
    model, tokenizer = tiny()
    args = addition(train_rows=12)
    stream = TextStream(make_stream(args), tokenizer)
    made = build(args)["train"]
    config = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], completion_only_loss=True)
    trained = SFTTrainer(model, config, train_dataset=made, processing_class=tokenizer).train_dataset
    wanted = {(tuple(row["input_ids"]), tuple(label != -100 for label in row["labels"])) for row in trained}
    found = set()
    for number in (0, 1):
        step = stream.step(number)
        assert step.tasks.tolist() == [0] * 6 + [1] * 2 and step.ids.shape == step.targets.shape
        for ids, targets in zip(step.ids.tolist(), step.targets.tolist(), strict=True):
            length = ids.index(tokenizer.eos_token_id) + 1
            assert set(ids[length:]) <= {tokenizer.pad_token_id} and not any(targets[length:])
            found.add((tuple(ids[:length]), tuple(targets[:length])))
    assert found == wanted


def following(rows):
    """Of all rows: what is seen -> the next tokens that are asked for."""
    found = {}
    for ids, targets in rows:
        for place, target in enumerate(targets):
            if target:
                found.setdefault(tuple(ids[:place]), set()).add(ids[place])
    return found


@pytest.mark.parametrize(
    ("hint", "changes", "shared"),
    [("successor", {}, True), ("min", {}, True), ("run", {"repetitions": True}, True), ("restrict", {}, True),
     ("predecessor", {}, False), ("copy", {}, False)],
)  # fmt: skip
def test_a_hint_in_the_main_tasks_words_never_contradicts_it(hint, changes, shared):
    """The same text, the same next token; in the stream of texts, and in rows that all end (`build`)."""
    _, tokenizer = tiny()
    args = HintingDataArguments(hints=[hint], longest=3, values=8, queries=1, main_rows=400, hint_rows=400,
                                test_lengths=[3], train_rows=800, test_rows=2, **changes)  # fmt: skip
    stream = TextStream(make_stream(args), tokenizer)
    assert stream.tasks[1].shared is shared
    step = stream.step(0)
    rows = list(zip(step.ids.tolist(), step.targets.tolist(), step.tasks.tolist(), strict=True))
    main, other = (following([row[:2] for row in rows if row[2] == task]) for task in (0, 1))
    both = main.keys() & other.keys()
    assert all(main[text] == other[text] and len(main[text]) == 1 for text in both)
    assert len(both) > 50 if shared else not both
    told = {}
    for row in build(args)["train"]:
        told.setdefault(row["prompt"], set()).add(row["completion"])
    assert all(len(answers) == 1 for answers in told.values())
    starts = {row["prompt"].partition(":")[0] for row in build(args)["train"] if row["task"] == hint}
    assert starts == ({"Sort"} if hint == "restrict" else {hint.capitalize()})


def test_a_stream_of_text_needs_one_question_and_an_end():
    _, tokenizer = tiny()
    with pytest.raises(ValueError, match="queries=1"):
        TextStream(make_stream(HintingDataArguments(queries=3)), tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        TextStream(make_stream(addition()), tokenizer)


def test_text_tests_are_the_builders():
    args = addition()
    splits = build(args)
    assert {f"test_{n}": rows for n, rows in text_tests(args).items()} == {
        name: splits[name].to_list() for name in ("test_3", "test_5")
    }


def test_text_tests_of_hints():
    """Behind the main task's mark the end is no word, and a model goes on with the main task's answer."""
    args = HintingDataArguments(hints=["successor"], queries=1, values=12, test_lengths=[4], test_rows=40)
    ends = 0
    for row in text_tests(args, "successor")[4]:
        shown, _, x = row["prompt"].removeprefix("Sort: ").partition(" => ")
        above = sorted(int(item) for item in shown.split() if int(item) > int(x))
        assert row["completion"] == (f" {above[0]}" if above else "") and row["task"] == "successor"
        assert row.get("goes_on", False) == bool(above)
        ends += not above
    assert 0 < ends < 40
    own = text_tests(replace(args, prompt_style="distinct"), "successor")[4]
    assert not any("goes_on" in row for row in own) and all(row["completion"] for row in own)


@pytest.mark.parametrize("fused", [True, False])
def test_the_fused_head_changes_memory_not_steps(tmp_path, monkeypatch, fused):
    """A stream of text through TRL's fused head, through the model's own, and as a data set: one and the same step."""
    monkeypatch.setattr("steerbook.trainers.stream.FUSED", 0 if fused else 10_000)
    args = addition()
    common = {"per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "use_cpu": True,
              "save_strategy": "no", "report_to": [], "max_grad_norm": 0.0}  # fmt: skip
    model, tokenizer = tiny()
    stream = TextStream(make_stream(args), tokenizer)
    HintingTrainer(model, HintingConfig(str(tmp_path / "a"), **common), stream=stream,
                   processing_class=tokenizer).train()  # fmt: skip
    step, names = stream.step(0), ["addition", "carry"]
    rows = [{"input_ids": ids[: ids.index(2) + 1], "labels": labels[: ids.index(2) + 1], "task": names[task]}
            for ids, labels, task in zip(step.ids.tolist(), step.ids.masked_fill(~step.targets, -100).tolist(),
                                         step.tasks.tolist(), strict=True)]  # fmt: skip
    other, _ = tiny()
    HintingTrainer(other, HintingConfig(str(tmp_path / "b"), **common), Dataset.from_list(rows), main="addition",
                   processing_class=tokenizer).train()  # fmt: skip
    before, _ = tiny()
    for (name, one), two, start in zip(model.named_parameters(), other.parameters(), before.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-6), name
        assert name.endswith("norm.weight") or not torch.equal(one, start), name


# ---- scores ----


@pytest.mark.parametrize(
    ("wanted", "answer", "kind", "place"),
    [
        ("3 7 41", "4 7 41", "first token", 0),
        ("3 7 7 41", "3 7 41", "stopped repeating", 2),
        ("3 7 41", "3 7 7 41", "repeated too long", 2),
        ("3 7 41", "3 9 41", "wrong next", 1),
        ("3 7 41", "3 7", "end", 2),
        ("3 7", "3 7 9", "end", 2),
        ("1234", "1244", "wrong next", 2),
        ("1234", "123", "end", 3),
        ("1234", "about 3", "format", 0),
        ("1234", "", "format", 0),
    ],
)
def test_kinds_of_wrong_answers(monkeypatch, wanted, answer, kind, place):
    row = {"task": "sort", "items": 3, "prompt": "x", "completion": f" {wanted}"}
    monkeypatch.setattr("steerbook.eval.task_hinting.text.generate", lambda *_, **__: [f" {answer}"])
    sample = evaluate(*tiny(), [row])["samples"][0]
    assert (sample["error"], sample["place"]) == (kind, place)


def test_unrelated_texts_are_scored_in_nats():
    model, tokenizer = tiny()
    text = "A kettle warms water."
    found = collateral(model, tokenizer, [{"id": "a", "group": "g", "text": text}])
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = model(ids, labels=ids).loss
    assert found[0]["tokens"] == ids.shape[1] - 1 and found[0]["group"] == "g"
    assert found[0]["metrics"]["nats_per_token"] == pytest.approx(float(wanted), rel=1e-5)


# ---- the recipe ----


def test_all_arms_of_all_weights(recipe, base, tmp_path, capsys):
    arms = ["untouched", "standard", "standard_total", "hint", "control", "softmax", "hint_softmax"]
    recipe.main([*SHORT, "--model_name_or_path", str(base / "qwen3_06b"), "--main", "increment", "--hints", "carry",
                 "--arms", *arms, "--softmax_rule", "learn", "--learning_rate", "0.01",
                 "--output_dir", str(tmp_path / "run")])  # fmt: skip
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["status"] == "finished" and found["toy"] is False
    assert found["base_model"]["name"] == "qwen3_06b" and str(tmp_path) not in json.dumps(found)
    rows = {"untouched": found["metrics"]["before"], **found["metrics"]["others"]}
    texts = {name: row["text perplexity"]["value"] for name, row in rows.items()}
    # all weights moved in every arm, whether or not the softmax is switched on
    assert len(texts) == len(set(texts.values())) == 12 - 1
    assert set(found["metrics"]["prompt_tokens"]) == {"3", "5"}
    assert [
        name for name in found["metrics"]["hints"] if "hint carry" not in name and "control copy" not in name
    ] == []
    assert len(found["metrics"]["hints"]) == 3 and len(found["metrics"]["tokens"]) == 11
    folder = tmp_path / "run" / "seed_0"
    assert not (folder / "untouched" / "model").exists()
    tuned, untouched = load(folder / "softmax" / "model"), load(base / "qwen3_06b")
    moved = [name for (name, one), other in zip(tuned.named_parameters(), untouched.parameters(), strict=True)
             if not torch.equal(one, other)]  # fmt: skip
    assert len([name for name in moved if "proj" in name]) == 14
    output = capsys.readouterr().out
    assert "text perplexity" in output and "Prompts in tokens: 3 items" in output and "A toy" not in output
    assert {path.name for path in (tmp_path / "run" / "figures").iterdir()} == {
        "accuracy.png", "errors.png", "loss.png"}  # fmt: skip


def test_adapters_are_saved_as_such_and_merged_with_a_softmax(recipe, base, tmp_path):
    flags = [*SHORT, "--model_name_or_path", str(base / "llama32_1b"), "--hints", "successor", "--use_peft", "true",
             "--lora_target_modules", "all-linear", "--lora_r", "2", "--learning_rate", "0.01", "--softmax_count",
             "keys", "--output_dir", str(tmp_path / "run")]  # fmt: skip
    recipe.main([*flags, "--arms", "untouched", "hint", "softmax"])
    folder = tmp_path / "run" / "seed_0"
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(base / "llama32_1b").eval()
    assert 0 < found["trainable_parameters"] < plain.num_parameters() / 4
    tokenizer = build_tokenizer([], "byte")
    rows = [{"id": "a", "group": "g", "text": "Bread dough rises because yeast feeds on sugars."}]
    values = [collateral(plain, tokenizer, rows)[0]["metrics"]["nats_per_token"]]
    for model in (PeftModel.from_pretrained(plain, folder / "hint_successor" / "model"),
                  load(folder / "softmax" / "model")):  # fmt: skip
        values.append(collateral(model.eval(), tokenizer, rows)[0]["metrics"]["nats_per_token"])
    assert len(set(values)) == 3
    # what was measured is what was saved
    for arm, model in (("softmax", load(folder / "softmax" / "model")),):
        record = json.loads((folder / arm / "measured.json").read_text())
        tests = recipe.side_of(recipe.parse(flags), rows_seed=0)
        again = collateral(model.eval(), tokenizer, tests.unrelated)
        assert [sample["metrics"]["nats_per_token"] for sample in again] == pytest.approx(
            [sample["metrics"]["nats_per_token"] for sample in record["splits"]["collateral"]], rel=1e-5
        )


def test_it_learns_what_it_is_asked(recipe, base, tmp_path):
    """Numbers of two digits plus one: 99 of 100 questions are seen in training, held-out ones are answered as well."""
    recipe.main([*SHORT, "--model_name_or_path", str(base / "qwen3_06b"), "--main", "increment", "--arms", "standard",
                 "--shortest", "2", "--longest", "2", "--test_lengths", "2", "--test_rows", "20", "--main_rows", "32",
                 "--max_steps", "150", "--learning_rate", "0.01", "--hints", "carry", "--softmax_at_test", "false",
                 "--output_dir", str(tmp_path / "run")])  # fmt: skip
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["metrics"]["before"]["em/2"]["value"] >= 0.6


def test_dry_run_shows_texts_and_cost(recipe, base, tmp_path, capsys):
    recipe.main([*SHORT, "--model_name_or_path", str(base / "llama32_1b"), "--main", "addition", "--hints", "carry",
                 "--use_peft", "true", "--dry_run", "true", "--output_dir", str(tmp_path / "run")])  # fmt: skip
    output = capsys.readouterr().out
    for text in ("Addition: ", "=>[ ", "trained parameters", "hint carry (own mark), 8 + 4 rows", "(4 per parameter"):
        assert text in output, text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--layers", "3"], ["--layers is for models from scratch"]),
        (["--queries", "3"], ["--queries 3: a text asks one question"]),
        (["--softmax_count", "items"], ["--softmax_count items", "use keys"]),
        (["--use_peft", "true", "--arms", "softmax", "--softmax_rule", "learn"], ["--softmax_rule learn", "adapter"]),
        (["--use_peft", "true", "--arms", "softmax", "--load_in_8bit", "true"], ["merged", "quantised"]),
        (["--test_lengths", "300"], ["the longest test row has", "the model takes 512", "--test_lengths"]),
        (["--model_name_or_path", "nowhere"], ["cannot load --model_name_or_path nowhere"]),
        (["--preset", "paper"], ["--preset paper trains models from scratch"]),
        (["--collateral_file", "none.txt"], ["none.txt"]),
    ],
)
def test_bad_input_is_said_before_any_training(recipe, base, tmp_path, flags, parts):
    given = [*SHORT, "--model_name_or_path", str(base / "qwen3_06b"), "--main", "addition", "--hints", "carry", *flags]
    with pytest.raises(SystemExit) as caught:
        recipe.main([*given, "--output_dir", str(tmp_path / "run")])
    text = str(caught.value.code)
    assert text.startswith("error: ") and all(part in text for part in parts), text
    assert not list(tmp_path.rglob("measured.json"))


def test_flags_of_pretrained_models_need_one(recipe, tmp_path):
    with pytest.raises(SystemExit, match="--use_peft is for a pretrained model"):
        recipe.main(["--preset", "smoke", "--use_peft", "true", "--output_dir", str(tmp_path / "run")])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_runs_on_a_tiny_model_of_its_family(recipe, base, tmp_path, name):
    lines, content = CONFIGS[name].read_text().splitlines(), yaml.safe_load(CONFIGS[name].read_text())
    assert (
        lines[1] == f"#   accelerate launch recipes/task_hinting.py --config recipes/configs/task_hinting/{name}.yaml"
    )
    settings = recipe.parse(["--config", str(CONFIGS[name]), "--use_cpu", "true"])
    assert settings.model.model_name_or_path == content["model_name_or_path"] and len(settings.recipe.seeds) == 3
    assert settings.model.use_peft is name.startswith("llama") and settings.training.max_steps == 2000
    assert name.endswith(settings.data.main) and content["output_dir"] == f"runs/task_hinting-{name}"
    family = name.rpartition("_")[0]
    recipe.main(["--config", str(CONFIGS[name]), "--model_name_or_path", str(base / family), "--max_steps", "2",
                 "--output_dir", str(tmp_path / "run"), "--seeds", "0", "--main_rows", "4", "--hint_rows", "2",
                 "--test_lengths", "3", "--longest", "3", "--test_rows", "2", "--use_cpu", "true"])  # fmt: skip
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["status"] == "finished"
    folders = {file.parent.name for file in (tmp_path / "run" / "seed_0").glob("*/measured.json")}
    assert {"untouched", "standard", "standard_total", "control_copy"} <= folders


def test_there_is_a_configuration_for_each_model_and_task():
    assert set(CONFIGS) == {f"{family}_{task}" for family in FAMILIES for task in ("addition", "sort")}
