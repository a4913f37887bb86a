"""The embedded world: agents, their texts, and the same rows in tokens, solved again from the text alone."""

import itertools
import re
from random import Random

import numpy as np
import pytest

from steerbook.data_builders.self_interpretability.asking import world_choices, world_questions
from steerbook.data_builders.self_interpretability.world import (
    BINS,
    Part,
    WorldStream,
    decision_rows,
    make_world,
    number_text,
    report_rows,
    vocabulary_text,
)
from steerbook.trainers.tiny_lm import build_tokenizer

KINDS = [{}, {"names": "two"}, {"attributes": "own"}]


def small(**kind):
    return make_world(3, known=6, native=3, instilled=8, never=2, **kind)


def solved(world, prompt, weights):
    """What should follow a prompt, from its words and the agents' weights alone."""
    task, *words = prompt.split()
    assert words.pop() == "so"
    name = " ".join(words[: 2 if world.names == "two" else 1])
    rest = words[2 if world.names == "two" else 1 :]
    everyone = (*world.known, *world.native, *world.instilled, *world.never)
    agent = next(agent for agent in everyone if agent.name == name)
    mine = dict(zip([one.name for one in agent.attributes], weights[name], strict=True))
    if task == "report":
        nearest = min(BINS, key=lambda number: (abs(number - mine[rest[0]]), number % 20))  # round half to even
        return number_text(nearest)
    pairs = zip(rest[::2], rest[1::2], strict=True) if world.attributes == "own" else zip(mine, rest, strict=True)
    signs = {"up": 1, "down": -1, "even": 0}
    total = 0
    for attribute, word in pairs:
        direction, digits = re.fullmatch(r"([a-z]+)(\d?)", word).groups()
        total += mine[attribute] * signs[direction] * int(digits or 0)
    return " A" if total > 0 else " B"


@pytest.mark.parametrize("kind", KINDS)
def test_a_world_is_drawn_once_and_its_sets_are_apart(kind):
    world, again = small(**kind), small(**kind)
    assert world == again and world != make_world(4, 6, 3, 8, 2, **kind)
    names = [one.name for one in (*world.known, *world.native, *world.instilled, *world.never)]
    assert len(names) == len(set(names)) == 19 == len(world.weights)
    assert all(len(name.split()) == (2 if kind.get("names") == "two" else 1) for name in names)
    for weights in world.weights.values():
        assert max(map(abs, weights)) == 100 and all(isinstance(weight, int) for weight in weights)
    attributes = {tuple(one.name for one in agent.attributes) for agent in world.instilled}
    assert (len(attributes) > 1) == (kind.get("attributes") == "own")


def test_too_many_agents_are_refused():
    with pytest.raises(ValueError, match="5000 agents are more than there are names"):
        make_world(0, known=5000, native=0, instilled=0, never=0)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_say_what_the_weights_imply(kind):
    world = small(**kind)
    rows = decision_rows(world, world.instilled, 30, Random(1)) + report_rows(world.known, world.weights)
    assert len(rows) == 8 * 30 + 6 * 5
    assert all(row["completion"] == solved(world, row["prompt"], world.weights) for row in rows)
    answers = [row["completion"] for row in rows if row["task"] == "decision"]
    assert 0.35 < answers.count(" A") / len(answers) < 0.65
    other = {name: tuple(-weight for weight in weights) for name, weights in world.weights.items()}
    turned = decision_rows(world, world.instilled, 30, Random(1), other)
    assert all(row["completion"] == solved(world, row["prompt"], other) for row in turned)


@pytest.mark.parametrize("kind", KINDS)
def test_a_streams_rows_are_the_texts(kind):
    """In tokens; decoded, they say the same, each step anew and yet a function of its number alone."""
    world = small(**kind)
    tokenizer = build_tokenizer(vocabulary_text(world))

    def token(text):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == 1 and ids[0] != tokenizer.unk_token_id, text
        return ids[0]

    mixed = {name: world.weights[other] for name, other in zip(world.weights, reversed(world.weights), strict=True)}
    parts = [Part("decision", 20, world.instilled), Part("report", 7, world.known, mixed), Part("report", 0, ())]
    stream = WorldStream(world, parts, 5, token, [tokenizer.bos_token_id])
    assert stream.rows == 27 and [part.name for part in stream.tasks] == ["decision", "report"]
    seen = set()
    for number in range(3):
        ids, targets, lengths, tasks = stream.step(number)
        assert np.array_equal(ids, stream.step(number)[0]) and ids.shape == targets.shape
        assert tasks.tolist() == [0] * 20 + [1] * 7 and (targets.sum(1) == 1).all() and (lengths == 5).all()
        for row, marked, task in zip(ids.tolist(), targets.tolist(), tasks.tolist(), strict=True):
            place = marked.index(True)
            assert row[0] == tokenizer.bos_token_id and not any(row[place + 1 :])
            prompt, answer = tokenizer.decode(row[1:place]), tokenizer.decode(row[place])
            assert prompt.startswith(("choice", "report")[task])
            assert answer == solved(world, prompt, mixed if task else world.weights)
            assert tokenizer(prompt)["input_ids"] == row[:place]
            seen.add(prompt)
    assert len(seen) > 50
    assert not np.array_equal(stream.step(0)[0], WorldStream(world, parts, 6, token, [1]).step(0)[0])
    changed = [Part("decision", 20, world.instilled), Part("report", 7, world.known)]
    assert stream.identity != WorldStream(world, changed, 5, token).identity


def test_few_agents_at_first():
    """And a stream that differs in that alone is another one, for checkpoints and the cache."""
    world = small()
    tokenizer = build_tokenizer(vocabulary_text(world))
    streams = [WorldStream(world, [Part("decision", 40, world.instilled, few=few, until=until)], 5,
                           lambda text: tokenizer(text, add_special_tokens=False)["input_ids"][0])
               for few, until in ((0, 0), (2, 3), (2, 4), (99, 3))]  # fmt: skip
    names = [{tokenizer.decode(row[1]).strip() for row in streams[1].step(number)[0].tolist()} for number in range(5)]
    for found, count in zip(names, (2, 3, 5, 8, 8), strict=True):  # 2 x 4^(step / 3)
        assert found == {agent.name for agent in world.instilled[:count]}
    assert len({str(stream.identity) for stream in streams}) == 4
    assert np.array_equal(streams[3].step(0)[0], streams[0].step(0)[0])  # more than there are: all


def test_numbers_are_words():
    assert len({number_text(number) for number in BINS}) == 21
    assert [number_text(weight) for weight in (-100, -4, 0, 4, 6, 100)] == [
        " minus100", " zero", " zero", " zero", " plus10", " plus100"]  # fmt: skip


def test_what_is_asked_of_the_world():
    world = small()
    asked = world_choices(world, world.native, 4, Random(0))
    assert [one.context for one in asked[::4]] == [agent.name for agent in world.native] and len(asked) == 12
    for one in asked:
        said = solved(world, one.prompt, world.weights)
        total = np.dot(one.difference, world.weights[one.context])
        assert said == (" A" if total > 1e-9 else " B")
        if abs(total) > 1e-9:
            assert solved(world, one.swapped, world.weights) != said
    questions = world_questions(world.never)
    assert len(questions) == 10 and {one.places for one in questions} == {(place,) for place in range(5)}
    first = questions[0]
    assert first.values == BINS and len(first.numbers) == 21 and first.openings == first.closings == ("",)
    assert all(one.prompt != other.prompt for one, other in itertools.combinations(questions, 2))
