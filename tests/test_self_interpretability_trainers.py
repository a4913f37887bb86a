"""The two stages: what they refuse, what they train, and that an interrupted one goes on to the bit."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from steerbook.data_builders.self_interpretability.text_experiment import replayed
from steerbook.data_builders.self_interpretability.world import Part, WorldStream, make_world, vocabulary_text
from steerbook.trainers import PreferenceConfig, PreferenceTrainer, ReportConfig, ReportTrainer
from steerbook.trainers.self_interpretability.arms import StageArguments, report_config
from steerbook.trainers.self_interpretability.base import answering_model
from steerbook.trainers.self_interpretability.stages import run_stage
from steerbook.trainers.self_interpretability.trainer import first_half
from steerbook.trainers.tiny_lm import TinyConfig, build_tokenizer, new_model

WORLD = make_world(1, known=4, native=2, instilled=6, never=1)
TOKENIZER = build_tokenizer(vocabulary_text(WORLD))
SIZES = TinyConfig(hidden_size=16, intermediate_size=16, layers=2, heads=2, kv_heads=2, head_dim=8, tied=False)


def stream(*parts):
    parts = parts or (Part("decision", 6, WORLD.instilled), Part("report", 2, WORLD.known))
    return WorldStream(WORLD, parts, 3, lambda text: TOKENIZER(text, add_special_tokens=False)["input_ids"][0],
                       [TOKENIZER.bos_token_id])  # fmt: skip


def model():
    return new_model(TOKENIZER, SIZES, seed=0)


def config(folder, kind=PreferenceConfig, **more):
    usual = {"per_device_train_batch_size": 8, "max_steps": 4, "learning_rate": 0.01, "use_cpu": True, "report_to": [],
             "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "weight_decay": 0.0}  # fmt: skip
    return kind(str(folder), **(usual | more))


def moved(before, after):
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    return {name for (name, one), other in pairs if not torch.equal(one, other)}


def rows(task="decision", completion=" A", count=8, context="x"):
    return Dataset.from_list(
        [{"task": task, "prompt": "choice so", "completion": completion, "context": context}] * count
    )


@pytest.mark.parametrize(
    ("part", "parts"), [("embeddings", ("embed_tokens",)), ("last_layer", ("layers.1", "model.norm"))]
)
def test_only_the_part_learns(tmp_path, part, parts):
    trained = model()
    PreferenceTrainer(trained, config(tmp_path, part=part), stream=stream(), processing_class=TOKENIZER).train()
    names = moved(model(), trained)
    assert names and all(any(one in name for one in parts) for name in names)
    everything = model()
    PreferenceTrainer(everything, config(tmp_path), stream=stream(), processing_class=TOKENIZER).train()
    assert moved(model(), everything) > names


def tied():
    one = model()
    one.config.tie_word_embeddings = True
    return one


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda args: PreferenceTrainer(model(), args, rows("report", " zero"), processing_class=TOKENIZER),
         "must be of the task decision"),
        (lambda args: PreferenceTrainer(model(), args, rows("other"), processing_class=TOKENIZER), "found other"),
        (lambda args: PreferenceTrainer(model(), args, rows().remove_columns("task"), processing_class=TOKENIZER),
         "found nothing"),
        (lambda args: PreferenceTrainer(model(), args, stream=stream(Part("report", 8, WORLD.known)),
                                        processing_class=TOKENIZER), "must be of the task decision"),
        (lambda args: PreferenceTrainer(model(), replace(args, part="embeddings"), rows(), processing_class=TOKENIZER,
                                        peft_config=LoraConfig(r=2, target_modules="all-linear")), "full fine-tuning"),
        (lambda args: PreferenceTrainer(model(), replace(args, completion_only_loss=False), rows(),
                                        processing_class=TOKENIZER), "on completions only"),
        (lambda args: PreferenceTrainer(model(), replace(args, packing=True), rows(), processing_class=TOKENIZER),
         "packing"),
        (lambda args: PreferenceTrainer(model(), args, rows("decision", " banana"), processing_class=TOKENIZER),
         "row 1: a decision says ' banana', not A or B alone"),
        (lambda args: PreferenceTrainer(model(), args, rows().rename_columns({"prompt": "messages"}),
                                        processing_class=TOKENIZER), "rows have no prompt, so that the loss"),
        (lambda args: PreferenceTrainer(tied(), replace(args, part="embeddings"), rows(), processing_class=TOKENIZER),
         "output head as well"),
        (lambda args: ReportTrainer(model(), args, rows(), processing_class=TOKENIZER), "must be of the task report"),
        (lambda args: ReportTrainer(model(), args, rows("report"), eval_dataset=rows("report"),
                                    processing_class=TOKENIZER), "reports of x are both trained on and chosen by"),
    ],
)  # fmt: skip
def test_what_the_trainers_refuse(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        make(config(tmp_path))


def test_replayed_decisions_are_the_share_asked_for():
    reports, decisions = rows("report", " zero", 30), rows(count=100)
    mixed = replayed(reports, decisions, 0.25, seed=1)
    assert mixed["task"].count("decision") == 10 and mixed["task"].count("report") == 30
    assert replayed(reports, decisions, 0.0, seed=1)["task"].count("decision") == 0
    with pytest.raises(ValueError, match="takes 270 decisions, and there are 100"):
        replayed(reports, decisions, 0.9, seed=1)
    with pytest.raises(ValueError, match="from 0 to below 1"):
        replayed(reports, decisions, 1.0, seed=1)


def test_the_first_half_of_the_layers():
    adapter = first_half(LoraConfig(r=2, target_modules=["q_proj"]), model())
    assert adapter.layers_to_transform == [0]


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            control.should_save = control.should_training_stop = True


@pytest.mark.parametrize("kind", [PreferenceConfig, ReportConfig])
def test_a_stage_goes_on_and_is_not_repeated(tmp_path, kind):
    args = config(tmp_path, kind, save_strategy="steps", save_steps=100)
    whole = run_stage(model(), TOKENIZER, args, tmp_path / "whole", seed=5, stream=stream())
    assert whole.trained == whole.model.num_parameters() and whole.seconds > 0
    trainer = {PreferenceConfig: PreferenceTrainer, ReportConfig: ReportTrainer}[kind]
    stopped = config(tmp_path / "cut", kind, save_strategy="steps", save_steps=100, seed=5)
    trainer(model(), stopped, stream=stream(), processing_class=TOKENIZER, callbacks=[StopAt()]).train()
    resumed = run_stage(model(), TOKENIZER, args, tmp_path / "cut", seed=5, stream=stream())
    assert not moved(whole.model, resumed.model) and resumed.seconds == 0  # of the last part alone they are not told
    again = run_stage(model(), TOKENIZER, args, tmp_path / "whole", seed=5, stream=stream())
    assert not moved(whole.model, again.model) and again.log == whole.log


def test_an_adapter_is_saved_alone_and_merged(tmp_path):
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    found = run_stage(
        model(), TOKENIZER, config(tmp_path), tmp_path / "a", seed=5, stream=stream(), peft_config=adapter
    )
    assert (tmp_path / "a" / "model" / "adapter_config.json").exists() and found.trained < found.model.num_parameters()
    names = moved(model(), found.model)
    assert names and not any("embed" in name or "norm" in name for name in names)
    again = run_stage(
        model(), TOKENIZER, config(tmp_path), tmp_path / "a", seed=5, stream=stream(), peft_config=adapter
    )
    ids = torch.tensor([[1, 5, 6, 7]])
    torch.testing.assert_close(again.model(ids).logits, found.model(ids).logits)


def test_checkpoints_are_chosen_by_reports_of_other_contexts(tmp_path):
    reports = Dataset.from_list(
        [{"task": "report", "prompt": f"report {one.name} speed so", "completion": " plus50", "context": one.name}
         for one in WORLD.instilled])  # fmt: skip
    args = config(tmp_path, ReportConfig, max_steps=-1, num_train_epochs=3, per_device_train_batch_size=4)
    found = run_stage(model(), TOKENIZER, args, tmp_path / "r", seed=5, rows=reports.select(range(4)),
                      chosen_by=reports.select(range(4, 6)))  # fmt: skip
    losses = [entry["eval_loss"] for entry in found.log if "eval_loss" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_the_base_model_is_cached_and_learns(tmp_path):
    sizes = replace(SIZES, steps=30, learning_rate=0.02, warmup_steps=2)
    draws = stream(Part("decision", 16, WORLD.known), Part("report", 16, WORLD.known))
    folder = answering_model(TOKENIZER, draws, seed=0, config=sizes, cache_dir=tmp_path, progress=False)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    again = answering_model(TOKENIZER, draws, seed=0, config=sizes, cache_dir=tmp_path, progress=False)
    assert again == folder and (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert answering_model(TOKENIZER, draws, seed=1, config=sizes, cache_dir=tmp_path, progress=False) != folder
    trained = type(model()).from_pretrained(folder)
    ids, targets, _, tasks = (torch.as_tensor(part) for part in draws.step(1000))
    losses = []
    for one in (model(), trained):
        with torch.no_grad():
            logits = one(ids).logits[:, :-1][targets[:, 1:]]
        losses.append(torch.nn.functional.cross_entropy(logits[tasks == 0], ids[targets][tasks == 0]))
    assert losses[1] < 0.5 * losses[0]


def test_arms_and_their_order():
    keys = [arm.key for arm in StageArguments().planned()]
    assert keys == ["base", "instilled", "reported_0", "reported_1", "reported_all", "shuffled", "other", "reinstil",
                    "instilled_L0", "reported_L0", "instilled_L3", "reported_L3"]  # fmt: skip
    hard = StageArguments(levels=["L1", "L2"], controls=[], folds=[1]).planned()
    assert [arm.key for arm in hard] == ["base", "instilled", "reported_1", "base_L2", "instilled_L2", "reported_L2"]
    assert {arm.part for arm in StageArguments().planned()} == {"all", "embeddings", "last_layer"}
    for bad in ({"levels": []}, {"levels": ["L9"]}, {"folds": [2]}, {"controls": ["x"]}, {"levels": ["L1", "L1"]},
                {"replay": 1.0}):  # fmt: skip
        with pytest.raises(ValueError, match=f"--{next(iter(bad))}"):
            StageArguments(**bad)


def test_the_second_stage_takes_the_firsts_flags(tmp_path):
    first = config(tmp_path, adam_beta2=0.9, logging_steps=7)
    second = report_config(first, StageArguments(report_learning_rate=0.5, report_max_steps=3))
    assert isinstance(second, ReportConfig) and second.adam_beta2 == 0.9 and second.logging_steps == 7
    assert second.learning_rate == 0.5 and second.max_steps == 3 and second.lr_scheduler_type == "constant"
    assert SimpleNamespace(**vars(second)).output_dir == str(tmp_path)
