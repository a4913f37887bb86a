"""Recipes on quantised bases: what they measured is what a base that is quantised anew gives with what they saved."""

import json

import pytest
import torch
from chat_models import CHAT
from peft import LoraConfig, PeftModel, get_peft_model
from quantised_models import KINDS, flags, load, logits, save_base
from safetensors.torch import load_file
from test_self_interpretability_pretrained import few  # noqa: F401  (a fixture)
from transformers import AutoModelForCausalLM, AutoTokenizer

from steerbook.data_builders.lofit import LofitDataArguments, build
from steerbook.data_builders.task_hinting import HintingDataArguments, make_stream
from steerbook.eval.lofit import evaluate
from steerbook.eval.task_hinting import collateral
from steerbook.trainers.task_hinting.arms import fit
from steerbook.trainers.task_hinting.softmax import LengthSoftmax
from steerbook.trainers.task_hinting.text_stream import TextStream
from steerbook.trainers.task_hinting.trainer import HintingConfig

SHORT = ["--preset", "smoke", "--use_cpu", "true", "--bf16", "false"]
LORA = ["--use_peft", "true", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj", "--learning_rate", "0.01"]
SHORT_HINTS = [*SHORT, *LORA, "--hints", "successor", "--test_rows", "2", "--test_lengths", "3", "--longest", "3"]
SHORT_REPORTS = [*SHORT, *LORA, "--instilled", "4", "--native", "2", "--never", "1", "--asked", "1", "--choices", "3",
                 "--eval_batch_size", "402", "--report_learning_rate", "0.01"]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"), CHAT)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


def measured(folder):
    return json.loads((folder / "measured.json").read_text())


def adapters_alone(folder):
    """Of every adapter that a run has saved, checkpoints and all."""
    files = list(folder.rglob("*.safetensors"))
    names = {name for file in files for name in load_file(file)}
    assert names and all(".lora_" in name or ".lofit_" in name for name in names)
    return {file.parent for file in files}


def questions(folder):
    rows = [f"Is {n} so?,Yes {n},Yes {n}; Sure {n},No {n}; Never {n}\n" for n in range(24)]
    (folder / "q.csv").write_text("Question,Best Answer,Correct Answers,Incorrect Answers\n" + "".join(rows))
    return str(folder / "q.csv")


def test_lofit(load_recipe, base, tokenizer, tmp_path, kind):
    data = {"dataset": "truthfulqa", "data_files": [questions(tmp_path)], "max_eval_rows": 4, "max_train_rows": 8}
    given = [
        text
        for name, value in data.items()
        for text in (f"--{name}", str(value[0] if name == "data_files" else value))
    ]
    load_recipe("lofit").main(
        [*SHORT, *given, "--model_name_or_path", str(base), *flags(kind), "--k", "2", "--arms", "lofit", "lora", "red",
         "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "run")])  # fmt: skip
    seed, rows = tmp_path / "run" / "seed_42", build(LofitDataArguments(**data))["test"]
    assert adapters_alone(seed) == {seed / name for name in ("selection", "lofit_k2", "lora")}
    found = {}
    for arm in ("base", "lofit_k2", "lora"):
        model = load(base, kind)
        tuned = model if arm == "base" else PeftModel.from_pretrained(model, seed / arm).eval()
        samples = evaluate(tuned, tokenizer, rows, batch_size=16)["samples"]
        found[arm] = [sample["metrics"] for sample in samples]
        assert found[arm] == [sample["metrics"] for sample in measured(seed / arm)["splits"]["test"]]
    assert found["lora"] != found["base"] and measured(seed / "red")["trained"] == 2 * 2 * 64


def test_task_hinting(load_recipe, base, tokenizer, tmp_path, kind):
    recipe = load_recipe("task_hinting")
    argv = [*SHORT_HINTS, "--model_name_or_path", str(base), *flags(kind), "--output_dir", str(tmp_path / "run")]
    recipe.main(argv)
    seed = tmp_path / "run" / "seed_0"
    assert adapters_alone(seed) == {seed / name / "model" for name in ("standard", "hint_successor")}
    settings = recipe.parse(argv)
    unrelated, nats = recipe.side_of(settings, rows_seed=0).unrelated, {}
    size = settings.recipe.eval_batch_size  # 8-bit layers round a batch's inputs together
    for arm in ("untouched", "standard", "hint_successor"):
        model = load(base, kind)
        tuned = model if arm == "untouched" else PeftModel.from_pretrained(model, seed / arm / "model").eval()
        nats[arm] = [one["metrics"] for one in collateral(tuned, tokenizer, unrelated, batch_size=size)]
        assert nats[arm] == [sample["metrics"] for sample in measured(seed / arm)["splits"]["collateral"]]
    assert nats["untouched"] != nats["standard"] != nats["hint_successor"]


def test_self_interpretability(load_recipe, few, base, tmp_path, kind):  # noqa: F811
    """An adapter of a later stage stands over those before; with PEFT all are loaded beside each other."""
    recipe = load_recipe("self_interpretability")
    argv = [*SHORT_REPORTS, *few, "--model_name_or_path", str(base), *flags(kind), "--controls", "reinstil",
            "--first_half", "true", "--output_dir", str(tmp_path / "run")]  # fmt: skip
    seed, arms = tmp_path / "run" / "seed_0", ("instilled", "reported_0", "reinstil")
    if kind != "nf4":  # the two 4-bit kinds run the same code; measuring takes seconds
        recipe.main([*argv, "--gate", "2"])  # which ends it behind the first stage
        found = [measured(seed / arm)["contexts"] for arm in ("base", "instilled")]
        assert found[0] != found[1] and not (seed / "reported_0").exists()
    made = logits(recipe.Arms(recipe.parse(argv), 0).fit("reinstil").model)
    assert adapters_alone(seed) >= {seed / name / "model" for name in arms}
    tuned = PeftModel.from_pretrained(load(base, kind), seed / "instilled" / "model", "instilled")
    for name in arms[1:]:
        tuned.load_adapter(seed / name / "model", name)
    tuned.base_model.set_adapter([*arms])
    assert torch.equal(logits(tuned), made)
    assert torch.equal(logits(recipe.Arms(recipe.parse(argv), 0).fit("reinstil").model), made)
    tuned.base_model.set_adapter(["instilled", "reported_0"])
    assert not torch.equal(logits(tuned), made)


def test_atlas_forgets_and_learns_from_few_rows(load_recipe, base, tmp_path, kind):
    """Beside its vectors a LoRA is trained from few rows; the others are in tests/test_atlas_recipe.py."""
    skills = ("chat", "code", "poems")
    for skill in skills:
        rows = [{"prompt": f"{skill} {n}:", "completion": f" {skill[n % 4]}"} for n in range(24)]
        (tmp_path / f"{skill}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, init_lora_weights=False))
        tuned.save_pretrained(tmp_path / skill)
    load_recipe("atlas").main(
        [*SHORT, "--base", str(base), "--task_vectors", *(f"{name}={tmp_path}/{name}" for name in skills[:2]),
         "--tasks", *(f"{name}={tmp_path}/{name}.jsonl" for name in skills[:2]), *flags(kind),
         "--new_tasks", f"poems={tmp_path}/poems.jsonl", "--sections", "fewshot", "negation", "--forget", "chat",
         "--shots", "2", "--shot_steps", "2", "--negation_steps", "2", "--arms", "alpha", "atlas", "lora",
         "--output_dir", str(tmp_path / "run")])  # fmt: skip
    seed = tmp_path / "run" / "seed_42"
    found = {folder.name: measured(folder) for folder in seed.iterdir() if (folder / "measured.json").exists()}
    few_rows, forgot = found["fewshot_lora_poems_n2"], found["negation_atlas_chat"]
    assert 0 < few_rows["trained"] < 20_000 and few_rows["splits"] != found["fewshot_base_poems"]["splits"]
    assert len(forgot["coefficients"]) == 1 and len(forgot["block_names"]) == 4
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["status"] == "finished"


WHOLE = "a quantised base cannot be trained itself: give --use_peft"


@pytest.mark.parametrize(
    ("name", "more", "told"),
    [
        ("task_hinting", ["--use_peft", "false"], WHOLE),
        ("self_interpretability", ["--use_peft", "false"], WHOLE),
        ("self_interpretability", ["--use_dora", "true"], "q_proj: beside quantised weights only a LoRA"),
        ("self_interpretability", ["--lora_modules_to_save", "lm_head"], "lm_head: beside quantised weights only"),
        ("task_hinting", ["--dtype", "auto"], "--dtype auto: 4-bit weights"),
    ],
)
def test_refused_before_any_training(load_recipe, base, tmp_path, name, more, told):
    short = {"task_hinting": SHORT_HINTS, "self_interpretability": SHORT_REPORTS}[name]
    with pytest.raises(SystemExit) as caught:
        load_recipe(name).main([*short, "--model_name_or_path", str(base), "--load_in_4bit", "true", *more,
                                "--output_dir", str(tmp_path / "run")])  # fmt: skip
    assert told in str(caught.value.code) and not list(tmp_path.rglob("measured.json"))


def test_the_vectors_of_the_embedded_world_are_dense(load_recipe, tmp_path):
    with pytest.raises(SystemExit, match="--load_in_8bit is for a base of your own: give --base"):
        load_recipe("atlas").main([*SHORT, "--load_in_8bit", "true", "--output_dir", str(tmp_path / "run")])


def test_a_checkpoint_of_quantised_weights(load_recipe, base, tokenizer, tmp_path):
    """Known by its weights, not by flags: adapters are not merged into them either."""
    folder = tmp_path / "q"
    load(base, "nf4").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model, _ = load_recipe("task_hinting").load_base(load_recipe("task_hinting").ModelConfig(str(folder)))
    rows = HintingDataArguments(hints=["successor"], longest=3, main_rows=4, hint_rows=2, queries=1)
    args = HintingConfig(str(tmp_path / "out"), max_steps=1, use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="merged, which a quantised base does not allow"):
        fit(model, tokenizer, TextStream(make_stream(rows), tokenizer), args, tmp_path / "out", seed=0,
            softmax=LengthSoftmax("log", 8.0, "keys"), peft_config=LoraConfig(r=2))  # fmt: skip
    assert torch.equal(logits(model), logits(load(base, "nf4")))
