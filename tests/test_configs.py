"""The YAML files: each says what the paper says, and runs through the whole recipe on a tiny model of its family."""

import csv
import json
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import GemmaConfig, LlamaConfig, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM
from trl import DPOConfig, SFTConfig

from steerbook.data_builders.lofit import splits
from steerbook.data_builders.rows import Row
from steerbook.trainers.tiny_lm import build_tokenizer

ROOT = Path(__file__).parents[1]
CONFIGS = {path.stem: path for path in sorted((ROOT / "recipes" / "configs" / "lofit").glob("*.yaml"))}
ACCELERATE = {path.stem: path for path in sorted((ROOT / "accelerate_configs").glob("*.yaml"))}

# Hub id, layers x query heads, head width, dtype of the weights (section 4 and the authors' scripts).
MODELS = {
    "llama2_7b": ("meta-llama/Llama-2-7b-hf", 32 * 32, 128, "float32"),
    "llama2_13b": ("meta-llama/Llama-2-13b-hf", 40 * 40, 128, "bfloat16"),
    "gemma_7b": ("google/gemma-7b", 28 * 16, 256, "bfloat16"),
    "llama3_8b": ("meta-llama/Llama-3.1-8B", 32 * 32, 128, "bfloat16"),
    "qwen3_8b": ("Qwen/Qwen3-8B", 36 * 32, 128, "bfloat16"),
}
PAPER = {  # k, learning rate of the scales, lambda, learning rate of the offsets
    "llama2_7b_truthfulqa": (32, 5e-3, 5e-4, 1e-2),
    "llama2_13b_truthfulqa": (48, 1e-3, 1e-3, 2e-2),
    "gemma_7b_truthfulqa": (16, 5e-3, 5e-4, 2e-2),
    "llama2_7b_mquake": (32, 5e-3, 1e-3, 1e-2),
    "llama2_13b_mquake": (48, 1e-3, 1e-3, 8e-3),
    "gemma_7b_mquake": (16, 5e-3, 5e-4, 8e-3),
    "llama2_7b_clutrr": (32, 5e-4, 5e-3, 1e-2),
    "llama2_13b_clutrr": (48, 1e-3, 1e-3, 1e-2),
    "gemma_7b_clutrr": (16, 5e-4, 5e-3, 1e-2),
}
CARRIED_OVER = {  # from Llama-2-7B; k is 3 %
    "llama3_8b_truthfulqa": (32, 5e-3, 5e-4, 1e-2),
    "qwen3_8b_truthfulqa": (35, 5e-3, 5e-4, 1e-2),
}
SHIPPED = {"llama2_7b": 4096, "llama2_13b": 6144, "gemma_7b": 4096}  # trained numbers, as the paper counts them


@pytest.fixture(scope="module")
def recipe(load_recipe):
    return load_recipe("lofit")


def test_there_is_one_for_every_model_and_data_set():
    assert set(CONFIGS) == PAPER.keys() | CARRIED_OVER.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_holds_the_papers_values(recipe, name):
    k, selection_rate, l1_lambda, rate = (PAPER | CARRIED_OVER)[name]
    model, _, dataset = name.rpartition("_")
    hub_id, total, head_dim, dtype = MODELS[model]
    settings = recipe.parse(["--config", str(CONFIGS[name])])

    assert settings.model.model_name_or_path == hub_id
    assert settings.model.dtype == dtype
    assert settings.model.model_revision == "main"
    assert settings.data.dataset == dataset
    assert settings.data.prompt_style == ("paper" if name in PAPER else "clean")
    assert settings.data.max_train_rows == (300 if dataset == "clutrr" else None)
    assert settings.data.pairs == "first"
    assert settings.data.data_files is None
    assert (settings.data.dataset_id is not None) == (dataset == "truthfulqa")

    assert settings.arms.ks(total) == [k]  # raises where the model has not that many heads
    assert 0.029 < k / total < 0.036  # the paper's "3 %"
    assert k * head_dim == SHIPPED.get(model, k * 128)
    assert settings.arms.init_std == 1e-3
    assert settings.arms.selection_learning_rate == selection_rate

    training = settings.training
    assert training.l1_lambda == l1_lambda
    assert training.learning_rate == rate
    assert isinstance(training, DPOConfig if dataset == "truthfulqa" else SFTConfig)
    if dataset == "truthfulqa":
        assert training.beta == 0.5
    assert training.max_length == (400 if dataset == "mquake" else 512)
    assert training.num_train_epochs == 5
    assert training.max_steps == -1
    assert training.per_device_train_batch_size == 8
    assert training.gradient_accumulation_steps == 1
    assert training.lr_scheduler_type == "linear"
    assert training.warmup_steps == 0
    assert training.weight_decay == 0.0
    assert training.max_grad_norm == 1.0
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert training.optim == "adamw_torch"
    assert settings.recipe.seeds == [42]


@pytest.mark.parametrize("name", CONFIGS)
def test_first_line_is_the_command(name):
    first = CONFIGS[name].read_text().splitlines()[0]
    command = f"# accelerate launch recipes/lofit.py --config recipes/configs/lofit/{name}.yaml"
    assert first == command + ("" if name.endswith("truthfulqa") else " --data_files DIR")
    assert "trust_remote_code" not in CONFIGS[name].read_text()


def test_run_folders_differ():
    folders = [yaml.safe_load(path.read_text())["output_dir"] for path in CONFIGS.values()]
    assert len(set(folders)) == len(folders)


def test_command_line_wins_and_unknown_key_is_an_error(recipe, tmp_path):
    path = CONFIGS["llama2_7b_mquake"]
    assert recipe.parse(["--config", str(path), "--learning_rate", "0.5", "--k", "7"]).training.learning_rate == 0.5
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(path.read_text() + "learning_rat: 1.0\n")
    with pytest.raises(ValueError, match="learning_rat"):
        recipe.parse(["--config", str(wrong)])


# ---- each through both stages, evaluation and report ----

SMALL = {
    "vocab_size": 260,
    "num_hidden_layers": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {  # as in the family: one key-value head a query head or one for four; width of the heads not the model's
    "llama2_7b": LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, **SMALL),
    "llama2_13b": LlamaConfig(hidden_size=40, intermediate_size=48, num_attention_heads=5, **SMALL),
    "gemma_7b": GemmaConfig(
        hidden_size=24, intermediate_size=48, num_attention_heads=4, num_key_value_heads=4, head_dim=8, **SMALL
    ),
    "llama3_8b": LlamaConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=8, num_key_value_heads=2, **SMALL
    ),
    "qwen3_8b": Qwen3Config(
        hidden_size=32, intermediate_size=48, num_attention_heads=8, num_key_value_heads=2, head_dim=8, **SMALL
    ),
}


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory):
    folders = {}
    tokenizer = build_tokenizer([], "byte")
    for name, config in FAMILIES.items():
        config.vocab_size = len(tokenizer)
        folders[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def hub_rows(dataset_id: str, revision: str) -> dict[str, list[Row]]:
    """TruthfulQA as the Hub holds it: one split, lists in the cells."""
    assert (dataset_id, len(revision)) == ("truthfulqa/truthful_qa:generation", 40)
    rows = [
        {
            "type": "Adversarial",
            "category": "Toys",
            "question": f"Is {n} odd?",
            "best_answer": "It depends",
            "correct_answers": ["It depends", "Ask Ann."],
            "incorrect_answers": ["Never", f"Only {n}%"],
            "source": "none",
        }
        for n in range(10)
    ]
    return {"validation": [Row(row, dataset_id, "validation", n) for n, row in enumerate(rows, 1)]}


def write_rows(dataset: str, folder: Path) -> None:
    """MQuAKE and CLUTRR as the authors' files hold them."""
    for split, start in (("train", 0), ("val", 10), ("test", 20)):
        if dataset == "mquake":
            rows = [
                {
                    "case_id": n,
                    "requested_rewrite": [
                        {"prompt": "The capital of {} is", "subject": f"Land {n}", "target_new": {"str": f"City {n}"}}
                    ],
                    "questions": [f"Where is the king of Land {n}?", "Again?", "And again?"],
                    "new_answer": f"Castle {n}",
                    "new_answer_alias": ["the castle"],
                }
                for n in range(start, start + 4)
            ]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            rows = [
                {
                    "id": f"c{n}",
                    "clean_story": f"[Ann] has {n} sons. Her son [Bob] has a wife, [Cleo].",
                    "query": "('Ann', 'Cleo')",
                    "target_text": "daughter-in-law",
                }
                for n in range(start, start + 4)
            ]
            (folder / f"{split}.json").write_text(json.dumps(rows))


@pytest.mark.parametrize("name", CONFIGS)
def test_runs_two_steps_on_a_tiny_model(recipe, tiny_models, name, tmp_path, monkeypatch, capsys):
    model, _, dataset = name.rpartition("_")
    config = FAMILIES[model]
    out = tmp_path / "run"
    argv = ["--config", str(CONFIGS[name]), "--model_name_or_path", str(tiny_models[model]), "--output_dir", str(out)]
    argv += ["--arms", "lofit", "--k", "3", "--max_steps", "2", "--per_device_train_batch_size", "2"]
    argv += ["--max_eval_rows", "2", "--save_strategy", "no", "--use_cpu", "true"]
    if dataset == "truthfulqa":
        monkeypatch.setattr(splits, "read_hub", hub_rows)
    else:
        write_rows(dataset, tmp_path)
        argv += ["--data_files", str(tmp_path)]

    recipe.main(argv)

    results = json.loads((out / "results.json").read_text())
    assert results["status"] == "finished"
    assert results["toy"] is False
    heads = json.loads((out / "seed_42" / "selection" / "heads.json").read_text())
    total = config.num_hidden_layers * config.num_attention_heads
    assert sum(len(row) for row in heads["scores"].values()) == total
    assert len(heads["heads"]) == 3
    arm = json.loads((out / "seed_42" / "lofit_k3" / "measured.json").read_text())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert arm["trained"] == 3 * head_dim
    losses = [entry["train_loss"] for entry in arm["log"] if "train_loss" in entry]
    assert len(losses) == 1 and 0 < losses[0] < 20
    assert "LoFiT" in capsys.readouterr().out


# ---- accelerate ----


KINDS = {"cpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED",
         "zero3_offload": "DEEPSPEED", "multi_node": "MULTI_GPU"}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_config(name):
    config = load_config_from_file(str(ACCELERATE[name]))  # an unknown key is an error
    assert config.distributed_type.value == KINDS[name]
    assert config.num_processes == {"cpu": 1, "multi_node": 16}.get(name, 8)
    assert config.use_cpu == (name == "cpu")
    assert config.mixed_precision == "no"  # the recipe's --bf16 decides
    assert config.fsdp_config.get("fsdp_version") == (2 if name == "fsdp2" else None)
    assert config.deepspeed_config.get("zero_stage") == {"zero2": 2, "zero3": 3, "zero3_offload": 3}.get(name)
    command = ACCELERATE[name].read_text().splitlines()[1]
    assert command.startswith(f"#   accelerate launch --config_file accelerate_configs/{name}.yaml ")


def test_several_machines_differ_from_one_in_three_lines():
    one, several = (yaml.safe_load(ACCELERATE[name].read_text()) for name in ("ddp", "multi_node"))
    assert one.keys() == several.keys()
    assert {key for key in one if one[key] != several[key]} == {"num_machines", "num_processes", "rdzv_backend"}
    script = (ROOT / "accelerate_configs" / "multi_node.slurm").read_text()
    assert "accelerate_configs/multi_node.yaml" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_accelerate_configs_are_all_tested():
    assert set(ACCELERATE) == set(KINDS)


def test_rows_written_here_are_the_published_form(tmp_path):
    """Where the real files are at hand: the same columns as the rows above."""
    real = ROOT.parent / "shared" / "data"
    if not real.is_dir():
        pytest.skip(f"the published data files are not at {real}")
    write_rows("mquake", tmp_path)
    write_rows("clutrr", tmp_path)
    ours = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])
    theirs = json.loads((real / "mquake" / "train.jsonl").read_text().splitlines()[0])
    assert ours.keys() <= theirs.keys()
    ours, theirs = (json.loads((folder / "train.json").read_text())[0] for folder in (tmp_path, real / "clutrr"))
    assert ours.keys() <= theirs.keys()
    with (real / "truthfulqa" / "fold_0_test.csv").open(newline="") as stream:
        header = next(csv.reader(stream))
    assert {"Question", "Best Answer", "Correct Answers", "Incorrect Answers"} <= set(header)
