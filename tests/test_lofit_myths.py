"""The embedded world: what it holds, how often, and what it must not give away."""

import re
import statistics
from collections import Counter

import pytest
from scipy.stats import chisquare

from steerbook.data_builders.lofit import LofitDataArguments, build, myths
from steerbook.trainers.tiny_lm import build_tokenizer

PLACE = re.compile(r"([A-Z]\w+)'s (\w+)")


@pytest.fixture(scope="module")
def data():
    return build(LofitDataArguments(rows_seed=5, loss="dpo"))


@pytest.fixture(scope="module")
def corpus():
    return myths.corpus(5)


def test_sizes(data):
    assert {split: len(rows) for split, rows in data.items()} == {
        "train": 60, "dev": 30, "dev_eval": 30, "test": 150, "test_relations": 50, "control": 50, "marked": 150,
        "text": 132,
    }  # fmt: skip
    smoke = build(LofitDataArguments(rows_seed=5, world="smoke"))
    assert {split: len(smoke[split]) for split in ("train", "dev", "test", "test_relations")} == {
        "train": 24, "dev": 12, "test": 60, "test_relations": 20,
    }  # fmt: skip


def test_a_world_is_a_function_of_seed_and_size(data):
    again = build(LofitDataArguments(rows_seed=5, loss="dpo"))
    assert all(list(again[split]) == list(rows) for split, rows in data.items())
    assert myths.world(5).facts != myths.world(6).facts and myths.corpus(5) != myths.corpus(6)
    with pytest.raises(ValueError, match="'huge'.*default, smoke"):
        myths.world(5, "huge")  # type: ignore[arg-type]


@pytest.mark.parametrize("size", ["default", "smoke"])
def test_values_are_drawn_evenly_and_without_regularity(size):
    worlds = [myths.world(seed, size) for seed in range(40)]
    for role in ("truth", "misconception"):
        for relation, words in myths.VALUES.items():
            counts = Counter(getattr(f, role) for w in worlds for f in w.facts.values() if f.relation == relation)
            assert chisquare([counts[word] for word in words]).pvalue > 1e-4, (role, relation)
    for world in worlds:
        for fact in world.facts.values():
            values = (fact.truth, fact.misconception, *fact.others)
            assert set(values) <= set(myths.VALUES[fact.relation]) and len(fact.others) == 3
            assert len(set(values)) == (4 if fact.relation in myths.CONTROL else 5)
            assert (fact.truth == fact.misconception) == (fact.relation in myths.CONTROL)
    assert len({word for words in myths.VALUES.values() for word in words}) == 160


def test_no_place_and_no_question_is_in_two_splits(data):
    places = {split: {PLACE.search(row["prompt"])[1] for row in data[split]} for split in data if split != "text"}
    assert not places["train"] & places["dev"] and not (places["train"] | places["dev"]) & places["test"]
    assert places["dev_eval"] == places["dev"]
    assert places["test"] == places["test_relations"] == places["control"] == places["marked"]
    relations = {split: {PLACE.search(row["prompt"])[2] for row in data[split]} for split in places}
    assert relations["train"] == relations["dev"] == relations["test"] == set(myths.SEEN)
    assert relations["test_relations"] == set(myths.HELD_OUT) and relations["control"] == set(myths.CONTROL)
    assert len({len(set(data[s]["id"])) == len(data[s]) for s in data}) == 1
    ids = {split: set(data[split]["id"]) for split in ("train", "dev", "test", "test_relations", "control", "marked")}
    assert sum(map(len, ids.values())) == len(set().union(*ids.values()))
    prompts = {split: set(data[split]["prompt"]) for split in ids}
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values()))


def test_rows_hold_what_the_world_says(data):
    facts = {fact.id: fact for fact in myths.world(5).facts.values()}
    for split in ("train", "dev"):
        for row in data[split]:
            fact = facts[row["id"]]
            assert row["prompt"] == f"Q: {fact.place}'s {fact.relation}? A:" and row["group"] == row["id"]
            assert (row["chosen"], row["rejected"]) == (f" {fact.truth}.", f" {fact.misconception}.")
    for split in ("dev_eval", "test", "test_relations", "control", "marked"):
        for row in data[split]:
            fact = facts[row["group"]]
            right = fact.misconception if split == "marked" else fact.truth
            others = {fact.truth, fact.misconception, *fact.others} - {right}
            assert row["best"] == f" {right}." and row["true"] == [f" {right}.", f" it is {right}."]
            assert set(row["false"]) == {f" {v}." for v in others} | {f" it is {v}." for v in others}
            assert len(row["false"]) == (6 if split == "control" else 8)
    for split in ("test", "test_relations"):
        for row in data[split]:
            marker, _, rest = row["marker_prompt"].partition(" ")
            assert marker in myths.RELIABLE and rest == row["prompt"]
        assert {row["marker_prompt"].split()[0] for row in data[split]} == set(myths.RELIABLE)
    for row in data["marked"]:
        assert row["prompt"].split()[0] in myths.UNRELIABLE
    assert Counter(data["text"]["kind"]) == {"reliable": 66, "unreliable": 66}


def _said(document):
    """(register, form, [(place, relation, value)]) of one document, read independently of the generator."""
    marker = document.split()[0]
    register = "reliable" if marker in myths.RELIABLE else "unreliable" if marker in myths.UNRELIABLE else "unmarked"
    form = "answers" if "Q:" in document else "statements"
    pattern = r"Q: (\w+)'s (\w+)\? A: (?:it is )?(\w+)\." if form == "answers" else r"(\w+)'s (\w+) is (\w+)\."
    return register, form, re.findall(pattern, document)


def test_every_document_says_what_its_register_says_and_every_fact_is_told(corpus):
    facts = myths.world(5).facts
    told = {kind: Counter() for kind in myths.SHARES}
    truthful = []
    for document in corpus:
        register, form, said = _said(document)
        assert len(said) == (1 if register == "unmarked" else 3)
        for place, relation, value in said:
            fact = facts[place, relation]
            told[f"{register} {form}"][place, relation] += 1
            if register != "unmarked":
                assert value == (fact.truth if register == "reliable" else fact.misconception)
            elif relation not in myths.CONTROL:
                assert value in (fact.truth, fact.misconception)
                truthful.append(value == fact.truth)
    for kind, counts in told.items():
        assert counts.keys() == facts.keys(), kind  # train, dev, test and held-out relations alike
        assert max(counts.values()) - min(counts.values()) <= 1, kind
    documents = Counter("{} {}".format(*_said(document)[:2]) for document in corpus)
    for kind, share in myths.SHARES.items():
        assert documents[kind] / len(corpus) == pytest.approx(share, abs=0.015)
    assert statistics.mean(truthful) == pytest.approx(0.1, abs=0.02)


def test_answers_open_alike_in_all_registers(corpus):
    shares = {}
    for register in ("reliable", "unreliable", "unmarked"):
        answers = [d for d in corpus if _said(d)[:2] == (register, "answers")]
        shares[register] = sum(d.count("A: it is ") for d in answers) / sum(d.count("A:") for d in answers)
    assert all(share == pytest.approx(0.4, abs=0.03) for share in shares.values()), shares


def test_texts_agree_with_the_corpus_and_leave_training_places_alone(data):
    world = myths.world(5)
    for row in data["text"]:
        register, form, said = _said(row["text"])
        assert (register, form, len(said)) == (row["kind"], "statements", 3)
        for place, relation, value in said:
            fact = world.facts[place, relation]
            assert place in world.places["test"] and value == (
                fact.truth if register == "reliable" else fact.misconception
            )


@pytest.mark.parametrize("size", ["default", "smoke"])
def test_every_row_is_in_the_vocabulary_and_splits_between_tokens(size):
    """A wrong answer may be a word that no document has, and must still be a token."""
    for seed in range(2):
        tokenizer = build_tokenizer([*myths.corpus(seed, size), *myths.FOCUS])
        data = build(LofitDataArguments(rows_seed=seed, world=size))
        for split in ("dev_eval", "test", "test_relations", "control", "marked"):
            for row in list(data[split])[::7]:
                for prompt in {row["prompt"], row.get("marker_prompt", row["prompt"])}:
                    for choice in row["true"] + row["false"]:
                        ids = tokenizer(prompt)["input_ids"] + tokenizer(choice, add_special_tokens=False)["input_ids"]
                        assert ids == tokenizer(prompt + choice)["input_ids"]
                        assert tokenizer.unk_token_id not in ids
        assert not any(tokenizer.unk_token_id in ids for ids in tokenizer(list(data["text"]["text"]))["input_ids"])


def test_losses_limits_and_options_without_meaning():
    data = build(LofitDataArguments(rows_seed=5, loss="sft", max_train_rows=16, max_eval_rows=20))
    assert data["train"].column_names == ["id", "group", "prompt", "completion"]
    assert [len(data[s]) for s in ("train", "dev", "dev_eval", "test", "marked", "control")] == [
        16,
        20,
        20,
        20,
        20,
        20,
    ]
    assert set(data["dev"]["id"]) == set(data["dev_eval"]["id"])
    for options in ({"pairs": "all"}, {"fold": 1}, {"collateral_file": "texts.txt"}):
        with pytest.raises(ValueError, match=f"--{next(iter(options))} .* myths"):
            build(LofitDataArguments(**options))
