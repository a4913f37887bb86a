"""recipes/atlas.py as a user runs it: the smoke preset by `accelerate launch`, own models and files, bad input."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

from steerbook.data_builders.atlas import AtlasDataArguments, build
from steerbook.eval.atlas import evaluate
from steerbook.trainers import Composer, TaskVector
from steerbook.trainers.atlas.checks import check_launch
from steerbook.trainers.atlas.coefficients import apply_coefficients, load_coefficients
from steerbook.trainers.atlas.extract import task_vector
from steerbook.trainers.tiny_lm import build_tokenizer

ROOT = Path(__file__).parents[1]
CONFIGS = {path.stem: path for path in sorted((ROOT / "recipes" / "configs" / "atlas").glob("l*.yaml"))}
CONFIGS |= {path.stem: path for path in sorted((ROOT / "recipes" / "configs" / "atlas").glob("q*.yaml"))}
SCREEN = 30


@pytest.fixture(scope="module")
def recipe(load_recipe):
    return load_recipe("atlas")


# ---- the embedded world ----


@pytest.fixture(scope="module")
def smoke(launch_smoke):
    return launch_smoke("atlas")


def test_smoke_shows_an_honest_table(smoke):
    folder, output = smoke
    results = json.loads((folder / "results.json").read_text())
    assert results["status"] == "finished" and results["toy"] is True and results["recipe"] == "atlas"
    before, after = results["metrics"]["before"]["accuracy"], results["metrics"]["after"]["accuracy"]
    assert after["value"] > before["value"] + 0.05
    assert {"best single alpha", "learned isotropic", "joint fine-tuning"} <= set(results["metrics"]["baselines"])
    assert results["claims"] == [] and "Claims are judged from three seeds on" in output
    assert "shows nothing about large models" in output
    assert str(folder.parent) not in (folder / "results.json").read_text()
    assert {"addition.png", "alpha.png", "disentanglement.png"} <= {p.name for p in (folder / "figures").iterdir()}


def test_smoke_leaves_coefficients_that_apply_again(smoke):
    folder, _ = smoke
    seed = folder / "seed_42"
    record = json.loads((seed / "addition_atlas" / "measured.json").read_text())
    saved = load_coefficients(seed / "addition_atlas" / "coefficients.json")
    assert saved.values == record["coefficients"] and list(saved.blocks) == record["block_names"]
    assert saved.sources == record["vectors"] and len(saved.sources) == 8
    assert any("embed" in name for name in record["block_names"])  # the embedded world leaves nothing out
    matrix = record["disentanglement"]
    assert [matrix[i][i] for i in range(8)] == [0.0] * 8


def test_a_finished_folder_is_shown_not_overwritten(smoke, recipe, capsys):
    folder, _ = smoke
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    recipe.main(["--preset", "smoke", "--output_dir", str(folder)])
    output = capsys.readouterr().out
    assert "is finished" in output and "aTLAS" in output
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


# ---- own models and files ----

# Widths are multiples of 64, the blocks of 4-bit weights: bitsandbytes packs others wrongly on CPUs with AVX512-BF16.
SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.2}  # fmt: skip
SKILLS = ("chat", "code", "maths")


def save_model(folder: Path, config=None, seed: int = 0) -> Path:
    tokenizer = build_tokenizer([], "byte")
    config = config or LlamaConfig(**SMALL)
    config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id = len(tokenizer), 0, 1, 2
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tuned_copy(base: Path, folder: Path, seed: int, change: Callable | None = None) -> Path:
    """A "fine-tune": the base with small random changes everywhere."""
    save = {name: tensor.clone() for name, tensor in load_file(base / "model.safetensors").items()}
    torch.manual_seed(seed)
    moved = {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in save.items()}
    folder.mkdir(parents=True)
    for file in base.iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(change(moved) if change else moved, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_task(path: Path, name: str, count: int = 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"{name} {number}:", "completion": f" {name[number % len(name)]}"} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a base, three fine-tunes, and a file of rows for each."""
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "base")
    for number, skill in enumerate(SKILLS, 1):
        tuned_copy(folder / "base", folder / "vectors" / skill, number)
        write_task(folder / "data" / f"{skill}.jsonl", skill)
    return folder


@pytest.fixture
def flags(world, tmp_path) -> list[str]:
    return [
        "--base", str(world / "base"), "--task_vectors", *(f"{s}={world}/vectors/{s}" for s in SKILLS),
        "--tasks", *(f"{s}={world}/data/{s}.jsonl" for s in SKILLS), "--output_dir", str(tmp_path / "run"),
        "--max_steps", "2", "--per_device_train_batch_size", "4", "--save_strategy", "no", "--use_cpu", "true",
        "--arms", "tuned", "alpha", "isotropic", "atlas",
    ]  # fmt: skip


def results(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "run" / "results.json").read_text())


def test_own_models_and_files(recipe, flags, world, tmp_path):
    recipe.main([*flags, "--sections", "addition", "negation", "--forget", "chat", "--negation_steps", "2"])
    found = results(tmp_path)
    assert found["status"] == "finished" and found["toy"] is False
    assert found["arguments"]["tasks"] and str(world) not in json.dumps(found)
    # The coefficients, on a composer made anew, give the measured samples again.
    seed = tmp_path / "run" / "seed_42"
    model = AutoModelForCausalLM.from_pretrained(world / "base")
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    composer = Composer(model, [task_vector(str(world / "base"), str(world / "vectors" / s)) for s in SKILLS])
    apply_coefficients(composer, load_coefficients(seed / "addition_atlas" / "coefficients.json"))
    measured = json.loads((seed / "addition_atlas" / "measured.json").read_text())["splits"]["test"]
    tasks = [f"{skill}={world}/data/{skill}.jsonl" for skill in SKILLS]
    rows = build(AtlasDataArguments(tasks=tasks))["test"].to_list()
    assert [row["id"] for row in rows] == [sample["id"] for sample in measured]
    again = evaluate(model, tokenizer, rows)["samples"]
    assert [s["correct"] for s in again] == [s["correct"] for s in measured]
    for one, other in zip(again, measured, strict=True):
        assert one["nats"] == pytest.approx(other["nats"], abs=1e-4)


def test_new_tasks_on_a_budget_of_vectors(recipe, flags, world, tmp_path, capsys):
    new = write_task(tmp_path / "poems.jsonl", "poems")
    recipe.main([*flags, "--sections", "budget", "--new_tasks", f"poems={new}", "--budgets", "1", "2", "--shots", "3",
                 "--arms", "random", "feature", "gradient", "blockwise", "--shot_steps", "2"])  # fmt: skip
    assert "vectors by gradient, by block, 2 of them" in capsys.readouterr().out
    for name in ("random", "feature", "gradient", "blockwise"):
        for size in (1, 2):
            record = json.loads(
                (tmp_path / "run" / "seed_42" / f"budget_{name}_poems_n{size}" / "measured.json").read_text()
            )
            assert len(record["coefficients"]) == len(record["vectors"]) == size
            known = {"rank 1", "rank 2"} if name == "blockwise" else set(SKILLS)
            assert set(record["vectors"]) <= known
            assert {sample["task"] for sample in record["splits"]["test"]} == {"poems"}


def test_interrupted_run_continues_without_repeating(recipe, flags, tmp_path, monkeypatch):
    original, calls = recipe.peak_memory, []  # looked at once an arm

    def interrupted():
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original()

    monkeypatch.setattr(recipe, "peak_memory", interrupted)
    with pytest.raises(SystemExit) as stop:
        recipe.main(flags)
    assert stop.value.code not in (None, 0) and results(tmp_path)["status"] == "interrupted"
    done = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").glob("seed_*/*/measured.json")}
    assert len(done) == 3
    recipe.main(flags)
    assert results(tmp_path)["status"] == "finished"
    after = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").glob("seed_*/*/measured.json")}
    assert done.items() < after.items()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_runs_on_a_tiny_model_of_its_family(recipe, tmp_path, name):
    content = yaml.safe_load(CONFIGS[name].read_text())
    assert len(content["task_vectors"]) == 8
    first = CONFIGS[name].read_text().splitlines()[1]
    assert first == f"#   accelerate launch recipes/atlas.py --config recipes/configs/atlas/{name}.yaml"
    assert recipe.parse(["--config", str(CONFIGS[name]), "--use_cpu", "true"]).vectors.base == content["base"]

    config = Qwen2Config(**SMALL) if "qwen" in name else LlamaConfig(**SMALL, tie_word_embeddings="1b" in name)
    base = save_model(tmp_path / "base", config)
    vectors, tasks = [], []
    for number, entry in enumerate(content["task_vectors"]):
        skill = entry.partition("=")[0]
        folder = tmp_path / "vectors" / skill
        if "atlas_lora" in content["arms"]:
            torch.manual_seed(number)
            adapter = get_peft_model(
                AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, init_lora_weights=False)
            )
            adapter.save_pretrained(folder)
        else:
            tuned_copy(base, folder, number + 1)
        vectors.append(f"{skill}={folder}")
        tasks.append(f"{skill}={write_task(tmp_path / 'data' / f'{skill}.jsonl', skill, 12)}")
    recipe.main([
        "--config", str(CONFIGS[name]), "--base", str(base), "--task_vectors", *vectors, "--tasks", *tasks,
        "--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--search_budget", "3", "--use_cpu", "true",
        "--gradient_accumulation_steps", "1", "--save_strategy", "no", "--bf16", "false",
    ])  # fmt: skip
    found = results(tmp_path)
    assert found["status"] == "finished"
    ran = {file.parent.name for file in (tmp_path / "run" / "seed_42").glob("*/measured.json")}
    assert {f"addition_{arm}" for arm in content["arms"] if arm != "tuned"} <= ran


@pytest.mark.parametrize("bits", ["4", "8"])
def test_adapters_on_a_quantised_base(recipe, flags, error, world, tmp_path, bits):
    names = []
    for number, skill in enumerate(SKILLS):
        torch.manual_seed(number)
        base = AutoModelForCausalLM.from_pretrained(world / "base")
        adapter = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False))
        adapter.save_pretrained(tmp_path / skill)
        names += [flag for flag in flags if flag == f"{skill}={world}/vectors/{skill}"]
    lora = [
        f"{flag.partition('=')[0]}={tmp_path / flag.partition('=')[0]}" if flag in names else flag for flag in flags
    ]
    lora += [f"--load_in_{bits}bit", "true", "--arms", "alpha", "atlas"]
    text = error(*lora, "--sections", "budget", "--new_tasks", f"poems={write_task(tmp_path / 'p.jsonl', 'poems')}")
    assert "quantised" in text
    recipe.main(lora)
    found = results(tmp_path)
    assert found["status"] == "finished" and found["metrics"]["after"]["accuracy"]


@pytest.fixture
def adapters(world, tmp_path) -> list[str]:
    """Three LoRA vectors, the second with fewer targets, as `name=PATH`."""
    found = []
    for number, skill in enumerate(SKILLS):
        torch.manual_seed(number)
        base = AutoModelForCausalLM.from_pretrained(world / "base")
        targets = ["q_proj", "v_proj"] if number == 1 else "all-linear"
        get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, target_modules=targets)).save_pretrained(
            tmp_path / "adapters" / skill
        )
        found.append(f"{skill}={tmp_path}/adapters/{skill}")
    return found


def given(flags: list[str], vectors: list[str], *more: str) -> list[str]:
    """The flags with these vectors instead."""
    start = flags.index("--task_vectors") + 1
    return [*flags[:start], *vectors, *flags[start + len(SKILLS) :], *more]


def test_adapters_with_different_targets(recipe, flags, adapters, world, tmp_path):
    """TIES and DARE over all matrices that any of them changes, also where the first has fewer."""
    vectors = [adapters[number] for number in (1, 0, 2)]
    recipe.main(given(flags, vectors, "--arms", "ties", "dare", "atlas", "--low_rank_mode", "per_factor"))
    found = results(tmp_path)
    assert found["status"] == "finished" and {"TIES", "DARE"} <= set(found["metrics"]["baselines"])
    record = json.loads((tmp_path / "run" / "seed_42" / "addition_atlas" / "measured.json").read_text())
    saved = load_coefficients(tmp_path / "run" / "seed_42" / "addition_atlas" / "coefficients.json")
    assert saved.kind == "per_factor" and len(saved.blocks) == 14
    products = saved.tensor[..., 0] * saved.tensor[..., 1]
    torch.testing.assert_close(torch.tensor(record["coefficients"], dtype=torch.float64), products, atol=1e-6, rtol=0)
    # A dense vector beside them is merged too.
    again = given(flags, [f"chat={world}/vectors/chat", *adapters[1:]], "--arms", "ties")
    recipe.main([*again, "--output_dir", str(tmp_path / "mixed")])
    assert json.loads((tmp_path / "mixed" / "results.json").read_text())["status"] == "finished"


def test_partitions_streaming_and_every_arm_as_placed(recipe, flags, tmp_path, monkeypatch):
    import steerbook.trainers.atlas.arguments as arguments

    placed = []
    real = arguments.Composer
    monkeypatch.setattr(
        arguments, "Composer", lambda *a, **k: placed.append((k["placement"], k["stream_file"])) or real(*a, **k)
    )
    recipe.main([*flags, "--placement", "stream", "--partitions", "3", "--arms", "tuned", "sum", "alpha", "isotropic",
                 "atlas", "ties", "--sections", "addition", "negation", "--forget", "chat",
                 "--negation_steps", "1"])  # fmt: skip
    assert results(tmp_path)["status"] == "finished"
    assert {place for place, _ in placed} == {"stream"} and len(placed) >= 8
    assert {file for _, file in placed} == {None, tmp_path / "run" / "seed_42" / "vectors_by_block.safetensors"}
    saved = load_coefficients(tmp_path / "run" / "seed_42" / "addition_atlas" / "coefficients.json")
    record = json.loads((tmp_path / "run" / "seed_42" / "addition_atlas" / "measured.json").read_text())
    assert saved.partitions == 3 and saved.tensor.shape[2] == 3
    mean = saved.tensor.mean(2)
    torch.testing.assert_close(torch.tensor(record["coefficients"], dtype=torch.float64), mean, atol=1e-6, rtol=0)


def test_a_single_task_and_vectors_of_no_task(recipe, flags, error, world, tmp_path):
    single = ["--base", str(world / "base"), "--task_vectors", f"chat={world}/vectors/chat",
              "--tasks", f"chat={world}/data/chat.jsonl", *flags[flags.index("--output_dir") :]]  # fmt: skip
    assert "a task to keep" in error(*single, "--sections", "negation", "--forget", "chat")
    recipe.main([*single, "--arms", "alpha", "atlas"])
    assert results(tmp_path)["status"] == "finished"
    # In another order than the tasks, and with one that belongs to none.
    names = [f"spare={world}/vectors/maths", f"code={world}/vectors/code", f"chat={world}/vectors/chat"]
    more = ["--base", str(world / "base"), "--task_vectors", *names,
            "--tasks", *(f"{s}={world}/data/{s}.jsonl" for s in ("chat", "code")), *single[6:]]  # fmt: skip
    recipe.main([*more, "--arms", "atlas", "--output_dir", str(tmp_path / "spare")])
    assert json.loads((tmp_path / "spare" / "results.json").read_text())["status"] == "finished"
    record = json.loads((tmp_path / "spare" / "seed_42" / "addition_atlas" / "measured.json").read_text())
    assert record["vectors"] == ["spare", "code", "chat"] and record["disentanglement_tasks"] == ["chat", "code"]


def test_the_same_flags_with_other_vectors_do_not_show_old_results(recipe, flags, error, world, tmp_path):
    folder = tmp_path / "mine"
    tuned_copy(world / "base", folder, 11)
    own = replaced(flags, f"chat={world}/vectors/chat", f"chat={folder}")
    recipe.main([*own, "--arms", "atlas"])
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    tuned_copy(world / "base", folder, 12)
    assert "holds results for other data" in error(*own, "--arms", "atlas")


def test_a_run_is_exported_by_a_command(recipe, flags, adapters, world, tmp_path, capsys):
    from steerbook.trainers.atlas import export

    recipe.main([*flags, "--arms", "atlas", "--blocks", "layer", "--partitions", "2", "--exclude", "norm"])
    coefficients = tmp_path / "run" / "seed_42" / "addition_atlas" / "coefficients.json"
    vectors = ["--base", str(world / "base"), "--task_vectors", *(f"{world}/vectors/{s}" for s in SKILLS)]
    export.main([str(coefficients), str(tmp_path / "plain"), *vectors])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    measured = json.loads((coefficients.parent / "measured.json").read_text())["splits"]["test"]
    tasks = [f"{skill}={world}/data/{skill}.jsonl" for skill in SKILLS]
    rows = build(AtlasDataArguments(tasks=tasks))["test"].to_list()
    again = evaluate(model, AutoTokenizer.from_pretrained(tmp_path / "plain"), rows)["samples"]
    for one, other in zip(again, measured, strict=True):
        assert one["nats"] == pytest.approx(other["nats"], abs=1e-4)
    for more, message in (
        ([*vectors, "--as", "adapter"], "is for coefficients of LoRA vectors"),
        ([*vectors, "--as", "mergekit"], "these blocks have 2 parts"),
        ([*vectors[:3], *vectors[:2:-1]], "other task vectors than .*or in another order"),
        (vectors[:-1], "they are for 3 task vectors"),
    ):
        with pytest.raises(SystemExit, match=message):
            export.main([str(coefficients), str(tmp_path / "none"), *more])
        assert not (tmp_path / "none").exists()
    with pytest.raises(SystemExit, match="exists"):
        export.main([str(coefficients), str(tmp_path / "plain"), *vectors])

    recipe.main(given(flags, adapters, "--arms", "atlas", "--output_dir", str(tmp_path / "lora")))
    coefficients = tmp_path / "lora" / "seed_42" / "addition_atlas" / "coefficients.json"
    sources = ["--base", str(world / "base"), "--task_vectors", *adapters]
    for form, name in (("adapter", "adapter"), ("mergekit", "recipe.yaml"), ("model", "merged")):
        export.main([str(coefficients), str(tmp_path / name), *sources, "--as", form])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert len(yaml.safe_load((tmp_path / "recipe.yaml").read_text())["models"]) == 3


def test_dry_run_shows_bytes_and_leaves_nothing(recipe, flags, tmp_path, capsys):
    recipe.main([*flags, "--dry_run", "true"])
    output = capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(flags[1])
    composed = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n and "lm_head" not in n)
    for text in ("[", "Coefficients: ", f"{3 * 4 * composed:,} bytes", f"{2 * 3 * 4 * composed:,} bytes"):
        assert text in output
    m = sum("embed" not in n and "lm_head" not in n for n, _ in model.named_parameters())
    assert re.search(rf"trained parameters +{3 * m}\n", output)  # the coefficients
    assert not (tmp_path / "run").exists()


def test_dry_run_of_streamed_vectors_writes_none(recipe, flags, capsys, monkeypatch):
    import steerbook.trainers.atlas.sources as sources

    monkeypatch.setattr(sources, "write_stream", lambda *_: pytest.fail("a dry run wrote the vectors down"))
    recipe.main([*flags, "--dry_run", "true", "--placement", "stream"])
    assert "resident: task vectors                                   0 bytes" in capsys.readouterr().out


@pytest.mark.parametrize("quantised", [False, True])
def test_dry_run_of_adapters_counts_factors(recipe, flags, adapters, capsys, quantised):
    more = ["--load_in_4bit", "true"] if quantised else []
    recipe.main(given(flags, adapters, "--dry_run", "true", "--arms", "alpha", "atlas", *more))
    output = capsys.readouterr().out
    sizes = {
        "q_proj": 128,
        "k_proj": 96,
        "v_proj": 96,
        "o_proj": 128,
        "gate_proj": 192,
        "up_proj": 192,
        "down_proj": 192,
    }
    numbers = 2 * 2 * (2 * sum(sizes.values()) + sizes["q_proj"] + sizes["v_proj"])  # rank 2, two layers
    assert "Coefficients: 42 (3 task vectors, 14 blocks)" in output and f"{4 * numbers:,} bytes" in output


# ---- bad input ----


@pytest.fixture
def error(recipe, capsys) -> Callable[..., str]:
    """Calls the recipe, which must stop with an error of at most a screen; returns its text."""

    def call(*argv: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            recipe.main([str(arg) for arg in argv])
        code = caught.value.code
        text = code if isinstance(code, str) else capsys.readouterr().err
        assert code not in (None, 0) and "error: " in text and "Traceback" not in text
        assert len(text.splitlines()) <= SCREEN and len(text) < 80 * SCREEN
        return text

    return call


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--sections", "adition"], ["adition", "fewshot"]),
        (["--arms", "dora"], ["dora", "isotropic"]),
        (["--shots", "0"], ["--shots", "0"]),
        (["--nonsense", "1"], ["--nonsense"]),
        (["--base", "somewhere"], ["--base", "--task_vectors"]),
        (["--base", "somewhere", "--task_vectors", "a=b"], ["--tasks"]),
        (["--forget_tasks", "max"], ["--forget_tasks", "--forget TASK"]),
        (["--entropy_below", "0.4"], ["--entropy_below", "adamerging"]),
        (["--optim", "adafactor"], ["--optim", "--optimizer"]),
        (["--task_vectors", "a=b"], ["--base", "--task_vectors"]),
        (["--use_peft", "true"], ["--use_peft"]),
    ],
)
def test_flags(error, argv, parts):
    text = error(*argv)
    assert all(part in text for part in parts)


def replaced(flags: list[str], old: str, new: str) -> list[str]:
    return [new if flag == old else flag for flag in flags]


def test_a_vector_that_is_not_there(error, flags, world):
    text = error(*replaced(flags, f"code={world}/vectors/code", f"code={world}/vectors/none"))
    assert "vectors/none" in text and "no such folder" in text


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--sections", "negation"], ["--forget"]),
        (["--sections", "negation", "--forget", "chess"], ["--forget chess", "chat, code, maths"]),
        (["--sections", "fewshot"], ["--new_tasks"]),
        (["--sections", "budget", "--budgets", "2"], ["--new_tasks"]),
        (["--sections", "data", "--data_sizes", "2", "256"], ["--data_sizes 256", "rows to fit on"]),
    ],
)
def test_a_section_that_the_tasks_do_not_allow(error, flags, tmp_path, more, parts):
    text = error(*flags, *more)
    assert all(part in text for part in parts)
    assert not (tmp_path / "run").exists()


def test_a_larger_budget_than_vectors(error, flags, tmp_path):
    new = write_task(tmp_path / "poems.jsonl", "poems")
    text = error(*flags, "--sections", "budget", "--new_tasks", f"poems={new}", "--budgets", "4")
    assert "--budgets 4" in text and "3 task vectors" in text


def test_two_vectors_of_one_name(error, flags, world):
    assert "'chat'" in error(*replaced(flags, f"code={world}/vectors/code", f"{world}/vectors/chat"))


def test_a_vector_of_another_base(error, flags, world, tmp_path):
    other = save_model(tmp_path / "other", seed=9)
    task_vector(str(other), str(tuned_copy(other, tmp_path / "theirs", 3))).save(tmp_path / "theirs.safetensors")
    text = error(*replaced(flags, f"code={world}/vectors/code", f"code={tmp_path}/theirs.safetensors"))
    assert "was made from the base" in text


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda t: {n: x for n, x in t.items() if "layers.1.mlp.up_proj" not in n}, ["layers.1.mlp.up_proj"]),
        (lambda t: {**t, "model.norm.weight": t["model.norm.weight"] * float("nan")}, ["model.norm.weight", "NaN"]),
        (
            lambda t: {**t, "model.embed_tokens.weight": t["model.embed_tokens.weight"][:-3]},
            ["embed_tokens", "vocabular"],
        ),
    ],
    ids=["missing tensor", "NaN", "other vocabulary"],
)
def test_a_vector_that_is_not_whole(error, flags, world, tmp_path, change, parts):
    bad = tuned_copy(world / "base", tmp_path / "bad", 5, change)
    text = error(*replaced(flags, f"code={world}/vectors/code", f"code={bad}"))
    assert all(part in text for part in parts)


def test_a_vector_of_zeros(error, flags, world, tmp_path):
    same = tuned_copy(world / "base", tmp_path / "same", 5, lambda t: load_file(world / "base" / "model.safetensors"))
    assert "base and tuned model are the same" in error(*replaced(flags, f"code={world}/vectors/code", f"code={same}"))


def test_one_corrupt_file_among_many(error, flags, world, tmp_path):
    bad = tuned_copy(world / "base", tmp_path / "cut", 5)
    content = (bad / "model.safetensors").read_bytes()
    (bad / "model.safetensors").write_bytes(content[: len(content) // 2])
    text = error(*replaced(flags, f"code={world}/vectors/code", f"code={bad}"))
    assert "model.safetensors" in text and "cut" in text


def test_saved_vectors_are_taken_too(recipe, flags, world, tmp_path):
    file = tmp_path / "code.safetensors"
    task_vector(str(world / "base"), str(world / "vectors" / "code")).save(file)
    recipe.main([*replaced(flags, f"code={world}/vectors/code", str(file)), "--arms", "atlas"])
    record = json.loads((tmp_path / "run" / "seed_42" / "addition_atlas" / "measured.json").read_text())
    assert record["vectors"] == list(SKILLS)
    assert isinstance(TaskVector.load(file), TaskVector)


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--blocks", "layer"], ["--blocks layer has no effect"]),
        (["--partitions", "2"], ["--partitions 2 has no effect"]),
        (["--placement", "stream"], ["--placement stream has no effect"]),
        (["--exclude", "mlp"], ["--exclude", "has no effect"]),
        (["--load_in_4bit", "true"], ["a quantised base does not allow", "isotropic", "--arms tuned alpha atlas"]),
    ],
)
def test_what_adapters_do_not_allow(error, flags, adapters, more, parts):
    text = error(*given(flags, adapters, *more))
    assert all(part in text for part in parts)


def test_dense_vectors_on_a_quantised_base(error, flags):
    text = error(*flags, "--load_in_4bit", "true", "--arms", "atlas")
    assert "a quantised base has no weights to compose dense vectors into (chat, code, maths)" in text


def test_fsdp_is_refused(error, flags, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "FSDP cuts the model" in error(*flags)


def test_the_embedded_world_is_for_one_process():
    both = SimpleNamespace(world_size=2, deepspeed_plugin=None, fsdp=None)
    check_launch(both, toy=False)
    with pytest.raises(ValueError, match="2 processes: .* start one, or give --base"):
        check_launch(both, toy=True)


@pytest.mark.parametrize("kind", ["nan", "zero"])
def test_a_bad_vector_is_found_before_any_training(recipe, error, flags, world, tmp_path, kind):
    """Whatever the section."""
    base = load_file(world / "base" / "model.safetensors")

    def change(moved):
        if kind == "zero":
            return base
        moved["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
        return moved

    tuned_copy(world / "base", tmp_path / "bad", 5, change)
    new = write_task(tmp_path / "poems.jsonl", "poems")
    bad = replaced(flags, f"maths={world}/vectors/maths", f"maths={tmp_path}/bad")
    more = ["--sections", "fewshot", "--new_tasks", f"poems={new}", "--shots", "2", "--shot_steps", "1"]
    text = error(*bad, *more)
    assert {"nan": "holds 1 NaN or infinite values", "zero": "is zero"}[kind] in text
    assert not (tmp_path / "run").exists()  # and is free for the right one


def test_an_adapter_of_another_base(error, flags, adapters, world, tmp_path):
    other = save_model(tmp_path / "otherbase", seed=9)
    settings = tmp_path / "adapters" / "chat" / "adapter_config.json"
    content = json.loads(settings.read_text()) | {"base_model_name_or_path": str(other)}
    settings.write_text(json.dumps(content))
    text = error(*given(flags, adapters))
    assert "was made for" in text and "otherbase" in text and "not those of" in text
