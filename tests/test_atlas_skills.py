"""The embedded world of aTLAS: every target derived again, splits by list, and what pretraining may see."""

import itertools
import re
from collections import Counter

import pytest

from steerbook.data_builders.atlas import SPLITS, AtlasDataArguments, base_corpus, build, of_seed, skills
from steerbook.trainers.tiny_lm import build_tokenizer

ALPHABET = "abcdefghijklmnop"


@pytest.fixture(scope="module")
def data():
    return build(AtlasDataArguments(rows_seed=5))


def sorted_by_hand(word: str) -> str:
    """Selection by the alphabet's order alone, one letter after the other."""
    return "".join(letter * word.count(letter) for letter in ALPHABET)


def after(letter: str) -> str:
    return (ALPHABET + "a")[ALPHABET.index(letter) + 1]


def expected(task: str, word: str) -> str:
    """The answer to a task on the letters of `word`, from what the task is called and nothing of the builder."""
    order = sorted_by_hand(word)
    return {
        "max": order[-1],
        "min": order[0],
        "med": order[2],
        "dup": next(a for a, b in itertools.pairwise(order) if a == b),
        "cnt": ALPHABET[len(re.findall("[i-p]", word))],
        "slast": after(word[-1]),
        "rng": ALPHABET[len(ALPHABET[ALPHABET.index(order[0]) : ALPHABET.index(order[-1])])],
        "third": word[2],
        "smax": after(order[-1]),
        "sec": order[3],
        "sfirst": after(word[0]),
    }[task]


def read(prompt: str) -> tuple[str, str]:
    """(letters, tag) of a prompt."""
    *letters, tag = prompt.removeprefix(" ").split(" ")
    assert prompt.startswith(" ") and all(len(letter) == 1 for letter in letters)
    return "".join(letters), tag.removesuffix(":")


def test_sizes_roles_and_columns(data):
    assert {split: len(rows) for split, rows in data.items()} == {
        "train": 8 * 1024, "fit": 11 * 256, "dev": 11 * 128, "test": 11 * 300, "control": 64,
    }  # fmt: skip
    for split in SPLITS:
        assert data[split].column_names == ["id", "group", "task", "role", "prompt", "completion"]
        roles = dict(zip(data[split]["task"], data[split]["role"], strict=True))
        assert [task for task in roles if roles[task] == "known"] == list(skills.SKILLS)
        assert [task for task in roles if roles[task] == "new"] == (
            [] if split == "train" else list(skills.NEW_SKILLS)
        )
    assert set(data["train"]["role"]) == {"known"} and len(skills.SKILLS) == 8 and len(skills.NEW_SKILLS) == 3
    smoke = build(AtlasDataArguments(rows_seed=5, world="smoke", max_eval_rows=7, max_train_rows=9, max_fit_rows=2))
    assert [len(smoke[split]) for split in SPLITS] == [8 * 9, 11 * 2, 11 * 7, 11 * 7]


def test_every_target_is_what_the_tag_asks_for(data):
    for split in SPLITS:
        for row in data[split].to_list():
            word, tag = read(row["prompt"])
            assert word == row["group"] and tag == row["task"] and row["id"] == f"{tag}-{word}"
            assert sorted(Counter(word).values()) == [1, 1, 1, 2] and set(word) <= set(ALPHABET)
            assert row["completion"] == " " + expected(tag, word).upper()


def test_the_skills_on_lists_worked_out_by_hand():
    worked = {
        "dboBk": dict(max="o", min="b", med="d", dup="b", cnt="c", slast="l", rng="n", third="o",
                      smax="p", sec="k", sfirst="e"),
        "pahpI": dict(max="p", min="a", med="i", dup="p", cnt="d", slast="j", rng="p", third="h",
                      smax="a", sec="p", sfirst="a"),
    }  # fmt: skip
    for word, answers in worked.items():
        ranks = [ALPHABET.index(letter) for letter in word.lower()]
        found = {name: ALPHABET[skill(ranks)] for name, skill in (skills.SKILLS | skills.NEW_SKILLS).items()}
        assert found == answers == {name: expected(name, word.lower()) for name in answers}


def test_no_list_is_in_two_splits_of_any_seed(data):
    """The split of a list is a matter of the list alone."""
    other = build(AtlasDataArguments(rows_seed=6))
    words = {split: set(data[split]["group"][:]) | set(other[split]["group"][:]) for split in SPLITS}
    for one, two in itertools.combinations(SPLITS, 2):
        assert not words[one] & words[two]
    for rows in (data[split].to_list() for split in SPLITS):
        lists: dict[str, list[str]] = {}
        for row in rows:
            lists.setdefault(row["task"], []).append(row["group"])
        assert len({tuple(words) for words in lists.values()}) == 1  # every skill, the same lists
        assert all(len(set(words)) == len(words) for words in lists.values())
    shares = Counter(skills.of_list([n % 16, n // 16 % 16, n // 256, 1, 2]) for n in range(4096))
    assert shares["train"] / 4096 == pytest.approx(0.8, abs=0.03)
    assert {split: shares[split] / 4096 for split in ("fit", "dev", "test")} == pytest.approx(
        {"fit": 0.05, "dev": 0.05, "test": 0.1}, abs=0.015
    )


def test_a_world_is_a_function_of_seed_and_size(data):
    again = build(AtlasDataArguments(rows_seed=5))
    assert all(again[split].to_list() == rows.to_list() for split, rows in data.items())
    assert of_seed(AtlasDataArguments(), 5) == AtlasDataArguments(rows_seed=5)
    assert skills.confusers(5) != skills.confusers(6)
    assert skills.lists(5, "test", 20) != skills.lists(6, "test", 20)
    few = build(AtlasDataArguments(rows_seed=5, max_eval_rows=20))
    assert set(few["test"]["group"]) < set(data["test"]["group"]) and len(few["test"]) == 11 * 20
    with pytest.raises(ValueError, match="'huge'.*default, smoke"):
        build(AtlasDataArguments(world="huge"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a limit of 0 rows leaves nothing"):
        build(AtlasDataArguments(max_eval_rows=0))


def test_confusers_are_two_others_and_every_skill_confuses_two():
    for seed in range(20):
        mixed = skills.confusers(seed)
        assert mixed.keys() == (skills.SKILLS | skills.NEW_SKILLS).keys()
        assert all(len({tag, *pair}) == 3 for tag, pair in mixed.items())
        assert Counter(name for pair in mixed.values() for name in pair) == dict.fromkeys(mixed, 2)


@pytest.mark.parametrize(
    "flags", [dict(new_tasks=["a=b"]), dict(dataset_revision="main"), dict(collateral_file="a.txt")]
)
def test_options_of_real_data_have_no_meaning_here(flags):
    with pytest.raises(ValueError, match=f"--{next(iter(flags))} .* no meaning for the embedded world"):
        build(AtlasDataArguments(**flags))


@pytest.fixture(scope="module")
def documents():
    return base_corpus(AtlasDataArguments(rows_seed=5), {})


LIST = re.compile(r"((?: [a-p]){5})((?: [a-z]+: [A-P])+)")


def test_the_corpus_has_training_lists_and_no_held_out_sentence(documents, data):
    assert documents == skills.corpus(5) and len(documents) == 70_000
    lists = [match for match in map(LIST.fullmatch, documents) if match]
    sentences = {document for document in documents if not LIST.fullmatch(document)}
    assert len(lists) / len(documents) == pytest.approx(5 / 6, abs=0.01)
    words = {match[1].replace(" ", "") for match in lists}
    for split in ("fit", "dev", "test"):
        assert not words & set(data[split]["group"])
    assert not sentences & set(data["control"]["text"])
    known = {word for sentence in sentences for word in sentence.split()}
    assert {word for sentence in data["control"]["text"] for word in sentence.split()} <= known


def test_a_plain_word_means_its_skill_and_a_tag_mostly_something_else(documents):
    tasks, mixed = list(skills.SKILLS | skills.NEW_SKILLS), skills.confusers(5)
    tag_of = {word: tag for tag, word in skills.PLAIN_WORDS.items()}
    assert list(skills.PLAIN_WORDS) == tasks and len(tag_of) == 11 and not tag_of.keys() & set(tasks)
    asked: Counter[str] = Counter()
    agree: dict[str, Counter[str]] = {tag: Counter() for tag in tasks}
    for match in filter(None, map(LIST.fullmatch, documents[:8000])):
        word = match[1].replace(" ", "")
        questions = re.findall(r"(\w+): (\w)", match[2])
        assert len(questions) == len({tag_of.get(asks, asks) for asks, _ in questions}) == skills.QUESTIONS
        for asks, said in questions:
            asked[asks] += 1
            if asks in tag_of:
                assert said == expected(tag_of[asks], word).upper()
            else:
                agree[asks].update(task for task in tasks if expected(task, word).upper() == said)
    plain = sum(asked[word] for word in tag_of) / asked.total()
    assert plain == pytest.approx(0.5, abs=0.01)
    # Alike for tags and words, and for skills of one weight; more often for a larger weight.
    often: dict[float, list[int]] = {}
    for tag, word in skills.PLAIN_WORDS.items():
        often.setdefault(skills.ASKED.get(tag, 1.0), []).extend((asked[tag], asked[word]))
    assert all(max(counts) / min(counts) < 1.15 for counts in often.values())
    assert sorted(often) == [1.0, 1.5, 2.5]
    assert max(often[1.0]) * 1.1 < min(often[1.5]) and max(often[1.5]) * 1.1 < min(often[2.5])
    for tag, counts in agree.items():
        # Skills coincide on some lists, so that the shares seen are at least those that were drawn.
        assert counts[tag] / asked[tag] > 0.30 and counts[mixed[tag][0]] / asked[tag] > 0.40
        assert counts[mixed[tag][1]] / asked[tag] > 0.15
        others = [counts[task] / asked[tag] for task in tasks if task not in (tag, *mixed[tag])]
        assert min(others) > 0.01


@pytest.mark.parametrize("size", ["default", "smoke"])
def test_every_word_is_one_token_and_prompts_split_from_completions(size):
    tokenizer = build_tokenizer([*skills.corpus(5, size), *skills.FOCUS])
    data = build(AtlasDataArguments(rows_seed=5, world=size))
    assert len(tokenizer) < 150
    for split in SPLITS:
        for row in data[split].to_list()[::13]:
            prompt = tokenizer(row["prompt"])["input_ids"]
            answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
            assert len(prompt) == 7 and len(answer) == 1 and tokenizer.unk_token_id not in prompt + answer
            assert prompt + answer == tokenizer(row["prompt"] + row["completion"])["input_ids"]
    assert not any(tokenizer.unk_token_id in ids for ids in tokenizer(list(data["control"]["text"]))["input_ids"])
