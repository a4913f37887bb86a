"""Text answers, decoded as a user would: strict comparison, format, length, the command."""

import json

import pytest
import torch

import steerbook.eval.task_hinting.text as text_module
from steerbook.data_builders.task_hinting import HintingDataArguments, build
from steerbook.eval.task_hinting import evaluate
from steerbook.eval.task_hinting.__main__ import main
from steerbook.trainers.task_hinting import (
    LengthSoftmax,
    ScratchConfig,
    named_tokenizer,
    save,
    scratch_model,
    use_length_softmax,
)
from steerbook.trainers.tiny_lm import TinyConfig, build_tokenizer, new_model


def rows():
    args = HintingDataArguments(main="addition", hints=["carry"], longest=3, test_lengths=[2, 4], test_rows=10)
    return [row for split in ("test_2", "test_4") for row in build(args)[split]]


def tiny():
    tokenizer = build_tokenizer([], "byte")
    return new_model(tokenizer, TinyConfig(layers=1), seed=0).eval(), tokenizer


def test_answers_are_compared_strictly(monkeypatch):
    given = rows()
    made = {
        0: given[0]["completion"],
        1: f"{given[1]['completion']}\nAddition: 1 + 1",
        2: f"{given[2]['completion']}  ",
        3: given[3]["completion"] + "0",
        4: f" about{given[4]['completion']}",
        5: "",
        6: given[6]["completion"].strip(),
        7: "\n" + given[7]["completion"],
    }
    texts = [made.get(number, " 7") for number in range(20)]
    monkeypatch.setattr(text_module, "generate", lambda *_, **__: texts)
    found = evaluate(*tiny(), given)
    em = [sample["metrics"]["em"] for sample in found["samples"]]
    formed = [sample["metrics"]["formed"] for sample in found["samples"]]
    assert em[:8] == [1, 1, 1, 0, 0, 0, 1, 0] and not any(em[8:])
    assert formed[:8] == [1, 1, 1, 1, 0, 0, 1, 0] and all(formed[8:])
    assert list(found["metrics"]) == [f"{name}/addition/{n}" for name in ("em", "formed", "tokens") for n in (2, 4)]
    assert found["metrics"]["em/addition/2"]["value"] == pytest.approx(0.4)
    assert found["metrics"]["em/addition/4"]["value"] == 0.0 and found["metrics"]["em/addition/4"]["n"] == 10
    assert found["samples"][3]["answer"] == texts[3].strip() and "answer" not in found["samples"][0]
    assert found["samples"][0]["tokens"] > 5


def test_words_where_words_are_asked_for(monkeypatch):
    row = {"task": "member", "items": 3, "prompt": "Is there a in: abc =>", "completion": " yes"}
    monkeypatch.setattr(text_module, "generate", lambda *_, **__: [" yes", " no", " 1"])
    found = evaluate(*tiny(), [row] * 3)
    assert [tuple(s["metrics"].values()) for s in found["samples"]] == [(1, 1, 1), (0, 0, 1), (0, 0, 0)]


@pytest.mark.parametrize(
    ("wanted", "answer", "goes_on", "metrics", "error"),
    [
        (" 7 7 41", " 7 7 41", False, (1, 1, 1), None),
        (" 7 7 41", " 7 7 93", False, (0, 0.75, 1), "wrong next"),
        (" 7 7 41", " 7 7", False, (0, 0.5, 1), "end"),
        (" 7 7 41", " 7 7 41 93", False, (0, 0.75, 1), "end"),
        (" 7 7 41", " 7 41", False, (0, 0.25, 1), "stopped repeating"),
        (" 12", " 13", False, (0, 2 / 3, 1), "wrong next"),  # digits: the second is wrong, the end is in its place
        (" 12", "", False, (0, 0, 0), "format"),
        (" 93", " 93 97 99", True, (1, 1, 1), None),
        (" 93", " 93 97 99", False, (0, 0.5, 1), "end"),
        (" 9", " 93", True, (0, 0.5, 1), "end"),
        (" 7 9", " 7 9 11", True, (1, 1, 1), None),
        ("", "", False, (1, 1, 1), None),
        ("", " 93", False, (0, 0, 0), "format"),
    ],
)
def test_a_single_answer(monkeypatch, wanted, answer, goes_on, metrics, error):
    """Right throughout, share of parts and end in their places, form: all by hand."""
    row = {"task": "sort", "items": 3, "prompt": "Sort: 7 =>", "completion": wanted}
    monkeypatch.setattr(text_module, "generate", lambda *_, **__: [answer])
    sample = evaluate(*tiny(), [row | ({"goes_on": True} if goes_on else {})])["samples"][0]
    assert tuple(sample["metrics"][name] for name in ("em", "tokens", "formed")) == pytest.approx(metrics)
    assert sample.get("error") == error


def test_a_real_model_answers_token_by_token():
    model, tokenizer = tiny()
    given = rows()[:6]
    found = evaluate(model, tokenizer, given, batch_size=4)
    allowed = 2 + max(len(row["completion"]) for row in given)  # bytes, <bos>, and one more
    for row, sample in zip(given, found["samples"], strict=True):
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        with torch.no_grad():
            for _ in range(allowed):
                ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
                if ids[0, -1] == tokenizer.eos_token_id:
                    break
        said = tokenizer.decode(ids[0], skip_special_tokens=True).removeprefix(row["prompt"])
        assert sample.get("answer", row["completion"].strip()) == said.strip(" ").partition("\n")[0].strip(), start


@pytest.mark.parametrize(
    ("given", "message"),
    [([], "no rows to evaluate"), ([{"prompt": "a", "task": "t"}], "row 1 has no items, completion, only")],
)
def test_rows_that_cannot_be_scored(given, message):
    with pytest.raises(ValueError, match=message):
        evaluate(*tiny(), given)


def test_the_command_scores_a_saved_model(tmp_path, capsys):
    model, tokenizer = tiny()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()[:4]))
    main(
        ["--model", str(tmp_path / "model"), "--rows", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "o.json")]
    )
    assert "em/addition/2" in capsys.readouterr().out
    use_length_softmax(model, LengthSoftmax("log", 5.0))
    save(model, tmp_path / "own")
    tokenizer.save_pretrained(tmp_path / "own")
    with pytest.raises(SystemExit, match="a softmax of its own, which from_pretrained leaves out"):
        main(["--model", str(tmp_path / "own"), "--rows", str(tmp_path / "rows.jsonl")])
    assert len(json.loads((tmp_path / "o.json").read_text())["samples"]) == 4
    scratch_model(9, ScratchConfig(), 0, 20).save_pretrained(tmp_path / "scratch")
    named_tokenizer([f"<{number}>" for number in range(9)]).save_pretrained(tmp_path / "scratch")
    with pytest.raises(SystemExit, match="reads no text: score it with `teacher_forced`"):
        main(["--model", str(tmp_path / "scratch"), "--rows", str(tmp_path / "rows.jsonl")])
