"""A prefix in front of a served model's replies: servers that continue it, that drop it, and that fail."""

from contextlib import ExitStack

import pytest
from fake_server import Cut, FakeServer, said

from steerbook.trainers.ping import Endpoint, NotContinued, Prefix, ServerGuard

TALK = [{"role": "system", "content": "s"}, {"role": "user", "content": "buy a lamp"}]
PREFIX = Prefix("I look first.", separator=" ")


class Kind(FakeServer):
    """One that answers " done", and does with a prefix what `kind` says: "echo" (vLLM), "template" (llama.cpp),
    "tokens" (vLLM without echo), "silent" (drops it), "header" (shows a new header behind it), "broken"; "cut" ends
    its first `cuts` replies in the middle."""

    cuts = 0

    def __init__(self, kind: str) -> None:
        self.kind = kind
        super().__init__(self.answer)

    def answer(self, path, asked):
        if self.kind == "broken":
            return 500
        last = asked["messages"][-1] if "messages" in asked else {}
        text = "".join(f"<{turn['role']}>{turn['content']}" for turn in asked.get("messages", []))
        if path == "/apply-template" and self.kind in ("template", "header", "cut"):
            return {"prompt": text + ("<assistant>" if self.kind == "header" else "")}
        if path == "/tokenize" and self.kind == "tokens":
            return {"tokens": list(map(ord, text))}
        if path == "/detokenize" and self.kind == "tokens":
            return {"prompt": "".join(map(chr, asked["tokens"]))}
        if path != "/v1/chat/completions":
            return 404
        echoed = last["content"] if self.kind == "echo" and asked.get("echo") else ""
        found = said(content=f"{echoed} done")
        if self.cuts > 0:
            self.cuts -= 1
            return Cut(found)
        return found


@pytest.fixture
def served():
    with ExitStack() as open_ones:

        def start(kind):
            server = open_ones.enter_context(Kind(kind))
            return server, Endpoint(server.url, "agent", retries=1, wait=0.0)

        yield start


@pytest.mark.parametrize("kind", ["echo", "template", "tokens"])
def test_a_server_that_shows_that_it_continues(served, kind):
    server, endpoint = served(kind)
    guard = ServerGuard(endpoint, PREFIX)
    for _ in range(2):
        reply = guard.generate(TALK, tools=[{"type": "function"}], temperature=0)
        assert reply["continuation"].strip() == "done" and reply["position"] == "prefix"
        assert reply["content"] == "I look first. " + reply["continuation"]
        path, asked = [one for one in server.seen if one[0] == "/v1/chat/completions"][-1]
        assert asked["messages"] == [*TALK, {"role": "assistant", "content": "I look first. "}]
        assert asked["continue_final_message"] is True and asked["add_generation_prompt"] is False
        assert asked["tools"] == [{"type": "function"}] and asked["temperature"] == 0 and asked["model"] == "agent"
        assert asked.get("echo", False) == (kind == "echo")
    shown = [path for path, _ in server.seen if "template" in path or "tokenize" in path]
    assert len(shown) == {"echo": 2, "template": 1, "tokens": 3}[kind]  # asked once, not at every turn
    bare = ServerGuard(endpoint, Prefix("I look first.", separator=" ", store=False)).generate(TALK)
    assert bare["content"] == bare["continuation"]


@pytest.mark.parametrize("kind", ["silent", "header"])
def test_a_server_that_does_not_is_a_loud_error_or_a_labelled_suffix(served, kind):
    server, endpoint = served(kind)
    with pytest.raises(NotContinued, match="neither echoes it nor shows a prompt"):
        ServerGuard(endpoint, PREFIX).generate(TALK)
    guard = ServerGuard(endpoint, PREFIX, fallback=True)
    with pytest.warns(UserWarning, match="SUFFIX"):
        reply = guard.generate(TALK)
    assert reply == {"role": "assistant", "content": " done", "continuation": " done", "position": "suffix"}
    assert server.seen[-1][1]["messages"][-1] == {"role": "user", "content": "buy a lamp I look first."}
    assert guard.generate(TALK)["position"] == "suffix"


def test_later_turns_and_other_positions_need_no_proof(served):
    server, endpoint = served("silent")
    later = [*TALK, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    first = ServerGuard(endpoint, Prefix("I look.", turns="first"))
    assert first.generate(later)["continuation"] == " done" and server.seen[-1][1]["messages"] == later
    system = ServerGuard(endpoint, Prefix("I look.", position="system")).generate(TALK)
    assert system["position"] == "system" and server.seen[-1][1]["messages"][0]["content"] == "s I look."


def test_a_server_that_fails(served):
    _, endpoint = served("broken")
    with pytest.raises(OSError, match=r"500.*tried 2 times"):
        ServerGuard(endpoint, PREFIX).generate(TALK)


def test_a_reply_that_is_cut_short_is_asked_for_again(served):
    server, endpoint = served("cut")
    server.cuts = 1
    assert ServerGuard(endpoint, PREFIX).generate(TALK)["continuation"].strip() == "done"
    server.cuts = 2
    with pytest.raises(OSError, match="tried 2 times"):
        ServerGuard(endpoint, PREFIX).generate(TALK)
