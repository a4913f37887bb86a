"""eval/atlas/: scorers against greedy generation and plain forward passes, metrics against hand-computed values."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_models import char_tokenizer, tiny_llama
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from steerbook.eval.atlas import Completions, accuracy, classify, disentanglement, evaluate, normalised, predicted
from steerbook.eval.atlas import __main__ as cli
from steerbook.eval.generation import generate
from steerbook.eval.likelihood import score_tokens

TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }}<eos>-{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(3)


def greedy(model, tokenizer, prompt: str, tokens: int) -> list[int]:
    """By generate(), which stops at the end of the text."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    output = model.generate(ids, max_new_tokens=tokens, do_sample=False, attention_mask=torch.ones_like(ids))
    return output[0, ids.shape[1] :].tolist()


def rows_of(model, tokenizer, prompts) -> list[dict]:
    """For each prompt its greedy completion of 1 to 4 letters, and one that differs from it in one letter."""
    rows = []
    for number, prompt in enumerate(prompts):
        said = greedy(model, tokenizer, prompt, 1 + number % 4)
        text = tokenizer.decode(said[: next((i for i, token in enumerate(said) if token < 4), 4)])  # letters only
        place = number % len(text)
        other = text[:place] + ("a" if text[place] != "a" else "b") + text[place + 1 :]
        for kind, completion in (("right", text), ("wrong", other)):
            rows.append({"id": f"{kind}-{number}", "group": str(number), "task": ("x", "y")[number % 2],
                         "prompt": prompt, "completion": completion})  # fmt: skip
    return rows


PROMPTS = ["abc:", "q", "hello world:", "9 8 7", "to be, or not to be", "zz z", "why? no", "0123456789"]


@pytest.fixture(scope="module")
def rows(model, tokenizer) -> list[dict]:
    return rows_of(model, tokenizer, PROMPTS)


# --- completions ---------------------------------------------------------------------------------------------------


def test_correct_is_what_greedy_generation_says(model, tokenizer, rows):
    result = evaluate(model, tokenizer, rows, batch_size=5)
    for row, sample in zip(rows, result["samples"], strict=True):
        ids = tokenizer(row["completion"])["input_ids"]
        said = greedy(model, tokenizer, row["prompt"], len(ids))
        assert sample["correct"] == (said == ids) == row["id"].startswith("right"), row
        assert (sample["id"], sample["group"], sample["task"]) == (row["id"], row["group"], row["task"])
        assert ("prediction" in sample) == (not sample["correct"]) and sample["tokens"] == len(ids)
    assert result["metrics"]["accuracy"]["value"] == 0.5
    json.dumps(result, allow_nan=False)


def test_nats_and_predictions_are_those_of_a_plain_forward_pass(model, tokenizer, rows):
    result = evaluate(model, tokenizer, rows)
    nats = tokens = 0.0
    for row, sample in zip(rows, result["samples"], strict=True):
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        start = len(tokenizer(row["prompt"])["input_ids"])
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = -sum(logprobs[i - 1, ids[i]].item() for i in range(start, len(ids)))
        assert sample["nats"] == pytest.approx(expected, abs=1e-5)
        if not sample["correct"]:
            best = logprobs[start - 1 : len(ids) - 1].argmax(-1)
            assert sample["prediction"] == tokenizer.decode(best, skip_special_tokens=True)
        nats, tokens = nats + expected, tokens + len(ids) - start
    assert result["metrics"]["nats_per_token"]["value"] == pytest.approx(nats / tokens, abs=1e-6)


def test_result_does_not_depend_on_batches_or_order(model, tokenizer, rows):
    first = evaluate(model, tokenizer, rows)["samples"]
    for size in (1, 3, len(rows)):
        second = evaluate(model, tokenizer, rows[::-1], batch_size=size)["samples"][::-1]
        for one, other in zip(first, second, strict=True):
            assert one | {"nats": 0} == other | {"nats": 0} and one["nats"] == pytest.approx(other["nats"], abs=1e-5)


def test_logits_are_kept_from_the_first_scored_token_of_a_batch(model, tokenizer):
    """Rows whose prompts differ much in length share a batch, where the shortest one decides what is kept."""
    ids = [tokenizer(text)["input_ids"] for text in ("ab", "abcdefgh", "abcdefghijkl")]
    together = score_tokens(model, ids, [1, 7, 2])
    for row, start, scores in zip(ids, [1, 7, 2], together, strict=True):
        with torch.no_grad():
            best = model(input_ids=torch.tensor([row])).logits[0, start - 1 : len(row) - 1].argmax(-1).tolist()
        assert scores.greedy == best and len(best) == len(row) - start


def test_means_are_the_values_of_the_metrics_without_intervals(model, tokenizer, rows):
    uneven = rows[:5] + [{**row, "task": "z", "id": f"z{row['id']}"} for row in rows[5:6]]
    encoded = Completions(tokenizer, uneven)
    for scored in (model, tiny_llama(4)):  # tokenised once, scored under several models
        metrics = evaluate(scored, tokenizer, uneven)["metrics"]
        found = encoded.means(scored, batch_size=2)
        expected = (metrics["accuracy"]["value"], metrics["nats_per_token"]["value"])
        assert found == pytest.approx(expected, abs=1e-6)


def test_eos_belongs_to_the_completion_when_asked(model, tokenizer, rows):
    without, with_end = (evaluate(model, tokenizer, rows, eos=eos)["samples"] for eos in (False, True))
    for row, short, long in zip(rows, without, with_end, strict=True):
        ids = tokenizer(row["completion"])["input_ids"]
        said = greedy(model, tokenizer, row["prompt"], len(ids) + 1)
        assert long["correct"] == (said == [*ids, 2]) and long["tokens"] == short["tokens"] + 1
        assert long["nats"] > short["nats"]
    ended = [row | {"completion": row["completion"] + "<eos>"} for row in rows]  # there already: not twice
    assert evaluate(model, tokenizer, ended, eos=True)["samples"] == with_end


def trained_on(model, tokenizer, rows, folder) -> list[tuple[list[int], int]]:
    """What TRL makes of the rows: token ids, and where the loss begins."""
    columns = Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"]} for row in rows])
    config = SFTConfig(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, max_length=None)
    trainer = SFTTrainer(model, config, train_dataset=columns, processing_class=tokenizer)
    batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
    return [(b["input_ids"][0].tolist(), (b["labels"][0] != -100).int().argmax().item()) for b in batches]


def test_texts_are_scored_as_trl_trains_them(model, tokenizer, rows, tmp_path):
    for row, sample, (ids, start) in zip(
        rows, evaluate(model, tokenizer, rows, eos=True)["samples"], trained_on(model, tokenizer, rows, tmp_path),
        strict=True,
    ):  # fmt: skip
        (scores,) = score_tokens(model, [ids], [start])
        assert sample["tokens"] == len(ids) - start and sample["nats"] == pytest.approx(scores.nats, abs=1e-5), row


def test_messages_are_scored_as_trl_trains_them_up_to_the_end_of_the_answer(model, tokenizer, tmp_path):
    rows = [
        {"id": "1", "task": "x", "prompt": [{"role": "user", "content": "abc?"}],
         "completion": [{"role": "assistant", "content": "yes"}]},
        {"id": "2", "task": "x", "prompt": [{"role": "system", "content": "be"}, {"role": "user", "content": "q"}],
         "completion": [{"role": "assistant", "content": "no no"}]},
    ]  # fmt: skip
    contents = evaluate(model, tokenizer, rows)["samples"]
    ended = evaluate(model, tokenizer, rows, eos=True)["samples"]
    for row, content, end, (ids, start) in zip(
        rows, contents, ended, trained_on(model, tokenizer, rows, tmp_path), strict=True
    ):
        answer = len(row["completion"][0]["content"])
        assert tokenizer.decode(ids[start:]) == row["completion"][0]["content"] + "<eos>-"
        assert (content["tokens"], end["tokens"]) == (answer, answer + 1)  # neither has the "-" behind the end
        for sample, stop in ((content, start + answer), (end, start + answer + 1)):
            (scores,) = score_tokens(model, [ids[:stop]], [start])
            assert sample["nats"] == pytest.approx(scores.nats, abs=1e-5)
            assert sample["correct"] == (scores.greedy == ids[start:stop])


def test_texts(model, tokenizer):
    rows = [{"id": str(i), "text": text} for i, text in enumerate(["abc def.", "qq", "a longer text here"])]
    result = evaluate(model, tokenizer, rows, batch_size=2)
    for row, sample in zip(rows, result["samples"], strict=True):
        ids = torch.tensor([tokenizer(row["text"])["input_ids"]])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        assert sample["nats"] == pytest.approx(loss * (ids.shape[1] - 1), abs=1e-4)
        assert sample["tokens"] == ids.shape[1] - 1
    total = sum(s["nats"] for s in result["samples"]) / sum(s["tokens"] for s in result["samples"])
    assert result["metrics"]["nats_per_token"]["value"] == pytest.approx(total)
    assert result["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(total))


def test_generation_agrees_on_texts(model, tokenizer, rows):
    """The other way to decode, in one batch with padding on the left."""
    said = generate(model, tokenizer, [row["prompt"] for row in rows], max_new_tokens=4)
    for row, sample, text in zip(rows, evaluate(model, tokenizer, rows)["samples"], said, strict=True):
        if len(text) == 4:  # no special token in it
            assert sample["correct"] == text.startswith(row["completion"])


def test_mode_and_random_state_are_restored(model, tokenizer, rows):
    state = torch.get_rng_state()
    model.train()
    evaluate(model, tokenizer, rows[:2])
    assert model.training and torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), state)
    model.eval()


def test_bad_rows(model, tokenizer):
    row = {"id": "1", "task": "x", "prompt": "ab", "completion": "c"}
    with pytest.raises(ValueError, match="no rows to evaluate"):
        evaluate(model, tokenizer, [])
    for bad in ([{"id": "1", "prompt": "ab", "completion": "c"}], [row, {"id": "2", "text": "abc"}]):
        with pytest.raises(ValueError, match="rows must be all completions .* or all texts"):
            evaluate(model, tokenizer, bad)
    with pytest.raises(ValueError, match="row '1': no token is left of the completion ''"):
        evaluate(model, tokenizer, [row | {"completion": ""}])
    with pytest.raises(ValueError, match="row '1': no token is left in front of the completion 'c'"):
        evaluate(model, tokenizer, [row | {"prompt": ""}])
    with pytest.raises(ValueError, match="completion 0 is 65 tokens; the model takes 64"):
        evaluate(model, tokenizer, [row | {"prompt": "a" * 64}])


# --- metrics -------------------------------------------------------------------------------------------------------


def sample(task, correct, group="g", nats=1.0, tokens=1):
    return {"id": "1", "group": group, "task": task, "correct": correct, "nats": nats, "tokens": tokens}


def test_accuracy_is_the_mean_of_the_tasks_means():
    samples = [sample("x", True, "a"), *[sample("y", correct, "abc"[i]) for i, correct in enumerate([1, 0, 0])]]
    found = accuracy(samples)
    assert set(found) == {"accuracy", "accuracy/x", "accuracy/y", "nats_per_token"}
    assert found["accuracy"]["value"] == pytest.approx((1 + 1 / 3) / 2) and found["accuracy"]["n"] == 4
    assert found["accuracy/x"]["value"] == 1 and found["accuracy/y"]["value"] == pytest.approx(1 / 3)
    assert found["accuracy"]["low"] <= found["accuracy"]["value"] <= found["accuracy"]["high"]
    weighted = accuracy([sample("x", True, "a", nats=1.0, tokens=1), sample("x", True, "b", nats=6.0, tokens=3)])
    assert weighted["nats_per_token"]["value"] == 7 / 4


def test_normalised_accuracy_by_hand():
    assert normalised({"x": 0.5, "y": 0.9}, {"x": 1.0, "y": 0.6}) == pytest.approx((0.5 + 1.5) / 2)
    for tuned in ({"x": 1.0}, {"x": 1.0, "y": 0.0}, {}):
        with pytest.raises(ValueError, match="the same tasks twice"):
            normalised({"x": 0.5, "y": 0.9}, tuned)


def test_classification_by_hand():
    rows = [{"id": str(i), "task": "digits", "label": label} for i, label in enumerate([0, 1, 1])]
    result = classify(rows, [[2.0, 0.0], [0.0, 0.0], [-1.0, 3.0]])
    assert [s["correct"] for s in result["samples"]] == [True, False, True]  # a tie goes to the first, as in argmax
    assert result["samples"][1]["prediction"] == 0 and "prediction" not in result["samples"][0]
    oracle = torch.nn.functional.cross_entropy(torch.tensor([[2.0, 0], [0, 0], [-1, 3]]), torch.tensor([0, 1, 1]))
    assert result["metrics"]["nats_per_token"]["value"] == pytest.approx(oracle.item(), abs=1e-6)
    assert result["metrics"]["accuracy"]["value"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="row '2': label 1 of 1 classes"):
        classify(rows[2:], [[1.0]])
    for bad in ([[1.0, 2.0]], [[1.0, math.nan]] * 3, [1.0, 2.0, 3.0]):
        with pytest.raises(ValueError, match="3 rows need logits"):
            classify(rows, bad)


def test_disentanglement_by_hand():
    predictions = [  # [task][vector added]: labels
        [["p", "q", "r", "s"], ["p", "q", "r", "t"], ["p", "q", "r", "s"]],
        [[1, 0], [0, 0], [1, 1]],
        [[None, "x"], [None, None], [None, "x"]],
    ]
    found = disentanglement(predictions)
    assert found["matrix"] == [[0, 0.25, 0], [0.5, 0, 1], [0, 0.5, 0]]
    assert found["error"] == pytest.approx((0.25 + 0.5 + 1 + 0.5) / 6)
    arrays = np.array([[[0, 1], [1, 1]], [[2, 2], [2, 3]]])
    assert disentanglement(arrays)["matrix"] == [[0, 0.5], [0.5, 0]]
    with pytest.raises(ValueError, match=r"must be \[n\]\[n\]"):
        disentanglement([[[1]]])
    with pytest.raises(ValueError, match=r"predictions\[0\]\[1\] has 1 labels, predictions\[0\]\[0\] 2"):
        disentanglement([[[1, 2], [1]], [[1], [1]]])


def test_labels_for_disentanglement():
    assert predicted([sample("x", True), sample("x", False) | {"prediction": "b"}]) == [None, "b"]


# --- command line --------------------------------------------------------------------------------------------------


def test_command_line(model, tokenizer, rows, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "found.json"
    cli.main(["--model", str(tmp_path / "model"), "--rows", str(tmp_path / "rows.jsonl"), "--out", str(out)])
    assert "accuracy/x" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert [s["correct"] for s in found["samples"]] == [row["id"].startswith("right") for row in rows]
