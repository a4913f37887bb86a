"""Choosing heads: scores, rankings, the file, ITI, RED, and the fingerprint that ties a choice to its base."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import ARCHITECTURES, HEADS, char_tokenizer, lofit_layers, logits, tiny, tiny_llama
from torch import nn

from steerbook.trainers.fingerprint import model_fingerprint
from steerbook.trainers.lofit import (
    HeadSelection,
    LofitConfig,
    LofitDPOConfig,
    LofitDPOTrainer,
    LofitSFTConfig,
    LofitSFTTrainer,
)
from steerbook.trainers.lofit.iti import head_outputs, iti_adapter, iti_probe
from steerbook.trainers.lofit.red import MLP_OUTPUTS, red_model
from steerbook.trainers.lofit.selection import grid, layer_matched_heads, learned_scores, random_heads, top_heads

GRID = {0: 4, 1: 4, 2: 4}


def selection(**changes) -> HeadSelection:
    fields = {
        "heads": [(2, 1), (0, 3)],
        "scores": {0: [0.0, 0.1, 0.2, 0.5], 2: [0.1, 0.9, 0.0, 0.0]},
        "k": 2,
        "seed": 7,
        "method": "learned",
        "base_fingerprint": "0123456789abcdef",
        "data_fingerprint": "fedcba9876543210",
    }
    return HeadSelection(**{**fields, **changes})


# Scores and rankings


def test_learned_scores_are_the_norms_of_each_head():
    tuned = get_peft_model(tiny("llama"), LofitConfig(component="both", init_std=0.0))
    first, _, last = lofit_layers(tuned)
    first.lofit_scale["default"].data[1, :2] = torch.tensor([3.0, -4.0])
    last.lofit_scale["default"].data[3] = 2.0  # 12 numbers: 2 sqrt(12)
    last.lofit_offset["default"].data[0, 5] = -0.25
    assert learned_scores(tuned, "scale") == {
        0: [0, 5, 0, 0], 1: [0, 0, 0, 0], 2: [0, 0, 0, pytest.approx(48**0.5)]
    }  # fmt: skip
    assert learned_scores(tuned, "offset")[2] == [0.25, 0, 0, 0]


def test_scores_of_a_part_of_the_heads_are_minus_infinity_elsewhere():
    tuned = get_peft_model(tiny("gpt2"), LofitConfig(heads=HEADS, init_std=0.0))
    inf = float("inf")
    assert learned_scores(tuned, "offset") == {1: [0.0, -inf, 0.0, -inf], 2: [-inf, -inf, -inf, 0.0]}
    with pytest.raises(ValueError, match="no lofit_scale"):
        learned_scores(tuned, "scale")
    with pytest.raises(ValueError, match="'other'"):
        learned_scores(tuned, "offset", "other")
    with pytest.raises(ValueError, match="only trained heads"):
        top_heads(learned_scores(tuned, "offset"), 4)


def test_ranking_and_ties():
    scores = {0: [0.5, 2.0, 1.0], 1: [2.0, 0.1, 3.0]}
    assert top_heads(scores, 6) == [(1, 2), (0, 1), (1, 0), (0, 2), (0, 0), (1, 1)]
    assert top_heads(dict(reversed(scores.items())), 3) == [(1, 2), (0, 1), (1, 0)]
    assert top_heads({0: [1.0] * 3, 1: [1.0] * 3}, 4) == [(0, 0), (0, 1), (0, 2), (1, 0)]


@pytest.mark.parametrize("k", [0, -1, 13])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=f"k={k} heads .* from 1 to 12"):
        top_heads({layer: [1.0] * 4 for layer in GRID}, k)
    with pytest.raises(ValueError, match=f"k={k} heads"):
        random_heads(GRID, k, 0)


def test_a_nan_score_cannot_hide_in_a_ranking():
    nan = float("nan")
    for row in ([1.0, nan, 2.0], [nan, 1.0, 2.0], [2.0, 1.0, nan]):
        with pytest.raises(ValueError, match="nan"):
            top_heads({0: row}, 1)


def test_random_heads_are_a_reproducible_uniform_draw():
    draw = random_heads(GRID, 5, seed=3)
    assert draw == random_heads(GRID, 5, seed=3) != random_heads(GRID, 5, seed=4)
    assert len(set(draw)) == 5 and all(0 <= head < GRID[layer] for layer, head in draw)
    counts = Counter(head for seed in range(600) for head in random_heads(GRID, 3, seed))
    assert len(counts) == 12 and all(100 < n < 200 for n in counts.values())  # 150 each, five deviations wide


def test_layer_matched_heads_match_the_layers():
    like = [(2, 0), (2, 1), (2, 3), (0, 2)]
    draws = [layer_matched_heads(GRID, like, seed) for seed in range(50)]
    assert draws[3] == layer_matched_heads(GRID, like[::-1], 3)
    for draw in draws:
        assert Counter(layer for layer, _ in draw) == {2: 3, 0: 1} and len(set(draw)) == 4
    assert len({tuple(draw) for draw in draws}) > 8  # of 16
    assert {head for draw in draws for layer, head in draw if layer == 0} == {0, 1, 2, 3}


def test_random_draws_leave_the_global_state_alone():
    import random

    before = random.getstate(), torch.get_rng_state()
    random_heads(GRID, 5, seed=3)
    layer_matched_heads(GRID, HEADS, seed=3)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_the_grid_counts_query_heads(name):
    model = tiny(name)
    assert grid(model) == GRID
    assert grid(get_peft_model(model, LofitConfig(heads=[(1, 1)])).get_base_model()) == GRID


def test_the_grid_of_an_unknown_architecture_needs_modules():
    model = tiny("llama")
    model.config.model_type = "novel"
    with pytest.raises(ValueError, match="'novel'"):
        grid(model)
    assert grid(model, LofitConfig(target_modules=["self_attn.o_proj"])) == GRID


# heads.json


def test_heads_json_round_trip(tmp_path):
    chosen = selection()
    chosen.save(tmp_path / "new" / "heads.json")
    assert HeadSelection.load(tmp_path / "new" / "heads.json") == chosen
    text = json.loads((tmp_path / "new" / "heads.json").read_text())
    assert text["heads"] == [[2, 1], [0, 3]] and text["scores"]["2"][1] == 0.9  # best first, as chosen


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "3", "null", '"heads"', "{}", '{"heads": []}',
        '{"heads": [[1, 2, 3]], "scores": {}, "k": 1, "seed": 0, "method": "file", "base_fingerprint": ""}',
        '{"heads": [[1, 2]], "scores": {}, "k": 2, "seed": 0, "method": "file", "base_fingerprint": ""}',
        '{"heads": [[1, 2], [1, 2]], "scores": {}, "k": 2, "seed": 0, "method": "file", "base_fingerprint": ""}',
        '{"heads": [[1, 2]], "scores": [], "k": 1, "seed": 0, "method": "file", "base_fingerprint": ""}',
        '{"heads": [[1, 2]], "scores": {}, "k": 1, "seed": 0, "method": "file", "base_fingerprint": "", "more": 1}',
    ],
)  # fmt: skip
def test_broken_files_are_named(text, tmp_path):
    (tmp_path / "heads.json").write_text(text)
    with pytest.raises(ValueError, match="heads.json is not a head selection"):
        HeadSelection.load(tmp_path / "heads.json")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="heads.json"):
        HeadSelection.load(tmp_path / "heads.json")


def test_k_must_be_the_number_of_heads():
    with pytest.raises(ValueError, match="k=3, but 2"):
        selection(k=3)


def test_a_selection_for_another_base_is_refused():
    chosen = selection(base_fingerprint=model_fingerprint(tiny("llama")))
    chosen.check_base(tiny("llama"))
    with pytest.raises(ValueError, match="Heads do not carry over"):
        chosen.check_base(tiny("llama", seed=1))
    with pytest.raises(ValueError, match="selected on the base"):
        chosen.check_base(tiny("mistral", seed=1))


# The fingerprint


def test_one_fingerprint_for_the_same_weights_however_loaded_or_wrapped(tmp_path):
    bare = model_fingerprint(tiny("llama"))
    assert len(bare) == 16 and int(bare, 16) >= 0
    assert model_fingerprint(tiny("llama", dtype=torch.bfloat16)) == bare
    assert model_fingerprint(get_peft_model(tiny("llama"), LofitConfig(heads=HEADS))) == bare
    tuned = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj", "up_proj"]))
    assert model_fingerprint(tuned) == bare
    assert model_fingerprint(red_model(tiny("llama"))) == bare
    assert model_fingerprint(tuned.unload()) == bare


@pytest.mark.parametrize("tied", [True, False])
def test_the_fingerprint_survives_saving(tied, tmp_path):
    model = tiny_llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert model_fingerprint(type(model).from_pretrained(tmp_path)) == model_fingerprint(model)


def test_any_changed_tensor_changes_it():
    bare = model_fingerprint(tiny("llama"))
    names = [name for name, _ in tiny("llama").named_parameters()]
    found = set()
    for name in names:
        model = tiny("llama")
        model.get_parameter(name).data.view(-1)[-1] += 0.5  # the last value of a tensor is always sampled
        found.add(model_fingerprint(model))
    assert bare not in found and len(found) == len(names)


def test_every_value_of_a_small_tensor_counts():
    bare = nn.Linear(1, 1000, bias=False)
    before, found = model_fingerprint(bare), set()
    for i in range(0, 1000, 37):
        bare.weight.data[i] += 1
        found.add(model_fingerprint(bare))
    assert len(found) == 28 and before not in found


def test_embeddings_of_real_models_are_sampled_within_range():
    # 128,256 x 4,096 numbers (Llama 3.1): more than fp32 counts exactly. One stored number stands for all of them.
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.zeros(1).expand(128256, 4096), requires_grad=False)
    assert len(model_fingerprint(holder)) == 16


# ITI


def planted(texts_per_label: int = 20):
    """A Llama with one head, (1, 2), that tells true answers ("t") from false ones ("f"): it copies its own token."""
    model = tiny_llama(seed=2, num_key_value_heads=4)
    tokenizer = char_tokenizer()
    true, false = (tokenizer(word)["input_ids"][0] for word in "tf")
    embedding = model.model.embed_tokens.weight.data
    embedding[[true, false]] = embedding[[true, false]].mean(0)  # alike to all heads ...
    embedding[:, -1] = 0.0
    embedding[true, -1], embedding[false, -1] = 1.0, -1.0  # ... but for one number
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        for projection in (
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            layer.mlp.gate_proj,
            layer.mlp.up_proj,
        ):
            projection.weight.data[:, -1] = 0.0
        attention.o_proj.weight.data[-1] = 0.0
        layer.mlp.down_proj.weight.data[-1] = 0.0
        if index == 1:
            attention.v_proj.weight.data[2 * 12 + 5, -1] = 4.0
    texts = [f"q{i % 10}: {'abcdefgh'[i % 7]}{word}" for i in range(texts_per_label) for word in "tf"]
    labels = [1, 0] * texts_per_label
    groups = [f"q{i % 10}" for i in range(texts_per_label) for _ in "tf"]
    return model, tokenizer, texts, labels, groups


def test_a_planted_head_is_ranked_first_and_shifted_towards_true():
    model, tokenizer, texts, labels, groups = planted()
    probe = iti_probe(model, tokenizer, texts, labels, groups, batch_size=7)
    assert top_heads(probe.accuracy, 1) == [(1, 2)] and probe.accuracy[1][2] == 1.0
    others = [a for layer, row in probe.accuracy.items() for head, a in enumerate(row) if (layer, head) != (1, 2)]
    assert max(others) < 1.0
    direction = probe.shift[1][2]
    assert direction[5] > 0 and direction[5] == direction.abs().max()
    assert probe.shift[1].shape == (4, 12)
    again = iti_probe(model, tokenizer, texts, labels, groups, batch_size=40)
    assert again.accuracy == probe.accuracy
    tuned = iti_adapter(model, probe, [(1, 2)], alpha=3.0)
    layer = lofit_layers(tuned)[0]
    torch.testing.assert_close(layer.lofit_offset["default"][0].detach(), 3.0 * direction)
    assert layer.selected["default"] == (2,) and len(lofit_layers(tuned)) == 1


def test_direction_and_deviation_against_numpy():
    model, tokenizer = tiny("llama"), char_tokenizer()
    texts = [f"q{i}: {answer}" for i in range(8) for answer in ("yes it is", "no", "surely", "not so")]
    labels, groups = [1, 0, 1, 0] * 8, [f"q{i}" for i in range(8) for _ in range(4)]
    probe = iti_probe(model, tokenizer, texts, labels, groups)
    seen = {}
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda module, args, index=index: seen.setdefault(index, []).append(args[0][0, -1].double().numpy())
        )
    for text in texts:  # one by one: no padding
        logits(model, tokenizer(text, return_tensors="pt")["input_ids"])
    truth = np.array(labels)
    for index in range(3):
        z = np.stack(seen[index]).reshape(len(texts), 4, 12)
        theta = z[truth == 1].mean(0) - z[truth == 0].mean(0)
        theta /= np.linalg.norm(theta, axis=-1, keepdims=True)
        sigma = (z * theta).sum(-1).std(0, ddof=1)
        np.testing.assert_allclose(probe.shift[index].numpy(), sigma[:, None] * theta, atol=2e-4)


def test_probing_leaves_the_model_as_it_was():
    model, tokenizer, texts, labels, groups = planted()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    iti_probe(model, tokenizer, texts, labels, groups)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert not model._forward_hooks and not any(m._forward_pre_hooks for m in model.modules())


def test_probing_ignores_dropout():
    model = tiny("gpt2").train()  # GPT-2 has dropout, and training leaves a model in that mode
    texts = ["ab", "cd", "ef"]
    first = head_outputs(model, char_tokenizer(), texts, batch_size=3)
    second = head_outputs(model, char_tokenizer(), texts, batch_size=3)
    assert model.training
    for index in range(3):
        assert torch.equal(first[index], second[index])


@pytest.mark.parametrize(("labels", "groups"), [([1, 0] * 3, list("aabbcc")), ([1] * 12, list("abcdef") * 2)])
def test_too_little_to_probe(labels, groups):
    with pytest.raises(ValueError, match="at least five questions"):
        iti_probe(tiny("llama"), char_tokenizer(), ["x"] * len(labels), labels, groups)


# RED


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name in MLP_OUTPUTS])
def test_red_has_two_vectors_a_layer_and_starts_as_the_base(name):
    model = tiny(name)
    before = logits(model)
    tuned = red_model(model)
    assert torch.equal(logits(tuned), before)
    trained = {key: p for key, p in tuned.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == 2 * 32 * 3
    blocks = [m for m in model.modules() if isinstance(m, nn.Linear) and m.in_features == 48 and m.out_features == 32]
    assert blocks


def test_red_is_scale_then_bias_on_the_mlp_output():
    plain, tuned = tiny("llama"), red_model(tiny("llama"))
    generator = torch.Generator().manual_seed(1)
    vectors = {}
    for kind in ("ia3_l", "beft_bias"):
        found = [p for key, p in tuned.named_parameters() if kind in key]
        for p in found:
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
        vectors[kind] = [p.detach().flatten() for p in found]
    for layer, scale, bias in zip(plain.model.layers, vectors["ia3_l"], vectors["beft_bias"], strict=True):
        layer.mlp.register_forward_hook(lambda module, args, h, s=scale, b=bias: s * h + b)
    torch.testing.assert_close(logits(tuned), logits(plain), rtol=0, atol=1e-5)


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_red_trains_and_comes_off_again(loss, tmp_path):
    base = tiny("llama")
    before = logits(base)
    tuned = red_model(base)
    settings = {
        "output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "save_strategy": "no", "max_steps": 2,
        "disable_tqdm": True,
    }  # fmt: skip
    rows = [{"prompt": "a:", "completion": " b", "chosen": " b", "rejected": " c"}] * 8
    columns = ["prompt", "completion"] if loss == "sft" else ["prompt", "chosen", "rejected"]
    args = LofitSFTConfig(**settings) if loss == "sft" else LofitDPOConfig(**settings)
    trainer = (LofitSFTTrainer if loss == "sft" else LofitDPOTrainer)(
        tuned, args=args, train_dataset=Dataset.from_list(rows).select_columns(columns),
        processing_class=char_tokenizer(),
    )  # fmt: skip
    started = {key: p.detach().clone() for key, p in tuned.named_parameters()}
    if loss == "dpo":  # the first loss at the identity, against the clean base
        batch = next(iter(trainer.get_train_dataloader()))
        assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(np.log(2), abs=1e-6)
    trainer.train()
    moved = {key for key, p in tuned.named_parameters() if not torch.equal(p, started[key])}
    assert moved == {key for key in started if "ia3_l" in key or "beft_bias" in key} and len(moved) == 6
    bare = tuned.unload()
    assert not [m for m in bare.modules() if isinstance(m, BaseTunerLayer)]
    vars(bare).pop("forward", None)  # TRL's fused head
    assert torch.equal(logits(bare.eval()), before)


def test_red_of_an_unknown_architecture():
    with pytest.raises(ValueError, match="'gpt2'"):
        red_model(tiny("gpt2"))
