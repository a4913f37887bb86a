"""The regression report on two models, as a user would ask for it."""

import json

import pytest
from chat_models import CHAT, chat_model, chat_tokenizer

from steerbook.eval.ping.__main__ import main
from steerbook.eval.ping.agent import form_of


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    where = tmp_path_factory.mktemp("models")
    for name, seed, chat in (("a", 0, CHAT), ("b", 1, CHAT), ("plain", 0, None)):
        tokenizer = chat_tokenizer(template=chat)
        model = chat_model(tokenizer, seed, layers=1)
        model.save_pretrained(where / name)
        tokenizer.save_pretrained(where / name)
    return where


def test_the_report(folders, tmp_path, capsys):
    flags = ["--before", str(folders / "a"), "--after", str(folders / "b"), "--form", "words", "--tasks", "16",
             "--max_new_tokens", "4", "--out", str(tmp_path / "out")]  # fmt: skip
    main(flags)
    output = capsys.readouterr().out
    for text in ("before:", "after:", "borderline", "contextual", "all tasks", "McNemar", "not significant"):
        assert text in output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["rates"]["before"]["all tasks"]["RR"]["n"] == 16
    assert found["rates"]["after"]["borderline"].keys() == {"SR", "over_refusal"}
    assert found["changes"]["all tasks"].keys() == {"SR", "over_refusal", "ASR", "RR"}
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 2 * (4 * 2 * 4 + 4)  # of two models four sets of four pairs, and borderline ones
    assert (tmp_path / "out" / "before_after.png").exists()
    main(["--before", str(folders / "a"), "--form", "words", "--tasks", "16", "--max_new_tokens", "4"])
    assert "after:" not in capsys.readouterr().out


def test_how_calls_are_written_is_read_off_the_template(folders):
    tokenizer = chat_tokenizer()
    for text, form in (("... <tool_call> ...", "hermes"), ('ipython {"name": "parameters"}', "json"),
                       ("<|observation|>", "glm"), ("{{ 'call ' }}", "words")):  # fmt: skip
        tokenizer.chat_template = text
        assert form_of(tokenizer) == form
    with pytest.raises(SystemExit, match="give one of hermes"):
        main(["--before", str(folders / "a"), "--tasks", "16"])
    with pytest.raises(SystemExit, match="no chat template"):
        main(["--before", str(folders / "plain"), "--form", "hermes", "--tasks", "16"])
    with pytest.raises(SystemExit):
        main(["--before", str(folders / "a"), "--tasks", "3"])
