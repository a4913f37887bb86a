"""eval/lofit/: the metrics against hand-computed values, the scorers against a plain forward pass."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import steerbook.eval
from steerbook.eval import figures
from steerbook.eval.command import read_rows
from steerbook.eval.generation import generate
from steerbook.eval.lofit import __main__ as cli
from steerbook.eval.lofit import evaluate, exact_match, head_overlap, multiple_choice, scores
from steerbook.eval.lofit.figures import heads_map

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", " ", ":", "?", ".", "\n", "R"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[^\n]|\n"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="right"
    )


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model.eval()


# --- metrics -----------------------------------------------------------------------------------------------------


def test_multiple_choice_by_hand():
    log = math.log
    marks = multiple_choice(log(0.4), [log(0.4), log(0.1)], [log(0.2), log(0.05)])
    assert marks == pytest.approx({"mc1": 1.0, "mc2": 0.5 / 0.75, "mc3": 0.5})
    marks = multiple_choice(-3.0, [-3.0, -1.0, -2.0], [-2.5])
    assert marks["mc1"] == 0.0  # only the best answer counts, though others beat every false one
    assert marks["mc3"] == pytest.approx(2 / 3)


def test_a_tie_is_not_a_win():
    assert multiple_choice(-1.0, [-1.0], [-1.0]) == {"mc1": 0.0, "mc2": 0.5, "mc3": 0.0}


def test_answers_listed_twice_count_twice():
    assert multiple_choice(0.0, [0.0, 0.0], [0.0])["mc2"] == pytest.approx(2 / 3)


def test_mc2_does_not_underflow():
    assert multiple_choice(-1000.0, [-1000.0], [-1001.0])["mc2"] == pytest.approx(1 / (1 + math.exp(-1)))
    assert multiple_choice(-1.0, [-1.0], [-math.inf]) == {"mc1": 1.0, "mc2": 1.0, "mc3": 1.0}


def test_multiple_choice_refuses():
    with pytest.raises(ValueError, match="1 true and 0 false"):
        multiple_choice(-1.0, [-1.0], [])
    with pytest.raises(ValueError, match="0 true and 1 false"):
        multiple_choice(-1.0, [], [-1.0])
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="log-probabilities must be numbers"):
            multiple_choice(-1.0, [-1.0], [bad])
    with pytest.raises(ValueError, match="probability zero"):
        multiple_choice(-math.inf, [-math.inf], [-math.inf])


@pytest.mark.parametrize(
    "text, answers, stop, em, strict",
    [
        ("Oslo\nQ: next", ["oslo"], "\n", 1, 1),
        (" Oslo\nQ: next", ["Oslo"], "\n", 1, 0),  # the leading space that costs a base model everything
        (" Oslo", [" Oslo"], "\n", 1, 1),
        ("Oslo, Norway", ["Oslo"], "\n", 0, 0),
        ("Oslo", ["Bergen", "OSLO"], "\n", 1, 1),
        ("\nOslo", ["Oslo"], "\n", 0, 0),
        (" Sister.", ["sister"], ".", 1, 1),  # CLUTRR's strict form is stripped
        ("sister\nmore text.", ["sister"], ".", 1, 0),  # ... and does not stop at a newline
        ("sister", ["son-in-law", "sister"], ".", 1, 1),
        ("Oslo\nQ: x A:Rome", ["Oslo"], "\n", 1, 0),  # the reference takes the last "A:" of all the text
        ("", ["sister"], ".", 0, 0),
    ],
)
def test_exact_match(text, answers, stop, em, strict):
    marks = exact_match(text, answers, stop)
    assert (marks["em"], marks["em_strict"]) == (em, strict)


def test_exact_match_refuses():
    with pytest.raises(ValueError, match="needs answers and a stop text"):
        exact_match("a", [], "\n")
    with pytest.raises(ValueError, match="needs answers and a stop text"):
        exact_match("a", ["a"], "")


def test_head_overlap_by_hand():
    selections = [[(0, 1), (0, 2), (3, 4)], [(0, 2), (3, 4), (5, 6)], [(7, 7), (0, 1), (3, 4)]]
    found = head_overlap(selections, total_heads=30)
    assert found["pairs"] == [2, 2, 1]
    assert found["observed"] == pytest.approx(5 / 3) and found["chance"] == pytest.approx(9 / 30)
    assert head_overlap([[(0, 0)], [(0, 1), (0, 2)]], 4) == {"observed": 0.0, "chance": 0.5, "pairs": [0]}


def test_head_overlap_refuses():
    with pytest.raises(ValueError, match="at least two selections, got 1"):
        head_overlap([[(0, 0)]], 4)
    with pytest.raises(ValueError, match="selection 1 must hold 1 to 4 different heads, got 2 of which 1 differ"):
        head_overlap([[(0, 0)], [(1, 1), (1, 1)]], 4)
    with pytest.raises(ValueError, match="selection 0"):
        head_overlap([[], [(1, 1)]], 4)


# --- scorers -----------------------------------------------------------------------------------------------------

CHOICE_ROWS = [
    {"id": "1", "group": "x", "prompt": "q: a? r:", "best": " b.", "true": [" b.", " bc."], "false": [" d.", " e."]},
    {"id": "2", "group": "x", "prompt": "q: f? r:", "best": " g.", "true": [" g."], "false": [" hij.", " hij."]},
    {"id": "3", "group": "y", "prompt": "q: klm? r:", "best": " n.", "true": [" n.", " o."], "false": [" p."]},
]


def logprob(model, tokenizer, prompt: str, text: str) -> float:
    ids, start = tokenizer(prompt + text)["input_ids"], len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logprobs[i - 1, ids[i]].item() for i in range(start, len(ids)))


def test_multiple_choice_rows(model, tokenizer):
    result = evaluate(model, tokenizer, CHOICE_ROWS)
    expected = []
    for row, sample in zip(CHOICE_ROWS, result["samples"], strict=True):
        scores = {key: [logprob(model, tokenizer, row["prompt"], c) for c in row[key]] for key in ("true", "false")}
        best = logprob(model, tokenizer, row["prompt"], row["best"])
        assert sample["true"] == pytest.approx(scores["true"], abs=1e-4)
        assert sample["false"] == pytest.approx(scores["false"], abs=1e-4)
        assert (sample["id"], sample["group"]) == (row["id"], row["group"])
        expected.append(multiple_choice(best, scores["true"], scores["false"]))
    assert set(result["metrics"]) == {"mc1", "mc2", "mc3"}
    for name, found in result["metrics"].items():
        assert found["value"] == pytest.approx(sum(marks[name] for marks in expected) / 3, abs=1e-5)
        assert found["n"] == 3 and found["low"] <= found["value"] <= found["high"]
    json.dumps(result, allow_nan=False)


def test_result_does_not_depend_on_batches_or_order(model, tokenizer):
    first = evaluate(model, tokenizer, CHOICE_ROWS)
    second = evaluate(model, tokenizer, CHOICE_ROWS[::-1], batch_size=2)["samples"][::-1]
    for a, b in zip(first["samples"], second, strict=True):
        assert a["id"] == b["id"] and a["true"] == pytest.approx(b["true"], abs=1e-5)


def test_text_likelihood(model, tokenizer):
    rows = [{"id": str(i), "text": text} for i, text in enumerate(["abc def.", "q", "a longer text here", "bb bb"])]
    result = evaluate(model, tokenizer, rows, batch_size=3)
    nats = tokens = 0.0
    for row, sample in zip(rows, result["samples"], strict=True):
        ids = torch.tensor([tokenizer(row["text"])["input_ids"]])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        assert sample["metrics"]["nats_per_token"] == pytest.approx(loss, abs=1e-5)
        assert sample["tokens"] == ids.shape[1] - 1
        nats, tokens = nats + loss * (ids.shape[1] - 1), tokens + ids.shape[1] - 1
    metrics = result["metrics"]
    assert metrics["nats_per_token"]["value"] == pytest.approx(nats / tokens, abs=1e-5)  # of the corpus, not of rows
    for bound in ("value", "low", "high"):
        assert metrics["perplexity"][bound] == pytest.approx(math.exp(metrics["nats_per_token"][bound]))
    with pytest.raises(ValueError, match="row '7': a text needs at least two tokens"):
        evaluate(model, tokenizer, [{"id": "7", "text": ""}])


def test_generation_is_greedy_and_padding_does_not_matter(model, tokenizer):
    prompts = ["q: a", "a much longer prompt: b", "c", "q: a? "]
    state = torch.get_rng_state()
    model.generation_config, before = GenerationConfig(do_sample=True, temperature=2.0), model.generation_config
    found = generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=3)
    model.generation_config = before
    assert torch.equal(torch.get_rng_state(), state)
    for prompt, text in zip(prompts, found, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        start = len(ids)
        with torch.no_grad():
            while len(ids) < start + 6 and ids[-1] != 2:
                ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        assert text == "".join(WORDS[i] for i in ids[start:] if i > 2)
    assert tokenizer.padding_side == "right"


class Speaker:
    """Stands for ``generate``: what a model would say, in row order."""

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)

    def __call__(self, model, tokenizer, prompts, **options) -> list[str]:
        assert len(prompts) == len(self.texts)
        return self.texts


def test_exact_match_rows(model, tokenizer, monkeypatch):
    rows = [
        {"id": "1", "group": "g", "prompt": "q", "answers": ["Oslo"], "stop": "\n", "shortcut": "Oslo"},
        {"id": "2", "group": "g", "prompt": "q", "answers": ["Rome", "Roma"], "stop": "\n", "shortcut": "Paris"},
        {"id": "3", "group": "h", "prompt": "q", "answers": ["Bern"], "stop": "\n", "shortcut": "Paris"},
        {"id": "4", "group": "i", "prompt": "q", "answers": ["Kyiv"], "stop": "\n", "shortcut": None},
    ]
    monkeypatch.setattr(scores, "generate", Speaker("Oslo\n", " Roma", "Basel", " Kyiv\nQ"))
    result = evaluate(model, tokenizer, rows)
    assert {name: m["value"] for name, m in result["metrics"].items()} == pytest.approx(
        {"em": 0.75, "em_strict": 0.25, "em_shortcut": 1 / 3}
    )
    assert [sample["prediction"] for sample in result["samples"]] == ["oslo", "roma", "basel", "kyiv"]
    assert result["metrics"]["em_shortcut"]["n"] == 3


def test_exact_match_rows_with_the_model(model, tokenizer):
    said = generate(model, tokenizer, ["q: a r:"])[0].split(".")[0].split("\n")[0].strip()
    rows = [{"id": "1", "prompt": "q: a r:", "answers": [said], "stop": "."}]
    rows.append({"id": "2", "prompt": "q: a r:", "answers": ["Z"], "stop": "."})
    assert evaluate(model, tokenizer, rows)["metrics"]["em"]["value"] == 0.5


def test_extreme_shares_keep_an_interval(model, tokenizer, monkeypatch):
    rows = [{"id": str(i), "prompt": "q", "answers": ["x"], "stop": "."} for i in range(20)]
    monkeypatch.setattr(scores, "generate", Speaker(*["x"] * 20))
    found = evaluate(model, tokenizer, rows)["metrics"]["em"]
    assert found["value"] == found["high"] == 1.0 and 0.8 < found["low"] < 0.9


def test_rows_of_unknown_or_mixed_kinds(model, tokenizer):
    for bad in ([{"id": "1", "question": "?"}], [CHOICE_ROWS[0], {"id": "2", "text": "a"}]):
        with pytest.raises(ValueError, match="rows must be all multiple choice"):
            evaluate(model, tokenizer, bad)
    with pytest.raises(ValueError, match="no rows to evaluate"):
        evaluate(model, tokenizer, [])


def test_mode_and_gradients_are_restored(model, tokenizer):
    tuned = get_peft_model(LlamaForCausalLM(model.config), LoraConfig(target_modules=["q_proj"])).train()
    for rows in (
        CHOICE_ROWS,
        [{"id": "1", "text": "abc"}],
        [{"id": "1", "prompt": "q", "answers": ["a"], "stop": "."}],
    ):
        evaluate(tuned, tokenizer, rows)
        assert all(module.training for module in tuned.modules())
    assert torch.is_grad_enabled()


# --- command line --------------------------------------------------------------------------------------------------


def test_read_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "1"}\n\n{"id": "2"}\n')
    assert read_rows(path) == [{"id": "1"}, {"id": "2"}]
    path.write_text('{"id": "1"}\n{"id": ')
    with pytest.raises(ValueError, match="rows.jsonl, line 2: broken JSON"):
        read_rows(path)
    path.write_text('{"id": "1\u2028"}\n', encoding="utf-8")  # a line separator to Python, not to JSON
    assert read_rows(path) == [{"id": "1\u2028"}]
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, split all, row 1: found \[1\]"):
        read_rows(path)
    path.write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match="row 1 has no id, only the columns text"):
        read_rows(path)


def test_command_line_on_a_model_and_on_an_adapter(model, tokenizer, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in CHOICE_ROWS))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    cli.main(["--model", str(tmp_path / "base"), "--rows", str(rows), "--out", str(tmp_path / "base.json")])
    assert "mc1" in capsys.readouterr().out
    found = json.loads((tmp_path / "base.json").read_text())
    assert found["samples"][0]["true"] == pytest.approx(
        evaluate(model, tokenizer, CHOICE_ROWS)["samples"][0]["true"], abs=1e-5
    )
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False, r=2)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    cli.main(["--model", str(tmp_path / "adapter"), "--rows", str(rows), "--out", str(tmp_path / "adapter.json")])
    tuned = json.loads((tmp_path / "adapter.json").read_text())["samples"][0]["true"]
    assert tuned == pytest.approx(evaluate(adapted, tokenizer, CHOICE_ROWS)["samples"][0]["true"], abs=1e-5)
    assert tuned != pytest.approx(found["samples"][0]["true"], abs=1e-5)


def test_command_line_errors(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["--model", "m", "--rows", str(tmp_path / "none.jsonl")])
    assert "no file at" in capsys.readouterr().err


def test_public_names_exist():
    for name in steerbook.eval.__all__:
        assert getattr(steerbook.eval, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = steerbook.eval.nothing


# --- lm_eval -------------------------------------------------------------------------------------------------------


def test_lm_eval_task_gives_the_same_numbers(model, tokenizer):
    lm_eval = pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from steerbook.eval.lofit.lm_eval import truthfulqa_task

    language_model = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=4, add_bos_token=True)
    result = lm_eval.simple_evaluate(
        model=language_model,
        tasks=[truthfulqa_task(CHOICE_ROWS)],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    ours = evaluate(model, tokenizer, CHOICE_ROWS)
    for name in ("mc1", "mc2", "mc3"):
        theirs = result["results"]["truthfulqa_mc"][f"{name},none"]
        assert theirs == pytest.approx(ours["metrics"][name]["value"], abs=1e-5)
    samples = sorted(result["samples"]["truthfulqa_mc"], key=lambda sample: sample["doc_id"])
    for sample, own in zip(samples, ours["samples"], strict=True):
        assert sample["mc2"] == pytest.approx(own["metrics"]["mc2"], abs=1e-5)
    with pytest.raises(ValueError, match="no rows to make a task of"):
        truthfulqa_task([])


# --- figures -------------------------------------------------------------------------------------------------------


def test_figures_are_written(tmp_path):
    """Looks are for people to judge; here: PNGs of sensible size, the same bytes each time, without pyplot."""
    made = []
    for attempt in ("a", "b"):
        (tmp_path / attempt).mkdir()
        paths = [tmp_path / attempt / f"{name}.png" for name in ("heads", "flat", "bars", "loss")]
        heads_map([[1e-4, 2.0, 0.0], [1e-4, 1e-3, 1e-4]], [(0, 1)], paths[0], title="heads")
        heads_map([[0.0, 0.0]], [], paths[1], title="no scores")
        value = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 4}
        alone = {"value": 0.7, "low": None, "high": None, "n": 1}
        figures.bars({"base": {"MC1": value, "MC2": alone}, "LoFiT": {"MC1": value}}, paths[2], title="t", label="%")
        loss = {"value": -0.2, "low": -0.4, "high": 0.0, "n": 4}
        figures.bars({"gain": {"MC1": loss}}, tmp_path / "negative.png", title="t", label="points")
        figures.loss_curves({"offsets": [(0, 0.7), (5, 0.2)], "scales": [(5, 0.3)]}, paths[3], title="t")
        made.append([path.read_bytes() for path in paths])
    assert made[0] == made[1]
    assert all(data.startswith(b"\x89PNG") and 4_000 < len(data) < 200_000 for data in made[0])
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_figures_refuse(tmp_path):
    path = tmp_path / "x.png"
    with pytest.raises(ValueError, match=r"head \(2, 0\) is outside the 1 x 2 map"):
        heads_map([[1.0, 2.0]], [(2, 0)], path, title="t")
    with pytest.raises(ValueError, match="must be finite, non-negative"):
        heads_map([[math.nan]], [], path, title="t")
    with pytest.raises(ValueError, match="no bars to draw"):
        figures.bars({}, path, title="t", label="%")
    with pytest.raises(ValueError, match="every curve needs at least one point, got {'a': 0}"):
        figures.loss_curves({"a": []}, path, title="t")
    assert not path.exists()


def test_generation_is_greedy_whatever_the_model_asks_for(model, tokenizer):
    plain = generate(model, tokenizer, ["q: a r:", "q: b r:"])
    before = model.generation_config
    asked = GenerationConfig(
        do_sample=True, temperature=9.0, num_beams=3, repetition_penalty=3.0, no_repeat_ngram_size=1
    )
    try:
        model.generation_config = asked
        assert generate(model, tokenizer, ["q: a r:", "q: b r:"]) == plain
        assert model.generation_config is asked
    finally:
        model.generation_config = before
