"""Choosing task vectors for a new task: each way against the same thing worked out by hand."""

import dataclasses
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny_models import tiny_llama

from steerbook.trainers import Composer, TaskVector
from steerbook.trainers.atlas.arguments import ArmArguments
from steerbook.trainers.atlas.bench import Bench
from steerbook.trainers.atlas.budget import pick
from steerbook.trainers.atlas.trainer import AtlasConfig
from steerbook.trainers.multitask import MultiTaskConfig, tokenised
from steerbook.trainers.tiny_lm import build_tokenizer

NAMES = ["one", "two", "three", "four"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("budget"))
    corpus = [f" {name} {word}: {word}" for name in [*NAMES, "new"] for word in ("ox", "hen", "cat")]
    tokenizer = build_tokenizer(corpus)
    torch.manual_seed(0)
    model = tiny_llama(vocab_size=len(tokenizer)).eval()
    generator = torch.Generator().manual_seed(1)
    vectors = {
        name: TaskVector({n: 0.05 * torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()})
        for name in NAMES
    }
    rows = Dataset.from_list([
        {"task": name, "prompt": f" {name} {word}:", "completion": f" {word}"}
        for name in [*NAMES, "new"] for word in ("ox", "hen", "cat")
    ])  # fmt: skip
    settings = {"use_cpu": True, "per_device_train_batch_size": 4, "train_eos": False, "max_length": 16}
    args = AtlasConfig(folder, **settings)
    fit = tokenised(model, tokenizer, rows, args)
    return Bench(model, tokenizer, NAMES, vectors, {}, fit, rows, args, MultiTaskConfig(folder, **settings),
                 ArmArguments(), Path(folder), lambda model, rows: (0.0, 0.0))  # fmt: skip


def scores(bench):
    """By the composer's own hooks, at zero, on all rows of the new task at once."""
    rows = [row for row in bench.fit if row["task"] == "new"]
    composer = Composer(bench.base, list(bench.vectors.values()))
    total = 0.0
    for row in rows:
        ids = torch.tensor(row["input_ids"])[None]
        answer = next(place for place, label in enumerate(row["labels"]) if label != -100)
        total = total - bench.base(input_ids=ids).logits[0, answer - 1].log_softmax(-1)[ids[0, answer]]
    (total / len(rows)).backward()
    found = composer.coefficients.grad.clone()
    composer.remove()
    return found


def test_gradient_takes_the_largest_sums_and_leaves_the_model_alone(bench):
    expected = scores(bench).abs().sum(1).argsort(descending=True)[:2].tolist()
    picked = pick(bench, bench.tasks(bench.fit, ["new"]), "gradient", 2)
    assert list(picked) == [NAMES[number] for number in expected]
    assert all(parameter.grad is None for parameter in bench.base.parameters())


def test_blockwise_takes_the_largest_in_each_block(bench):
    best = scores(bench).abs().argmax(0)
    composer = Composer(bench.base, list(bench.vectors.values()))
    blocks = composer.block_names
    composer.remove()
    (picked,) = pick(bench, bench.tasks(bench.fit, ["new"]), "blockwise", 1).values()
    for name, number in zip(blocks, best.tolist(), strict=True):
        assert torch.equal(picked[name], list(bench.vectors.values())[number][name])
    assert len(set(best.tolist())) > 1


@torch.no_grad()
def test_feature_takes_the_most_similar_tasks(bench):
    def feature(task):
        found = []
        for row in bench.fit:
            if row["task"] == task:
                prompt = bench.tokenizer(row["prompt"])["input_ids"]
                found.append(bench.base.model(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1].double())
        return torch.stack(found).mean(0)

    target = feature("new")
    cosine = [float(torch.cosine_similarity(feature(name), target, dim=0)) for name in NAMES]
    expected = sorted(NAMES, key=lambda name: -cosine[NAMES.index(name)])[:2]
    assert list(pick(bench, bench.tasks(bench.fit, ["new"]), "feature", 2)) == expected


def test_random_depends_on_the_seed_alone(bench):
    rows = bench.tasks(bench.fit, ["new"])
    assert list(pick(bench, rows, "random", 2)) == list(pick(bench, rows, "random", 2))
    other = []
    for seed in range(8):
        args = dataclasses.replace(bench.args)
        args.seed = seed
        other.append(tuple(pick(dataclasses.replace(bench, args=args), rows, "random", 2)))
    assert len(set(other)) > 1


def test_features_need_a_task_for_every_vector(bench):
    stranger = dataclasses.replace(bench, vectors={**bench.vectors, "stranger": bench.vectors["one"]})
    with pytest.raises(ValueError, match="'stranger'"):
        pick(stranger, bench.tasks(bench.fit, ["new"]), "feature", 2)
