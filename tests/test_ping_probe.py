"""States, probes and pushes against a plain forward pass."""

import numpy as np
import pytest
import torch

from steerbook.eval.ping.probe import fit_probe, prompt_states, random_direction, residual_rms, steered
from steerbook.trainers.tiny_lm import TinyConfig, build_tokenizer, new_model

PROMPTS = ["buy a lamp", "buy a stolen lamp", "x"]


@pytest.fixture(scope="module")
def tiny():
    tokenizer = build_tokenizer([], "byte")
    return new_model(tokenizer, TinyConfig(layers=3), seed=0).eval(), tokenizer


def test_states_are_those_of_the_prompt(tiny):
    model, tokenizer = tiny
    found = prompt_states(model, tokenizer, PROMPTS)
    assert found.mean.shape == found.last.shape == (3, 3, model.config.hidden_size)
    for place, prompt in enumerate(PROMPTS):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states[1:]
        for layer in range(3):
            assert np.allclose(found.last[place, layer], states[layer][0, -1], atol=1e-5)
            assert np.allclose(found.mean[place, layer], states[layer][0].mean(0), atol=1e-5)


def test_a_probe_finds_what_is_there_and_no_more():
    rng = np.random.default_rng(0)
    harmful = np.arange(200) % 2
    states = rng.normal(size=(200, 2, 6))
    states[:, 1, 2] += 3.0 * harmful
    probe = fit_probe(states[:100], harmful[:100], 1)
    assert probe.auc(states[100:, 1], harmful[100:]) > 0.9 and np.abs(probe.direction).argmax() == 2
    nothing = fit_probe(states[:100], harmful[:100], 0)
    assert 0.3 < nothing.auc(states[100:, 0], harmful[100:]) < 0.7
    assert probe.logits(states[0, 1]) == pytest.approx(states[0, 1] @ probe.direction + probe.offset)
    with pytest.raises(ValueError, match="harmful and harmless"):
        fit_probe(states, np.ones(200), 0)


def test_a_push_moves_the_last_token_alone_and_is_taken_back(tiny):
    model, tokenizer = tiny
    ids = torch.tensor([tokenizer("buy a lamp")["input_ids"]])
    direction = random_direction(model.config.hidden_size, 1)
    before = prompt_states(model, tokenizer, PROMPTS)
    seen = []  # what the next layer is given
    watch = (
        model.get_decoder().layers[2].register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
    )
    with torch.no_grad():
        model(ids)
        with steered(model, 1, direction, 2.0, 0.5):
            model(ids)
            model(ids[:, :1])  # a token that is written
        model(ids[:, :1])
    watch.remove()
    plain, pushed, written, alone = seen
    unit = torch.tensor(direction / np.linalg.norm(direction), dtype=torch.float32)
    assert torch.allclose(pushed[0, -1] - plain[0, -1], unit, atol=1e-5)  # 2 times 0.5
    assert torch.equal(pushed[0, :-1], plain[0, :-1]) and torch.equal(written, alone)
    after = prompt_states(model, tokenizer, PROMPTS)
    assert np.array_equal(before.last, after.last)
    assert residual_rms(before.last, 1) == pytest.approx(np.sqrt(np.mean(before.last[:, 1] ** 2)))
