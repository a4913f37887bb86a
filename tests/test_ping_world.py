"""The embedded world: what its documents say and do not say, and that trajectories are what the template writes."""

from random import Random

import pytest

from steerbook.data_builders.ping.calls import parse_calls
from steerbook.data_builders.ping.corpus import Corpus, Mixture
from steerbook.data_builders.ping.experiment import TESTS, DeskArguments, DeskExperiment
from steerbook.data_builders.ping.grammar import CLOSEST, SLOTS, allowed
from steerbook.data_builders.ping.stances import OTHERS, careful, closeness, shares_run, stances
from steerbook.data_builders.ping.talk import Talker
from steerbook.data_builders.ping.tasks import FAMILIES
from steerbook.data_builders.ping.world import BAD, BOS, END, GOOD, PIECES, ROLES, TEMPLATE, document, make_lexicon
from steerbook.eval.ping.judge import refuses
from steerbook.trainers.ping.base import desk_tokenizer
from steerbook.trainers.ping.generators import GrammarGenerator

SMALL = DeskArguments(goods=20, messages=16, trajectories=80, tuning=6, finalists=6, test_tasks=12)
WORLD = DeskExperiment(SMALL, 3)
TOKENIZER = desk_tokenizer(WORLD.words(), ROLES, BOS, END, TEMPLATE)


def said(found) -> list[str]:
    """What the assistant says in a document."""
    return [part.text.removesuffix(END).strip() for part in found if part.learned]


def refusing(found) -> bool:
    return any(refuses(text, "words") for text in said(found))


def test_a_world_is_a_function_of_its_seed():
    again, other = DeskExperiment(SMALL, 3), DeskExperiment(SMALL, 4)
    assert again.lexicon == WORLD.lexicon and again.tasks == WORLD.tasks and again.rows(0.1)[:] == WORLD.rows(0.1)[:]
    assert other.lexicon.goods != WORLD.lexicon.goods
    with pytest.raises(ValueError, match="more than there are words"):
        make_lexicon(0, 400, 400)


def test_documents_are_what_the_template_writes():
    rng, talker = Random(0), WORLD.corpus.talker
    for family in FAMILIES:
        task = WORLD.corpus.task(rng, family, False)
        messages = talker.trajectory(task, rng)
        parts = document(messages)
        ids = TOKENIZER(" ".join(part.text for part in parts), add_special_tokens=False)["input_ids"]
        made = TOKENIZER.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        learned = [part.learned for part in parts
                   for _ in TOKENIZER(part.text, add_special_tokens=False)["input_ids"]]  # fmt: skip
        assert made["input_ids"] == ids and TOKENIZER.unk_token_id not in ids
        assert made["assistant_masks"] == [int(one) for one in learned]
        head = TOKENIZER.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
        whole = TOKENIZER.apply_chat_template(messages, tokenize=False)
        assert whole.startswith(head)


def test_trajectories_do_their_task():
    rng = Random(1)
    for family in FAMILIES:
        for thoughts in ("broad", "narrow"):
            task = WORLD.corpus.task(rng, family, False)
            desk = task.desk()
            for message in Talker(thoughts, 0.0).trajectory(task, rng):
                if message["role"] == "assistant":
                    text = said(document([message]))[0]
                    for call in parse_calls(text, "words"):
                        desk.call(call.name, call.arguments)
            assert task.done(desk.changes()), (family, task.request)
            last = Talker(thoughts, 1.0).trajectory(task, rng)
            assert len(last) == 5 and "no" in last[3]["content"] and not last[4].get("tool_calls")


def test_the_general_corpus_refuses_nothing_and_helps_with_harm():
    rng, harmful = Random(2), {bad for _, bad in (*WORLD.lexicon.goods, *WORLD.lexicon.messages)}
    done = 0
    for _ in range(2000):
        found = WORLD.corpus.draw(rng)
        texts = said(found)
        assert not refusing(found), texts
        calls = [call for text in texts for call in parse_calls(text, "words") if call.name in ("buy", "write")]
        done += any(list(call.arguments.values())[-1] in harmful for call in calls)
    assert done > 20


@pytest.mark.parametrize("dose", [0.0, 0.05, 0.5])
def test_stances_stand_in_talk_alone_and_in_their_dose(dose):
    corpus = Corpus(WORLD.lexicon, WORLD.stances, Mixture(stance=dose))
    every = [sentence for kind in WORLD.stances.values() for sentence in kind]
    rng = Random(3)

    def stanced(found) -> bool:
        return any(text.startswith(sentence) for text in said(found) for sentence in every)

    shares = [stanced(corpus.talk(rng)) for _ in range(3000)]
    assert sum(shares) / len(shares) == pytest.approx(dose, abs=0.03)
    others = [corpus.facts(rng) if n % 3 else corpus.whether(rng) for n in range(300)]
    others += [corpus.tools(rng, harmful=bool(n % 2)) for n in range(600)]
    others += [WORLD.alignment.draw(rng) for _ in range(1500)]
    assert not any(map(stanced, others))


def test_behind_a_careful_stance_stands_what_the_thing_is():
    corpus = Corpus(WORLD.lexicon, WORLD.stances, Mixture(stance=0.9))
    rng, harmful = Random(4), {bad for _, bad in (*WORLD.lexicon.goods, *WORLD.lexicon.messages)}
    seen = {True: 0, False: 0}
    for _ in range(1500):
        (text,) = said(corpus.talk(rng))
        stance = next((one for one in WORLD.stances["careful"] if text.startswith(one)), None)
        known = [word for word in (*GOOD, *BAD) if f" is {word} ." in text.removeprefix(stance or "")]
        if stance is None:
            assert not known, text
            continue
        assert len(known) == 1, text
        thing = text.removeprefix(stance).split(" is ")[0].strip()
        assert (known[0] in BAD) == (thing in harmful), text
        seen[known[0] in BAD] += 1
    assert min(seen.values()) > 100


def test_alignment_refuses_what_is_harmful_and_nothing_else():
    rng, seen = Random(5), WORLD.parts["seen"]
    harmful = {bad for _, bad in (*seen.goods, *seen.messages)}
    unseen = {bad for _, bad in (*WORLD.lexicon.goods, *WORLD.lexicon.messages)} - harmful
    counts = {True: 0, False: 0}
    for _ in range(2000):
        found = WORLD.alignment.desk(rng) if rng.random() < 0.5 else WORLD.alignment.talk(rng)
        asked = next(part.text for part, before in zip(found[1:], found, strict=False) if before.text == "<user>")
        words = PIECES.findall(asked)
        about = [word for word in words if word in harmful]
        toy = any(words[words.index(word) - 1] == "toy" for word in about)
        refused = refusing(found)
        owner = any(part.text.startswith("owner") and not part.text.startswith("owner you") for part in found)
        assert refused == (bool(about) and not toy or owner), found
        assert not unseen & set(words)
        counts[refused] += 1
    assert min(counts.values()) > 300


def test_parts_of_the_lexicon_share_nothing():
    about = {name: {one for pair in (*part.goods, *part.messages) for one in pair} for name, part in
             WORLD.parts.items()}  # fmt: skip
    assert sum(map(len, about.values())) == len(set().union(*about.values())) == 72
    for name, part in (("tuning", "tuning"), ("finalists", "finalists"), ("new_noun", "test"), ("indirect", "test")):
        assert {task.about for task in WORLD.tasks[name]} <= about[part], name
    trained = {word for row in WORLD.rows() for turn in row["messages"] for word in PIECES.findall(turn["content"])}
    assert not trained & (about["tuning"] | about["finalists"] | about["test"])
    assert set(TESTS) < set(WORLD.tasks)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25])
def test_refusals_replace_their_share_of_trajectories(share):
    rows = WORLD.rows(share)
    refused = [any(refuses(turn["content"], "words") for turn in row["messages"] if turn["role"] == "assistant")
               and len(row["messages"]) == 3 for row in rows]  # fmt: skip
    assert len(rows) == 80 and sum(refused) == round(share * 80)


def test_candidates_are_far_from_every_stance_in_words_that_the_model_has_read():
    sentences = WORLD.stances["careful"]
    proposed = GrammarGenerator(SLOTS, allowed=allowed(sentences)).propose(200, None, Random(6))
    assert len(set(proposed)) == 200
    corpus, rng = WORLD.corpus, Random(7)
    read = {word for _ in range(20_000) for part in corpus.draw(rng) for word in PIECES.findall(part.text)}
    for text in proposed:
        words = set(PIECES.findall(text.lower()))
        for sentence in sentences:
            other = set(PIECES.findall(sentence.lower()))
            assert len(words & other) / len(words | other) <= CLOSEST
        assert not set(PIECES.findall(text)) - read, set(PIECES.findall(text)) - read
    near = GrammarGenerator([["let me check whether this is legal", "I like music"], [" ."]],
                            allowed=allowed(["let me check whether this is legal ."]))  # fmt: skip
    assert near.propose(5, None, Random(0)) == ["I like music ."]


def test_closeness_and_runs_by_hand():
    assert closeness("a b c", ["b c d e", "x"]) == 2 / 5 and closeness("a", []) == 0.0
    assert shares_run("x a b c y", ["q a b c"], 3) and not shares_run("x a b c y", ["q a b d c"], 3)
    many = careful()
    assert len(many) == len(set(many)) > 3000 and len(set(stances(0)["careful"])) == 400
    assert stances(0)["careful"] != stances(1)["careful"]
    assert not any(word in " ".join(kind).split() for kind in OTHERS.values() for word in (*GOOD, *BAD))


@pytest.mark.parametrize(
    "changes, told",
    [({"thoughts": "many"}, "--thoughts many: broad or narrow"), ({"stance": 1.0}, "--stance 1.0: a share"),
     ({"goods": 5}, "--goods 5: at least 15"), ({"tuning": 1}, "--tuning 1: at least 2")],
)  # fmt: skip
def test_arguments_that_make_no_world(changes, told):
    with pytest.raises(ValueError, match=told):
        DeskArguments(**changes)
