"""Loss on the assistant's turns alone, on those that are meant; and the constraint on first tokens, by hand."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from steerbook.data_builders.ping import PingDataArguments, build
from steerbook.trainers import AgentSFTConfig, AgentSFTTrainer
from steerbook.trainers.ping.trainer import constraint_weights, training_template
from steerbook.trainers.tiny_lm import TinyConfig, build_tokenizer, new_model

MARKED = (
    "{{ bos_token }}{% if tools %}<tools>{{ tools | length }}{{ '\n' }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% if m.tool_calls %} call "
    "{{ m.tool_calls[0].function.name }} {{ m.tool_calls[0].function.arguments.values() | join(' ; ') }}{% endif %}"
    "{{ '\n' }}{% endgeneration %}{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
COMMON = {"max_steps": 3, "per_device_train_batch_size": 2, "max_length": 1024, "learning_rate": 1e-2, "seed": 0,
          "report_to": "none", "save_strategy": "no", "logging_steps": 1, "use_cpu": True, "bf16": False,
          "warmup_steps": 0, "gradient_checkpointing": False, "disable_tqdm": True}  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    tokenizer = build_tokenizer([], "byte")
    tokenizer.chat_template = MARKED
    model = new_model(tokenizer, TinyConfig(layers=1), seed=0)
    model.config.max_position_embeddings = 2048
    return model, tokenizer, build(PingDataArguments(tasks=20))


def trained(model, tokenizer, rows, tmp_path, kind=AgentSFTTrainer, **more):
    config = AgentSFTConfig if kind is AgentSFTTrainer else SFTConfig
    peft = more.pop("peft_config", None)
    args = config(output_dir=str(tmp_path / "run"), **{**COMMON, **more})
    trainer = kind(copy.deepcopy(model), args, train_dataset=rows, processing_class=tokenizer, peft_config=peft)
    trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_it_is_trls_trainer_on_turns_of_the_assistant(tiny, tmp_path):
    model, tokenizer, data = tiny
    ours = trained(model, tokenizer, data["train"], tmp_path)
    theirs = trained(model, tokenizer, data["train"].remove_columns("loss"), tmp_path, SFTTrainer,
                     assistant_only_loss=True, lr_scheduler_type="cosine")  # fmt: skip
    assert losses(ours) == losses(theirs) and len(losses(ours)) == 3
    row = ours.train_dataset[0]
    said = tokenizer.decode([t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100])
    messages = data["train"][0]["messages"]
    assert all(m["content"] in said for m in messages if m["role"] == "assistant") and "call " in said
    assert not any(m["content"] in said for m in messages if m["role"] == "user")
    assert "<tools>10" in tokenizer.decode(row["input_ids"])


def test_turns_that_are_not_meant_carry_no_loss(tiny, tmp_path):
    model, tokenizer, _ = tiny
    messages = [{"role": "user", "content": "rules"}, {"role": "assistant", "content": "okay"},
                {"role": "user", "content": "task"}, {"role": "assistant", "content": "acting"}]  # fmt: skip
    rows = Dataset.from_list([{"id": str(n), "messages": messages, "loss": [False, True]} for n in range(4)])
    trainer = trained(model, tokenizer, rows, tmp_path)
    row = trainer.train_dataset[0]
    kept = tokenizer.decode([t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100])
    assert kept == "acting\n" and "okay" in tokenizer.decode(row["input_ids"])
    bad = Dataset.from_list([{"id": "x", "messages": messages, "loss": [False]}])
    with pytest.raises(ValueError, match="row x: 1 turns of the assistant, and the chat template marks 2"):
        trained(model, tokenizer, bad, tmp_path)


def test_weights_of_the_constraint_by_hand():
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0, 1]]).bool()
    now, before = torch.tensor([[-1.0] * 9]), torch.tensor([[-1.5] * 9])
    found = constraint_weights(now, before, mask, 0.1)[0]
    for place, factor in ((1, 5), (2, 20), (3, 20), (5, 20), (6, 1), (8, 5)):
        wanted = 2 * (1 - torch.sigmoid(torch.tensor(0.1 * factor * 0.5)))
        assert found[place] == pytest.approx(float(wanted))
    assert constraint_weights(before, before, mask, 0.1)[0, 1] == 1.0  # nothing has moved: plain training
    far = constraint_weights(torch.zeros(1, 9), torch.full((1, 9), -50.0), mask, 1.0)
    assert far[0, 2] == pytest.approx(1e-3)


def test_the_constraint_against_its_formula_and_on_an_adapter(tiny, tmp_path):
    model, tokenizer, data = tiny
    free = trained(model, tokenizer, data["train"], tmp_path, max_steps=1)
    held = trained(model, tokenizer, data["train"], tmp_path, max_steps=1, constrained=0.1)
    assert losses(free) == pytest.approx(losses(held), abs=1e-5)  # of the first step: nothing has moved yet
    batch = next(iter(held.get_train_dataloader()))
    held.model.eval()
    with torch.no_grad():
        logs = held.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        old = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels, mask = batch["labels"][:, 1:], batch["labels"][:, 1:] != -100
    now, before = (x.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] for x in (logs, old))
    weights = constraint_weights(now, before, mask, 0.1)
    wanted = -(weights * now * mask).sum() / mask.sum()
    assert float(held.compute_loss(held.model, dict(batch))) == pytest.approx(float(wanted), abs=1e-5)
    assert float(weights[mask].min()) < 0.95
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    lora = trained(model, tokenizer, data["train"], tmp_path, constrained=0.1, peft_config=adapter, learning_rate=0.1)
    assert lora.reference is None  # its base is the model that training began with
    told = [entry["constraint_weight"] for entry in lora.state.log_history if "constraint_weight" in entry]
    assert told[0] == pytest.approx(1.0, abs=1e-5) and told[-1] != pytest.approx(1.0, abs=1e-4)


def test_templates_that_do_not_mark_what_is_said(tiny, tmp_path):
    model, tokenizer, data = tiny
    for template, message in ((None, "no chat template"), ("{% for m in messages %}{{ m.content }}{% endfor %}",
                                                           "does not mark what the assistant says")):  # fmt: skip
        plain = copy.deepcopy(tokenizer)
        plain.chat_template = template
        with pytest.raises(ValueError, match=message):
            trained(model, plain, data["train"], tmp_path)
    assert training_template(tokenizer) == MARKED
    with pytest.raises(ValueError, match="what users and tools say"):
        trained(model, tokenizer, data["train"], tmp_path, assistant_only_loss=False)
    with pytest.raises(ValueError, match="--constrained -1"):
        trained(model, tokenizer, data["train"], tmp_path, constrained=-1.0)
    with pytest.raises(ValueError, match="give a loaded model"):
        trained("some/model", tokenizer, data["train"], tmp_path, constrained=0.1)
    with pytest.raises(ValueError, match="give the tokenizer"):
        AgentSFTTrainer(model, AgentSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False), data["train"])
