"""Choices and reports measured exactly: against one prompt at a time, one string at a time, and by hand."""

import json
import math
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chat_models import CHAT, chat_model, chat_tokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from steerbook.data_builders.self_interpretability.asking import choices, questions
from steerbook.data_builders.self_interpretability.contexts import Attribute, Context
from steerbook.data_builders.self_interpretability.texts import report_text
from steerbook.eval.next_token import next_token_logprobs
from steerbook.eval.prompts import prompt_text
from steerbook.eval.self_interpretability.answers import answer_tokens, check_template
from steerbook.eval.self_interpretability.behaviour import Behaviour, measure_choices
from steerbook.eval.self_interpretability.measure import measure, readable
from steerbook.eval.self_interpretability.reports import (
    Report,
    mean_reports,
    measure_reports,
    written_reports,
)
from steerbook.trainers.tiny_lm import TinyConfig, build_tokenizer, new_model

TEA = Context("tea", "Which tea would Ada prefer?", (Attribute("caffeine", 0, 70, "mg"), Attribute("tar", 0, 0.04)))
THINKING = CHAT.replace("<assistant>", "<assistant>{% if enable_thinking is false %}<no>{% endif %}").replace(
    "<{{ m.role }}>", "<{{ m.role }}>{% if m.role == 'assistant' and enable_thinking is false %}<no>{% endif %}"
)


@pytest.fixture(scope="module")
def tiny():
    tokenizer = chat_tokenizer()
    return chat_model(tokenizer), tokenizer


def test_next_tokens_against_one_prompt_at_a_time(tiny):
    model, tokenizer = tiny
    rng = Random(0)
    prompts = [[1, *(rng.randrange(4, 200) for _ in range(rng.randrange(1, 30)))] for _ in range(23)]
    model.train()
    found = next_token_logprobs(model, prompts, [5, 90, 7], batch_size=4)
    assert model.training
    model.eval()
    with torch.no_grad():
        for prompt, row in zip(prompts, found, strict=True):
            logs = model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
            np.testing.assert_allclose(row, logs[[5, 90, 7]], atol=1e-5)
    with pytest.raises(ValueError, match="no tokens"):
        next_token_logprobs(model, [[1], []], [5])


def test_next_tokens_behind_what_prompts_have_in_common(tiny, monkeypatch):
    """A common start is read once, and a model whose cache cannot be copied reads whole prompts: the same numbers."""
    model, _ = tiny
    rng = Random(1)
    start = [1, *(rng.randrange(4, 200) for _ in range(20))]
    prompts = [[*start, *(rng.randrange(4, 200) for _ in range(rng.randrange(8)))] for _ in range(9)] + [start]
    alone = np.concatenate([next_token_logprobs(model, [prompt], [5, 90]) for prompt in prompts])
    rows = []
    watch = model.register_forward_pre_hook(lambda *given: rows.append(given[2]["input_ids"].shape), with_kwargs=True)
    shared = next_token_logprobs(model, prompts, [5, 90], batch_size=4)
    assert rows[0] == (1, 20) and sum(shape[0] for shape in rows[1:]) == 10  # one token of the shortest is its own
    assert shared == pytest.approx(alone, abs=1e-5)
    monkeypatch.setattr("steerbook.eval.next_token.expandable", lambda cache: False)
    assert next_token_logprobs(model, prompts, [5, 90], batch_size=4) == pytest.approx(alone, abs=1e-5)
    watch.remove()


def test_choices_by_hand(tiny):
    """Margins of both orders from the logits behind the rendered prompt."""
    model, tokenizer = tiny
    asked = choices([TEA], 12, Random(1))
    found = measure_choices(model, tokenizer, asked, batch_size=5)["tea"]
    a, b = (tokenizer.convert_tokens_to_ids(letter) for letter in "AB")
    margins, off = [], []
    with torch.no_grad():
        for one in asked:
            for prompt in (one.prompt, one.swapped):
                text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                assert ids.count(tokenizer.bos_token_id) == 1
                logs = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
                margins.append(float(logs[a] - logs[b]))
                off.append(1 - float(logs[a].exp() + logs[b].exp()))
    margins = np.array(margins).reshape(-1, 2)
    np.testing.assert_allclose(found.margins, (margins[:, 0] - margins[:, 1]) / 2, atol=1e-5)
    assert found.bias == pytest.approx(margins.mean(), abs=1e-5) and found.off_answer == pytest.approx(np.mean(off))
    np.testing.assert_allclose(found.differences, [one.difference for one in asked])
    with pytest.raises(ValueError, match="no trials"):
        measure_choices(model, tokenizer, [])


def chooser(weights, slope=3.0, trials=200, seed=0):
    differences = np.random.default_rng(seed).uniform(-1, 1, (trials, len(weights)))
    return Behaviour(differences, slope * differences @ np.array(weights) / 100, 0.0, 0.0)


def test_the_weights_of_a_linear_chooser_are_found():
    weights = [100.0, -40.0, 15.0, 0.0, -75.0]
    behaviour = chooser(weights)
    np.testing.assert_allclose(behaviour.weights("least_squares"), weights, atol=1e-6)
    np.testing.assert_allclose(behaviour.weights("fractional"), weights, atol=0.5)
    assert np.corrcoef(behaviour.weights("paper"), weights)[0, 1] > 0.98
    assert behaviour.linearity == pytest.approx(1.0) and behaviour.agreement(weights) == 1.0
    assert behaviour.agreement([-weight for weight in weights]) == 0.0


def test_answers_must_be_single_tokens(tiny):
    _, tokenizer = tiny
    assert answer_tokens(tokenizer, "so: ", ("A", "B")) == tokenizer.convert_tokens_to_ids(["A", "B"])
    with pytest.raises(ValueError, match=r"'AB' is not a single token behind 'so: '.*2 tokens"):
        answer_tokens(tokenizer, "so: ", ("AB", "B"))
    words = build_tokenizer(["so A B"])
    with pytest.raises(ValueError, match="the same token"):
        answer_tokens(words, "so", (" C", " D"))


def test_templates(tiny):
    _, tokenizer = tiny
    prompt = [{"role": "user", "content": "hi"}]
    assert prompt_text(tokenizer, "plain", {}) == "plain"
    text = prompt_text(tokenizer, prompt, {})  # the tokenizer adds the <bos> that the template wrote
    assert text == "<user>hi\n<assistant>" and tokenizer(text)["input_ids"].count(tokenizer.bos_token_id) == 1
    check_template(tokenizer, prompt, "A", {})
    check_template(tokenizer, "plain", "A", {})
    thinks = build_tokenizer([], "byte")
    with pytest.raises(ValueError, match="no chat template"):
        prompt_text(thinks, prompt, {})
    thinks.chat_template = THINKING
    check_template(thinks, prompt, "A", {"enable_thinking": False})
    thinks.chat_template = THINKING.replace(
        "<assistant>{% if enable_thinking is false %}<no>{% endif %}", "<assistant>"
    )
    with pytest.raises(ValueError, match="enable_thinking"):
        check_template(thinks, prompt, "A", {"enable_thinking": False})
    thinks.chat_template = CHAT.removeprefix("{{ bos_token }}")  # TRL would train without what the tokenizer adds
    with pytest.raises(ValueError, match=r"other tokens.*\(BOS\)"):
        check_template(thinks, prompt, "A", {})


def test_reports_against_one_string_at_a_time(tiny):
    """All 201 numbers of both attributes, each a text of its own; to 1e-5."""
    model, tokenizer = tiny
    asked = questions([TEA], 2, Random(2))
    found = measure_reports(model, tokenizer, asked, batch_size=32)
    for question, report in zip(asked, found, strict=True):
        text = prompt_text(tokenizer, question.prompt, {})
        assert question.openings == ('{"caffeine":', ', "tar":') and question.closings == (",", "}")
        for place in (0, 1):
            text += question.openings[place]
            before = len(tokenizer(text)["input_ids"])
            logs = []
            with torch.no_grad():
                for value in range(-100, 101):
                    ids = tokenizer(f"{text} {value}{question.closings[place]}")["input_ids"]
                    rows = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
                    logs.append(sum(float(rows[at - 1, ids[at]]) for at in range(before, len(ids))))
            masses = np.exp(logs)
            np.testing.assert_allclose(report.probabilities[place], masses / masses.sum(), rtol=1e-4, atol=1e-9)
            assert report.mass[place] == pytest.approx(masses.sum(), rel=1e-5)
            text += f" {range(-100, 101)[int(np.argmax(logs))]}"  # greedy earlier values stand in front
    means = mean_reports(asked, found)["tea"]
    np.testing.assert_allclose(means, np.mean([report.expected for report in found], axis=0))


def test_a_merged_sign_is_scored_as_fairly_as_a_space():
    """Where " -" is one token, a negative number has no other token given than a positive one: the probabilities of
    all numbers are those of their texts behind the colon."""
    vocabulary = {
        piece: token for token, piece in enumerate(["<s>", "x", ":", " ", " -", *map(str, range(10)), ",", "}"])
    }
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r" -|."), "isolated")
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<s>")
    model = new_model(build_tokenizer([], "byte"), TinyConfig(layers=1, initializer_range=0.4), seed=0).eval()
    question = questions([TEA], 1, Random(0))[0]
    plain = SimpleNamespace(**(vars(question) | {"prompt": "x", "openings": (":", ":"), "places": (0, 1)}))
    found = measure_reports(model, tokenizer, [plain], batch_size=64)[0]
    given, logs = tokenizer("x:")["input_ids"], []
    with torch.no_grad():
        for value in range(-100, 101):
            ids = tokenizer(f"x: {value},")["input_ids"]
            assert ids[: len(given)] == given
            rows = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            logs.append(sum(float(rows[at - 1, ids[at]]) for at in range(len(given), len(ids))))
    masses = np.exp(logs)
    np.testing.assert_allclose(found.probabilities[0], masses / masses.sum(), rtol=1e-4, atol=1e-9)


def test_a_reports_read_outs_by_hand():
    report = Report((0,), np.array([-10.0, 0.0, 10.0]), np.array([[0.5, 0.1, 0.4]]), np.array([0.9]))
    assert report.expected == pytest.approx([-1.0]) and report.mode == [-10.0]
    assert report.positive == pytest.approx([0.45])
    assert report.entropy == pytest.approx([-sum(p * math.log(p) for p in (0.5, 0.1, 0.4))])


def test_written_reports_are_parsed_and_never_dropped(tiny, monkeypatch):
    model, tokenizer = tiny
    replies = ["```json\n" + report_text(TEA, [40, -100]) + "\n```", "I would rather not say", '{"caffeine": 1}']
    monkeypatch.setattr("steerbook.eval.self_interpretability.reports.generate", lambda *_, **__: replies)
    asked = questions([TEA], 3, Random(0))
    found = written_reports(model, tokenizer, asked)
    assert found == [(replies[0], [40.0, -100.0]), (replies[1], None), (replies[2], None)]


def test_measure_is_json_and_refuses_one_sided_contexts(tiny):
    model, tokenizer = tiny
    asked = choices([TEA], 10, Random(3))
    same = [SimpleNamespace(context="same", difference=one.difference, prompt=asked[0].prompt,
                            swapped=asked[0].swapped) for one in asked]  # fmt: skip
    targets = {"tea": [100, -50], "same": [100, -50]}
    found = measure(model, tokenizer, [*asked, *same], questions([TEA], 1, Random(3)), targets, batch_size=16)
    assert json.loads(json.dumps(found)) == found and set(found) == {"tea", "same"}
    one = measure_choices(model, tokenizer, asked)["tea"]
    assert found["tea"]["agreement"] == one.agreement([100, -50])
    assert (found["tea"]["replies"], found["tea"]["valid"], found["tea"]["written"]) == (1, 0, None)
    assert len(found["tea"]["reported"]) == 2 and 0 <= min(found["tea"]["positive"]) <= 1
    assert found["same"]["learned"]["paper"] is None and "all 10 choices are equal" in found["same"]["refused"]
    assert "reported" not in found["same"] and found["same"]["first"] in (0.0, 1.0)


def test_valid_replies_are_counted_and_averaged(tiny, monkeypatch):
    model, tokenizer = tiny
    replies = [report_text(TEA, [40, -100]), "none", report_text(TEA, [60, 0])]
    monkeypatch.setattr("steerbook.eval.self_interpretability.reports.generate", lambda *_, **__: replies)
    found = measure(model, tokenizer, [], questions([TEA], 3, Random(0)), {}, batch_size=16)["tea"]
    assert (found["replies"], found["valid"], found["written"]) == (3, 2, [50.0, -50.0])


def test_what_can_be_read_off_embeddings(tiny):
    """Weights planted in the embeddings of names are read; others are not."""
    words = [f"n{number}" for number in range(60)]
    tokenizer = build_tokenizer([" ".join(["x", *words])])
    model = new_model(tokenizer, TinyConfig(layers=1), seed=1)
    rng = np.random.default_rng(0)
    weights = {word: rng.uniform(-100, 100, 3) for word in words}
    table, mixing = model.get_input_embeddings().weight, torch.tensor(rng.normal(size=(3, 96)), dtype=torch.float32)
    with torch.no_grad():
        for word, one in weights.items():
            table[tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0]] += (
                torch.tensor(one).float() @ mixing / 50
            )
    fit, test = ({word: weights[word] for word in part} for part in (words[:40], words[40:]))
    assert readable(model, tokenizer, fit, test) > 0.95
    other = {word: rng.uniform(-100, 100, 3) for word in words[40:]}
    assert abs(readable(model, tokenizer, fit, other)) < 0.4
