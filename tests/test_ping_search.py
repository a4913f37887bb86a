"""The search by the paper's rules, against a brute-force agent; what stops it and goes on; generators and a server."""

import json
import math
from random import Random
from types import SimpleNamespace

import pytest
import torch
from chat_models import chat_model, chat_tokenizer
from fake_server import FakeServer, said

from steerbook.data_builders.ping.office import OFFICE
from steerbook.data_builders.ping.splits import task_sets
from steerbook.eval.ping.agent import ModelAgent
from steerbook.eval.ping.scoring import PrefixScorer
from steerbook.trainers.ping import (
    EndpointGenerator,
    GrammarGenerator,
    ModelGenerator,
    Prefix,
    PrefixSearch,
    Scored,
    SearchError,
    Seeds,
)
from steerbook.trainers.ping.generators import SLOTS, read, request

BENIGN = [SimpleNamespace(id=f"b{n}") for n in range(4)]
HARMFUL = [SimpleNamespace(id=f"h{n}") for n in range(4)]


class Lettered:
    """Does a harmless task for every "a" in a prefix, refuses a harmful one for every "b"."""

    key = "lettered"

    def __init__(self, dies_after=None):
        self.asked, self.left = [], dies_after

    def score(self, prefixes, tasks, *, harmful):
        if self.left is not None and not harmful:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        self.asked += [(text, harmful) for text in prefixes]
        letter = "b" if harmful else "a"
        return [[float(place < text.count(letter)) for place in range(len(tasks))] for text in prefixes]


class Listed:
    """Proposes what it was given, round by round; remembers what it was shown."""

    def __init__(self, rounds):
        self.rounds, self.shown = iter(rounds), []

    def propose(self, count, seeds, rng):
        self.shown.append(seeds)
        found = next(self.rounds)
        if isinstance(found, Exception):
            raise found
        return found


def test_seeds_are_three_lists_and_none_below_the_threshold():
    generator = Listed([["a", "b"], ["aaab", "abbb", "ab"], ["aabb", "aaaa", "aaab"], ["bbbb"], ["x"]])
    search = PrefixSearch(generator, Lettered(), BENIGN, HARMFUL, rounds=5, seeds=2, threshold=1.0)
    best = search.run()
    assert (best.text, best.overall, best.round) == ("aaab", 1.0, 2)  # of three with 1.0 the first
    assert generator.shown[:2] == [None, None]  # 0.25 is the best of the first round
    third = generator.shown[2]
    assert [one.text for one in third.overall] == ["aaab", "abbb"]
    assert [one.text for one in third.performance] == ["aaab", "a"]  # of equals the first
    assert [one.text for one in third.refusal] == ["abbb", "b"]
    fourth = generator.shown[3]
    assert [one.text for one in fourth.performance] == ["aaaa", "aaab"]
    assert [one.text for one in search.pool] == ["a", "b", "aaab", "abbb", "ab", "aabb", "aaaa", "bbbb", "x"]
    assert best == Scored("aaab", 0.75, 0.25, 2)


def test_behind_an_infinite_threshold_nothing_is_ever_shown():
    generator, agent = Listed([["a", "b"], ["aaaabbbb", "b"], ["ab"]]), Lettered()
    search = PrefixSearch(generator, agent, BENIGN, HARMFUL, rounds=3, threshold=math.inf)
    assert search.run().text == "aaaabbbb" and generator.shown == [None] * 3
    assert [one.text for one in search.pool] == ["a", "b", "aaaabbbb", "ab"]
    assert agent.asked == [(text, harmful) for harmful in (False, True) for text in ("a", "b", "aaaabbbb", "ab")]


def test_nothing_is_scored_twice_and_at_most_as_many_as_asked():
    agent = Lettered()
    search = PrefixSearch(Listed([["a", " a ", "", "b", "c", "d"], ["a", "b", "e"]]), agent, BENIGN, HARMFUL,
                          candidates=3, rounds=2)  # fmt: skip
    search.run()
    assert [text for text, harmful in agent.asked if harmful] == ["a", "b", "c", "e"]
    started = PrefixSearch(Listed([["aabb"]]), Lettered(), BENIGN, HARMFUL, rounds=1, start=["aaabbb"])
    assert started.run().text == "aaabbb" and started.generator.shown[0].overall[0].text == "aaabbb"


def test_finalists_are_scored_anew_on_other_tasks():
    search = PrefixSearch(Listed([["aab", "abb", "b"]]), Lettered(), BENIGN, HARMFUL, rounds=1)
    search.run()
    fresh = search.finalists(BENIGN[:1], HARMFUL[:2], count=2)
    assert fresh == [Scored("abb", 1.0, 1.0, 1), Scored("aab", 1.0, 0.5, 1)]
    assert search.best.text == "aab"


@pytest.mark.parametrize("cut", [0, 7])
def test_a_killed_search_goes_on(tmp_path, cut):
    """It proposes and scores what it would have, and asks for nothing twice, even if its last line was cut."""

    def grammar():
        return GrammarGenerator([["a", "ab", "b"], ["", "a", "bb"], ["b", "aa"]])

    whole = PrefixSearch(grammar(), Lettered(), BENIGN, HARMFUL, rounds=8, threshold=0.5)
    whole.run()
    log = tmp_path / "search.jsonl"
    first = Lettered(dies_after=4)
    with pytest.raises(KeyboardInterrupt):
        PrefixSearch(grammar(), first, BENIGN, HARMFUL, rounds=8, threshold=0.5, log=log).run()
    if cut:
        log.write_bytes(log.read_bytes()[:-cut])
    second = Lettered()
    search = PrefixSearch(grammar(), second, BENIGN, HARMFUL, rounds=8, threshold=0.5, log=log)
    assert search.run() == whole.best and search.pool == whole.pool
    twice = {text for text, _ in first.asked} & {text for text, _ in second.asked}
    assert len(twice) <= (1 if cut else 0)
    again = Lettered()
    PrefixSearch(grammar(), again, BENIGN, HARMFUL, rounds=8, threshold=0.5, log=log).run()
    assert again.asked == []
    with pytest.raises(ValueError, match="holds another search"):
        PrefixSearch(grammar(), Lettered(), BENIGN[:2], HARMFUL, rounds=8, threshold=0.5, log=log)


def test_a_generator_that_fails_stops_the_search_with_all_scores_kept(tmp_path):
    log = tmp_path / "s.jsonl"
    rounds = [["a"], OSError("no route"), ["", "  "], OSError("no route")]
    with pytest.raises(
        SearchError, match=r"round 2, tried 3 times: no route. 1 prefixes have been scored; they are in"
    ):
        PrefixSearch(Listed(rounds), Lettered(), BENIGN, HARMFUL, rounds=3, log=log).run()
    assert json.loads(log.read_text().splitlines()[-1])["text"] == "a"
    later = PrefixSearch(Listed([["b"], ["c"]]), Lettered(), BENIGN, HARMFUL, rounds=3, log=log)
    assert later.run().text == "a" and len(later.pool) == 3
    recovered = PrefixSearch(Listed([OSError("x"), ["a"]]), Lettered(), BENIGN, HARMFUL, rounds=1)
    assert recovered.run().text == "a"
    with pytest.raises(SearchError, match="nothing usable"):
        PrefixSearch(Listed([["x" * 30]] * 3), Lettered(), BENIGN, HARMFUL, rounds=1, longest=20).run()


def test_the_same_search_goes_on_after_an_error(tmp_path):
    log = tmp_path / "s.jsonl"
    generator = Listed([["aabb"], *[OSError("x")] * 3, ["c"], ["d"]])
    search = PrefixSearch(generator, Lettered(), BENIGN, HARMFUL, rounds=3, log=log)
    with pytest.raises(SearchError):
        search.run()
    assert search.run().text == "aabb"
    again = PrefixSearch(Listed([]), Lettered(), BENIGN, HARMFUL, rounds=3, log=log)
    assert again.run().text == "aabb" and again.pool == search.pool


def test_other_tasks_of_the_same_names_are_another_search(tmp_path):
    one, other = (task_sets(OFFICE, {"tuning": 4}, seed)["tuning"] for seed in (0, 1))
    assert [task.id for task in one] == [task.id for task in other]
    PrefixSearch(Listed([["a"]]), Lettered(), one[::2], one[1::2], rounds=1, log=tmp_path / "s").run()
    with pytest.raises(ValueError, match="holds another search"):
        PrefixSearch(Listed([["a"]]), Lettered(), other[::2], other[1::2], rounds=1, log=tmp_path / "s")


def test_searches_that_cannot_be():
    with pytest.raises(ValueError, match="4 harmless and 0 harmful"):
        PrefixSearch(Listed([]), Lettered(), BENIGN, [])
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        PrefixSearch(Listed([]), Lettered(), BENIGN, HARMFUL, rounds=0)


def test_the_grammar_crosses_what_it_is_shown():
    generator = GrammarGenerator(mutation=0.0)
    drawn = generator.propose(50, None, Random(0))
    assert len(drawn) == len(set(drawn)) == 50 and drawn == generator.propose(50, None, Random(0))
    one, other = (generator._cut(text) for text in drawn[:2])
    assert "".join(one).strip() == drawn[0]
    seeds = Seeds([Scored(drawn[0], 1.0, 0.5)], [Scored(drawn[1], 1.0, 0.0)], [Scored("not of this grammar", 0, 1)])
    crossed = generator.propose(6, seeds, Random(1))
    for text in crossed:
        assert all(part in pair for part, pair in zip(generator._cut(text), zip(one, other, strict=True), strict=True))
    mutated = GrammarGenerator(mutation=1.0).propose(20, seeds, Random(1))
    assert len({generator._cut(text)[1] for text in mutated}) > 2
    assert len(GrammarGenerator([["a", "b"]]).propose(5, None, Random(0))) == 2  # it has no more
    assert len(SLOTS) == 5


def test_what_a_model_is_asked_for_and_how_it_is_read():
    scored = Scored("# I help, and refuse harm.", 0.9, 0.5)
    text = request(5, Seeds([scored], [Scored("fast", 1.0, 0.0)], [Scored("no", 0.0, 1.0)]))
    assert "Write 5" in text and "(overall 1.4000, performance 0.9000, refusal 0.5000)" in text
    assert "(overall 1.0000, performance 1.0000, refusal 0.0000)" in text and "Best" not in request(5, None)
    assert read("Sure!\nPREFIX: one\n  PREFIX:  two \nPREFIX:\nthree") == ["one", "two", ""]


@pytest.fixture
def server():
    """One that answers with the next of `answers`: a text, a status, or anything else."""
    answers = []

    def answer(path, asked):
        found = answers.pop(0)
        return said(content=found) if isinstance(found, str) else found

    with FakeServer(answer) as made:
        yield SimpleNamespace(url=made.url, answers=answers, made=made)


@pytest.mark.parametrize("failures", [[], [500, 503], [429]])
def test_a_server_is_asked_again_when_it_fails(server, monkeypatch, failures):
    monkeypatch.setenv("MY_KEY", "secret")
    server.answers += [*failures, "PREFIX: a\nPREFIX: b"]
    generator = EndpointGenerator(server.url, "some-model", key_variable="MY_KEY", wait=0.0)
    assert generator.propose(2, None, Random(0)) == ["a", "b"]
    (path, asked), headers = server.made.seen[-1], server.made.headers[-1]
    assert len(server.made.seen) == len(failures) + 1 and path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret" and asked["temperature"] == 0.7 and asked["max_tokens"] == 2000
    assert asked["model"] == "some-model" and len(asked["messages"]) == 1


def test_what_a_server_may_do_wrong(server):
    generator = EndpointGenerator(server.url, "m", retries=1, wait=0.0)
    for answers, message in (([500, 500], "500.*tried 2 times"), ([401], "401"), ([{"odd": 1}], "without a message"),
                             ([{"choices": [{"message": {"content": [1]}}]}], "with no text")):  # fmt: skip
        server.answers[:] = answers
        with pytest.raises(OSError, match=message):
            generator.propose(2, None, Random(0))
    server.answers[:] = ["PREFIX: ab", *[500] * 6]
    with pytest.raises(SearchError, match=r"round 2, tried 3 times: .*500.*1 prefixes have been scored"):
        PrefixSearch(generator, Lettered(), BENIGN, HARMFUL, rounds=3).run()


def test_scores_of_a_real_agent_and_a_model_as_generator(monkeypatch):
    tokenizer = chat_tokenizer()
    model = chat_model(tokenizer, layers=1)
    tasks = task_sets(OFFICE, {"tuning": 3})["tuning"]
    benign, harmful = ([task for task in tasks if task.harmful == kind] for kind in (False, True))
    agent = ModelAgent(model, tokenizer, "words", tools=None, max_new_tokens=6)
    scorer = PrefixScorer(agent, Prefix, "f", by="first_turn")
    assert PrefixScorer(agent, Prefix, "g").key != scorer.key != PrefixScorer(agent, Prefix, "f", by="episodes").key
    written = {"good": {False: "call buy x", True: "I cannot help."}, "bad": {False: "I cannot.", True: "call buy x"},
               "odd": {False: "ok", True: "I cannot help. call buy x"}}  # fmt: skip

    def scripted(model, tokenizer, prompts, openings, **options):
        names = {task.request: task.harmful for task in tasks}
        return [[written[opening.strip()][next(kind for text, kind in names.items() if text in prompt)]
                 for prompt in prompts] for opening in openings]  # fmt: skip

    with monkeypatch.context() as patch:
        patch.setattr("steerbook.eval.ping.agent.continuations", scripted)
        assert scorer.score(["good", "bad", "odd"], benign, harmful=False) == [[1.0] * 3, [0.0] * 3, [0.0] * 3]
        assert scorer.score(["good", "bad", "odd"], harmful, harmful=True) == [[1.0] * 3, [0.0] * 3, [0.0] * 3]
    whole = PrefixScorer(agent, Prefix, "f", by="episodes").score(["x"], benign, harmful=False)
    assert whole == [[0.0] * 3]  # a model that was not trained does nothing
    state = torch.random.get_rng_state()
    monkeypatch.setattr("steerbook.trainers.ping.generators.NEW_TOKENS", 8)
    assert ModelGenerator(model, tokenizer).propose(3, None, Random(0)) == []  # nor does it write a tag
    assert torch.equal(state, torch.random.get_rng_state())
