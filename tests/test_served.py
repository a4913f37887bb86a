"""Models behind a server: the client, evals that only need texts, and PING's agent, against a server on loopback."""

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import Random

import pytest
import torch
from chat_models import CHAT, chat_model, chat_tokenizer
from fake_server import FakeServer, said, writes
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_atlas_export import composed, low_rank
from test_lofit_export import lofit as lofit_model
from tiny_models import IDS, char_tokenizer, logits, tiny_llama
from tiny_models import tiny as tiny_model

from steerbook.data_builders.ping.calls import Call, render_call, served_call
from steerbook.data_builders.ping.desk import TOOLS
from steerbook.data_builders.ping.office import OFFICE
from steerbook.data_builders.ping.tasks import FAMILIES, TEMPLATES, pairs
from steerbook.data_builders.task_hinting import HintingDataArguments, build
from steerbook.endpoint import Endpoint, side_by_side
from steerbook.eval.atlas.__main__ import main as atlas
from steerbook.eval.generation import generate
from steerbook.eval.lofit.__main__ import main as lofit
from steerbook.eval.ping.__main__ import main as ping
from steerbook.eval.ping.episodes import run_episodes
from steerbook.eval.ping.served import ServedAgent
from steerbook.eval.self_interpretability.reports import written_reports
from steerbook.eval.task_hinting.__main__ import main as task_hinting
from steerbook.trainers.atlas.export import export_folded
from steerbook.trainers.lofit import export_merged
from steerbook.trainers.ping import Prefix, ServerGuard
from steerbook.trainers.quantised import absorbed


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A chat model, its tokenizer and their folder."""
    folder = tmp_path_factory.mktemp("model")
    tools = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
    tokenizer = chat_tokenizer(template=CHAT.replace("{{ bos_token }}", "{{ bos_token }}" + tools))
    model = chat_model(tokenizer, layers=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer, folder


@pytest.fixture
def served(tiny):
    with FakeServer(writes(tiny=tiny[:2])) as server:
        yield server


# --- the client ----------------------------------------------------------------------------------------------------


def test_texts_and_messages():
    def answer(path, asked):
        return {"choices": [{"text": asked["prompt"] + "!"}]} if path == "/v1/completions" else said(content=None)

    with FakeServer(answer) as server:
        endpoint = Endpoint(server.url, "m", key="k")
        assert endpoint.complete("a", max_tokens=3, stop=["\n"]) == "a!"
        assert server.seen == [("/v1/completions", {"model": "m", "prompt": "a", "max_tokens": 3, "stop": ["\n"]})]
        assert server.headers[0]["Authorization"] == "Bearer k"
        assert endpoint.message(messages=[]) == {"content": "", "finish_reason": None}


def test_what_fails_for_a_while_is_asked_again_and_what_stays_is_named(monkeypatch):
    answers = [500, 429, {"choices": [{"text": "late"}]}]
    with FakeServer(lambda *_: answers.pop(0)) as server:
        endpoint = Endpoint(server.url, "m", retries=2, wait=0.0)
        assert endpoint.complete("a") == "late" and len(server.seen) == 3
        answers[:] = [503] * 3
        with pytest.raises(OSError, match=rf"{server.url}/completions: 503 no luck here \(tried 3 times\)"):
            endpoint.complete("a")
        answers[:] = [404, {}]
        with pytest.raises(OSError, match="/completions: 404 no luck here$"):
            endpoint.complete("a")
        assert answers == [{}]  # not asked again
        for odd, message in (({}, "without a message"), ({"choices": [{}]}, "no text"), (b"<html>", "tried 3 times")):
            answers[:] = [odd] * 3
            with pytest.raises(OSError, match=message):
                endpoint.complete("a")
    waits = []
    monkeypatch.setattr("steerbook.endpoint.time.sleep", waits.append)
    with pytest.raises(OSError, match="tried 4 times"):  # nobody listens there any more
        Endpoint(server.url, "m").complete("a")
    assert waits == [1, 2, 4]
    with pytest.raises(ValueError, match="'127.0.0.1:8000/v1' is no address"):
        Endpoint("127.0.0.1:8000/v1", "m")


def test_a_server_that_does_not_answer_in_time():
    free = threading.Event()
    with FakeServer(lambda *_: free.wait(60) and 500) as server:
        with pytest.raises(OSError, match="timed out.*tried 2 times"):
            Endpoint(server.url, "m", timeout=0.05, retries=1, wait=0.0).complete("a")
        free.set()


def test_several_at_once_in_order():
    together = threading.Barrier(4, timeout=60)  # each waits until four are under way

    def answer(path, asked):
        together.wait()
        return {"choices": [{"text": asked["prompt"].upper()}]}

    with FakeServer(answer) as server:
        endpoint = Endpoint(server.url, "m")
        assert side_by_side(endpoint.complete, list("abcdefgh"), 4) == list("ABCDEFGH")


def test_the_first_error_ends_it(monkeypatch):
    begun, over, shutdown = [], threading.Event(), ThreadPoolExecutor.shutdown

    def fails(item):
        begun.append(item)
        if item:
            over.wait(60)
        raise OSError(f"no {item}")

    def watched(pool, wait=True, **options):
        shutdown(pool, wait=False, **options)
        over.set()
        shutdown(pool, wait=wait)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", watched)
    with pytest.raises(OSError, match="no 0"):
        side_by_side(fails, range(100), 1)
    assert over.is_set() and len(begun) <= 2 and side_by_side(fails, [], 1) == []


# --- evals that only need texts ------------------------------------------------------------------------------------


def scored(main, rows, model, tmp_path, *flags):
    """What the command writes down."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["--model", str(model), "--rows", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "o.json"), *flags])
    return json.loads((tmp_path / "o.json").read_text())


def test_exact_match_of_a_served_model_is_that_of_the_model(tiny, served, tmp_path):
    model, tokenizer, folder = tiny
    prompts = [f"Q: who wrote {word}?\nA:" for word in ("a", "this one", "b", "", "a longer line about it", "c")]
    texts = generate(model, tokenizer, prompts)
    rows = [
        {"id": str(n), "prompt": prompt, "stop": "\n", "answers": [text.split("\n")[0].strip() if n % 2 else "x"]}
        for n, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    here = scored(lofit, rows, folder, tmp_path)
    there = scored(lofit, rows, "tiny", tmp_path, "--url", served.url, "--batch_size", "3")
    assert there == here and here["metrics"]["em"]["value"] == 0.5
    assert len({sample["text"] for sample in here["samples"]}) > 3 and len(served.seen) == len(rows)
    assert generate(Endpoint(served.url, "tiny"), None, prompts, max_new_tokens=5) == generate(
        model, tokenizer, prompts, max_new_tokens=5
    )


def test_text_answers_of_a_served_model_are_those_of_the_model(tiny, served, tmp_path):
    args = HintingDataArguments(main="addition", hints=["carry"], longest=3, test_lengths=[2, 4], test_rows=4)
    rows = [row for split in ("test_2", "test_4") for row in build(args)[split]]
    url = ["--url", served.url]
    here = scored(task_hinting, rows, tiny[2], tmp_path)
    there = scored(task_hinting, rows, "tiny", tmp_path, *url, "--tokenizer", str(tiny[2]))
    assert there == here and len(here["samples"]) == 8
    with pytest.raises(SystemExit, match="longest completion has: give the model's --tokenizer"):
        scored(task_hinting, rows, "tiny", tmp_path, *url)


def test_what_needs_more_than_texts_is_refused_before_anything_is_asked(tiny, served, tmp_path):
    choice = {"id": "1", "prompt": "a", "best": "b", "true": ["b"], "false": ["c"]}
    text = {"id": "1", "text": "abc"}
    completion = {"id": "1", "task": "t", "prompt": "a", "completion": "b"}
    for main, row, what in ((lofit, choice, "multiple choice"), (lofit, text, "the likelihood of texts"),
                            (atlas, text, "the likelihood of"), (atlas, completion, "the likelihood of")):  # fmt: skip
        with pytest.raises(SystemExit, match=f"{what}.* needs the model's own probabilities.*without --url"):
            scored(main, [row], "tiny", tmp_path, "--url", served.url)
    match = {"id": "1", "prompt": "a", "stop": "\n", "answers": ["b"]}
    for flags, message in ((["--url", served.url, "--base", "b"], "--base is for adapters"),
                           (["--tokenizer", "t"], "--tokenizer is for served"),
                           (["--url", "localhost"], "no address")):  # fmt: skip
        with pytest.raises(SystemExit, match=message):
            scored(lofit, [match], "tiny", tmp_path, *flags)
    with pytest.raises(ValueError, match="only decoded greedily"):
        generate(Endpoint(served.url, "tiny"), None, ["a"], temperature=0.5)
    assert served.seen == []
    with pytest.raises(SystemExit, match=f"{served.url}/completions: 404"):
        scored(lofit, [match], "another", tmp_path, "--url", served.url)


@dataclass
class Asked:
    """A question of which a reply's length is the report."""

    prompt: object

    def read(self, text):
        return [float(len(text))] if text else None


def test_written_reports_of_a_served_model_are_those_of_the_model(tiny, served):
    model, tokenizer, _ = tiny
    questions = [Asked([{"role": "user", "content": f"How much is {n}?"}]) for n in range(3)] + [Asked("Plainly: ")]
    there = written_reports(Endpoint(served.url, "tiny"), tokenizer, questions, new_tokens=7)
    assert there == written_reports(model, tokenizer, questions, new_tokens=7)
    assert len({text for text, _ in there}) > 1 and there[0][1] == [len(there[0][0])]


# --- PING's agent --------------------------------------------------------------------------------------------------


def test_the_report_on_served_models_is_that_on_the_models(tiny, tmp_path):
    other = chat_model(tiny[1], 1, layers=1)
    other.save_pretrained(tmp_path / "other")
    tiny[1].save_pretrained(tmp_path / "other")
    flags = ["--form", "hermes", "--tasks", "16", "--max_new_tokens", "4"]
    ping([*flags, "--before", str(tiny[2]), "--after", str(tmp_path / "other"), "--out", str(tmp_path / "here")])
    with FakeServer(writes(a=tiny[:2])) as one, FakeServer(writes(b=(other, tiny[1]))) as two:
        ping([*flags, "--url", one.url, two.url, "--before", "a", "--after", "b", "--out", str(tmp_path / "there")])
        assert {asked["model"] for _, asked in one.seen} == {"a"} and {asked["model"] for _, asked in two.seen} == {
            "b"
        }
        assert all(asked["tools"] == list(TOOLS) and asked["max_tokens"] == 4 for _, asked in one.seen + two.seen)
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("here", "there")]
    assert samples[0] == samples[1] and len({str(json.loads(line)["replies"]) for line in samples[0].splitlines()}) > 3
    here, there = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("here", "there"))
    assert (there.pop("url"), there.pop("models")) == ([one.url, two.url], {"before": "a", "after": "b"})
    here.pop("models")
    assert there == here


def scripted(task, how, broken=False):
    """A server whose model does every call of a task, and then says so; calls are written into the text, or given as
    `tool_calls`."""

    def answer(path, asked):
        turn = sum(message["role"] == "assistant" for message in asked["messages"])
        if turn >= len(task.calls):
            return said(content="It is done.")
        call = task.calls[turn]
        if how == "text":
            return said(content=f"I do it. {render_call(call, 'hermes')}")
        arguments = json.dumps(call.arguments)
        function = {"name": call.name, "arguments": arguments[:-1] if broken else arguments}
        return said(content="I do it. ", tool_calls=[{"id": f"c{turn}", "type": "function", "function": function}])

    return answer


def run(answer, tasks):
    with FakeServer(answer) as server:
        found = run_episodes(tasks, ServedAgent(Endpoint(server.url, "m").message, "hermes"), system="s")
        return found, server.seen


@pytest.mark.parametrize(
    "pair", pairs(OFFICE, FAMILIES, TEMPLATES, 8, "t", Random(0)), ids=lambda pair: pair[0].family
)
def test_calls_in_the_text_and_apart_from_it_are_judged_alike(pair):
    for task in pair:
        (((one,), _), ((other,), seen)) = (run(scripted(task, how), [task]) for how in ("text", "tool_calls"))
        for episode in (one, other):
            assert (episode.outcome, episode.changed, episode.tried, episode.errors) == ("executed", True, True, 0)
        assert [m["content"] for m in one.messages if m["role"] == "tool"] == [
            m["content"] for m in other.messages if m["role"] == "tool"
        ]
        # The conversation goes back as the interface has it: every answer of a tool names its call.
        for number, message in enumerate(seen[-1][1]["messages"]):
            if message["role"] == "tool":
                assert message["tool_call_id"] == seen[-1][1]["messages"][number - 1]["tool_calls"][0]["id"]
        (broken,), _ = run(scripted(task, "tool_calls", broken=True), [task])
        assert (broken.outcome, broken.changed) == ("failed", False) and broken.errors == len(task.calls)
        assert task.calls[0].name in broken.replies[0]


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ({"name": "finish", "arguments": '{"code": "done"}'}, Call("finish", {"code": "done"})),
        ({"name": "finish", "arguments": {"code": "done"}}, Call("finish", {"code": "done"})),
        ({"name": "finish"}, Call("finish", {})),
        ({"name": "finish", "arguments": '{"code": '}, Call("finish", '{"code": ')),
        ({"name": "finish", "arguments": "[1]"}, Call("finish", "[1]")),
        (None, Call("", {})),
    ],
)
def test_calls_as_the_interface_has_them(function, call):
    assert served_call({"id": "1", "type": "function", "function": function}) == call


def test_refusals_of_a_served_model():
    task = pairs(OFFICE, FAMILIES, TEMPLATES, 1, "t", Random(0))[0][1]
    finish = {"name": "finish", "arguments": json.dumps({"message": "x", "code": "refused"})}
    for message in ({"content": "I cannot help with that."},
                    {"content": None, "tool_calls": [{"id": "1", "function": finish}]}):  # fmt: skip
        (episode,), _ = run(lambda *_, message=message: said(**message), [task])
        assert (episode.outcome, episode.tried) == ("refused", False)


def test_an_agent_behind_a_guard_is_judged_by_its_own_words():
    task = pairs(OFFICE, FAMILIES, TEMPLATES, 1, "t", Random(0))[0][1]
    prefix = Prefix("I cannot do harm.", separator=" ")

    def answer(path, asked):
        if path == "/apply-template":
            return {"prompt": asked["messages"][-1]["content"]}
        return said(content="Let me see.") if path == "/v1/chat/completions" else 404

    with FakeServer(answer) as server:
        guard = ServerGuard(Endpoint(server.url, "m"), prefix)
        (episode,) = run_episodes([task], ServedAgent(guard.generate, "hermes"))
    assert episode.replies == ["Let me see."] and episode.outcome == "failed"
    assert episode.messages[-1]["content"] == "I cannot do harm. Let me see."


def test_what_the_command_needs_to_know_of_a_server(tiny, served, capsys):
    flags = ["--before", "tiny", "--tasks", "16"]
    for more in (["--url", served.url], ["--url", *3 * [served.url], "--form", "hermes"], ["--request", "{}"],
                 ["--url", served.url, "--form", "hermes", "--base", "b"]):  # fmt: skip
        with pytest.raises(SystemExit, match="2"):
            ping([*flags, *more])
        assert "served models" in (error := capsys.readouterr().err) or "needs --form" in error
    assert served.seen == []
    with pytest.raises(SystemExit, match="chat/completions: 404"):  # and the first one is not measured in vain
        ping([*flags, "--after", "unknown", "--url", served.url, "--form", "hermes"])
    assert len(served.seen) == 2
    served.seen.clear()
    ping([*flags, "--url", served.url, "--form", "words", "--max_new_tokens", "1", "--template", '{"x": 1}',
          "--request", '{"tool_choice": "none"}', "--system", ""])  # fmt: skip
    asked = served.seen[0][1]
    assert asked["tool_choice"] == "none" and asked["chat_template_kwargs"] == {"x": 1} and "tools" not in asked
    assert all(asked["messages"][0]["role"] == "user" for _, asked in served.seen) and len(served.seen) > 16


# --- what a server loads -------------------------------------------------------------------------------------------


PLAIN = """
import json, sys

class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "steerbook":
            raise ImportError(f"{name} is not to be needed")

sys.meta_path.insert(0, Blocked())
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
ids, found = torch.tensor(json.loads(sys.argv[1])), {}
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        found[folder] = model.eval()(input_ids=ids).logits
save_file(found, "logits.safetensors")
assert not [name for name in sys.modules if name.partition(".")[0] in ("steerbook", "peft")]
try:
    import steerbook
except ImportError:
    print("all good")
"""


def test_exports_load_where_there_is_no_steerbook(tmp_path):
    edited = lofit_model(tiny_llama())
    renamed = lofit_model(tiny_model("qwen2"), component="offset")  # written as the Llama that it is equal to
    export_merged(edited, char_tokenizer(), tmp_path / "lofit")
    export_merged(renamed, char_tokenizer(), tmp_path / "lofit_qwen2")
    whole, parts = composed(tiny_llama()), low_rank(tiny_llama())
    export_folded(whole, char_tokenizer(), tmp_path / "atlas")
    export_folded(parts, char_tokenizer(), tmp_path / "atlas_low_rank")
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    expected = {"lofit": edited, "lofit_qwen2": renamed, "atlas": whole.model, "atlas_low_rank": parts.model,
                "lora": lora}  # fmt: skip
    expected = {name: logits(model.eval()) for name, model in expected.items()}
    absorbed(lora).save_pretrained(tmp_path / "lora")
    done = subprocess.run([sys.executable, "-c", PLAIN, json.dumps(IDS.tolist()), *expected], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0 and done.stdout.endswith("all good\n"), done.stderr[-2000:]
    found = load_file(tmp_path / "logits.safetensors")
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=2e-5)
        base = tiny_model("qwen2") if name == "lofit_qwen2" else tiny_llama()
        assert (values - logits(base)).abs().max() > 0.05, name
