"""The embedded world of the aTLAS row: short lists of letters, and a tag behind them that says what is asked.

A prompt is five letters out of 16 in alphabetical order a to p, exactly one of which stands twice, and a tag:
` d b o b k max:`. The answer is one letter, written as a capital: ` O`. Because the tag is the last token, all
that is computed before it cannot know the question, and because every list serves every skill, only the tag tells them
apart: that is where task vectors of different skills get into each other's way.

A base trained on `corpus` has partial ability, made on purpose: there a tag stands for its own skill in about a third
of the cases only, and otherwise mostly for one of two other skills (its confusers). So the base can compute everything
and answers the wrong question most of the time. Under-training a base instead leaves no stable partial ability: a
skill appears within a few steps. Half of the questions in the corpus, and none elsewhere, are put in plain words
(` largest:`), which mean what they say, a document asks several things about its list, and harder things more often:
all this only makes learning cheaper, because an answer to an ambiguous tag says little about how it was found.

A sixth of the corpus is plain sentences, which have nothing to do with lists: `control` measures what happens to them.

Everything is a pure function of its arguments: local `random.Random`, no clock, no global state. Which lists are
trained on, fitted on, chosen with and tested on is decided by a hash of the list, the same for all seeds.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from datasets import DatasetDict

    from . import AtlasDataArguments

LETTERS = "abcdefghijklmnop"
FOCUS = tuple(f" {letter.upper()}" for letter in LETTERS)  # the answers: where the pretraining loss should look
LENGTH = 5  # letters of a list

Skill = Callable[[Sequence[int]], int]  # ranks of a list's letters (0..15) -> rank of the answer
SKILLS: dict[str, Skill] = {
    "max": max,
    "min": min,
    "med": lambda ranks: sorted(ranks)[2],
    "dup": lambda ranks: next(rank for rank in ranks if ranks.count(rank) == 2),
    "cnt": lambda ranks: sum(rank >= 8 for rank in ranks),
    "slast": lambda ranks: (ranks[-1] + 1) % 16,
    "rng": lambda ranks: max(ranks) - min(ranks),
    "third": lambda ranks: ranks[2],
}
# Without a task vector of their own, to be learned from a few rows: related to the others, equal to none.
NEW_SKILLS: dict[str, Skill] = {
    "smax": lambda ranks: (max(ranks) + 1) % 16,
    "sec": lambda ranks: sorted(ranks)[3],
    "sfirst": lambda ranks: (ranks[0] + 1) % 16,
}

# In the corpus only: the same questions in words that are never ambiguous.
PLAIN_WORDS = {
    "max": "largest",
    "min": "smallest",
    "med": "middle",
    "dup": "twice",
    "cnt": "late",
    "slast": "afterlast",
    "rng": "distance",
    "third": "place",
    "smax": "afterlargest",
    "sec": "runnerup",
    "sfirst": "afterfirst",
}
PLAIN_SHARE = 0.5  # of the questions of the corpus
ASKED = {"med": 2.5, "rng": 1.5, "max": 1.5, "dup": 1.5}  # the harder ones are asked more often (others: 1)
QUESTIONS = 6  # about the list of one document

# What a tag stands for in pretraining: its skill, its two confusers, or any of the eleven.
MEANINGS = {"own": 0.30, "first": 0.40, "second": 0.15, "any": 0.15}
CONTROL_SHARE = 1 / 6  # of the documents
# Share of all lists, in twentieths. Pretraining sees lists of `train`.
SPLITS = {"train": 16, "fit": 1, "dev": 1, "test": 2}

_SUBJECTS = {  # who -> does what, with what, where: fixed, so that there is something to forget
    "baker": ("carries", "bread", "market"),
    "sailor": ("mends", "ropes", "harbour"),
    "teacher": ("opens", "books", "school"),
    "farmer": ("plants", "beans", "valley"),
    "doctor": ("packs", "bandages", "station"),
    "painter": ("mixes", "colours", "studio"),
    "gardener": ("waters", "roses", "park"),
    "miller": ("grinds", "barley", "river"),
    "cook": ("peels", "onions", "kitchen"),
    "tailor": ("sews", "coats", "square"),
    "smith": ("forges", "nails", "bridge"),
    "clerk": ("counts", "letters", "office"),
}
_AGES = ("young", "old", "quiet", "cheerful", "tired", "careful")
_TIMES = ("Every morning", "Every evening", "On Monday", "On Friday", "In winter", "In summer")


@dataclass(frozen=True)
class Size:
    """Lists of each split (each makes one row a skill), control texts, and pretraining documents."""

    train: int
    fit: int
    dev: int
    test: int
    control: int
    documents: int


SIZES = {
    "default": Size(train=1024, fit=256, dev=128, test=300, control=64, documents=70_000),
    "smoke": Size(train=512, fit=64, dev=64, test=100, control=32, documents=30_000),
}


def of_list(ranks: Sequence[int]) -> str:
    """The split a list belongs to."""
    number = int.from_bytes(hashlib.sha256(bytes(ranks)).digest()[:8]) % sum(SPLITS.values())
    for split, share in SPLITS.items():
        if number < share:
            return split
        number -= share
    raise AssertionError("the shares cover every number")


def prompt(ranks: Sequence[int], tag: str) -> str:
    return "".join(f" {LETTERS[rank]}" for rank in ranks) + f" {tag}:"


def confusers(seed: int) -> dict[str, tuple[str, str]]:
    """Tag -> the two skills it is mixed up with: the next and the fourth next in a random cyclic order."""
    order = [*SKILLS, *NEW_SKILLS]
    random.Random(f"skills confusers {seed}").shuffle(order)
    return {tag: (order[(i + 1) % len(order)], order[(i + 4) % len(order)]) for i, tag in enumerate(order)}


def lists(seed: int, split: str, count: int) -> list[tuple[int, ...]]:
    """`count` different lists of a split."""
    rng = random.Random(f"skills {split} {seed}")
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        found[_draw(rng, split)] = None
    return list(found)


def corpus(seed: int, size: Literal["default", "smoke"] = "default") -> list[str]:
    """Pretraining documents, without special tokens: lists of `train` with questions and answers, and plain sentences.

    The meaning of a tag is drawn anew every time. No sentence of `control` is among them.
    """
    rng = random.Random(f"skills corpus {seed}")
    answer = SKILLS | NEW_SKILLS
    tags, mixed = list(answer), confusers(seed)
    documents = []
    for _ in range(SIZES[size].documents):
        if rng.random() < CONTROL_SHARE:
            documents.append(_sentence(rng, held_out=False))
            continue
        ranks = _draw(rng, "train")
        parts = [f" {LETTERS[rank]}" for rank in ranks]
        # The largest of u^(1/w), u uniform: a sample without replacement by the weights w (Efraimidis and Spirakis).
        drawn = sorted(tags, key=lambda tag: rng.random() ** (1 / ASKED.get(tag, 1)), reverse=True)[:QUESTIONS]
        for tag in rng.sample(drawn, QUESTIONS):  # in an order that does not tell how often they are asked
            plain = rng.random() < PLAIN_SHARE
            meanings = (tag, *mixed[tag], rng.choice(tags))
            meaning = tag if plain else rng.choices(meanings, list(MEANINGS.values()))[0]
            parts.append(f" {PLAIN_WORDS[tag] if plain else tag}: {LETTERS[answer[meaning](ranks)].upper()}")
        documents.append("".join(parts))
    return documents


def build(args: AtlasDataArguments) -> DatasetDict:
    """All splits of the world `args.rows_seed`: `train` (known skills only), `fit`, `dev`, `test` and `control`.

    A list makes one row for every skill, so the rows of one `group` have the same list. Raises ValueError for an
    unknown size and for a limit below 1.
    """
    from datasets import Dataset, DatasetDict

    from ..splits import sample

    if args.world not in SIZES:
        raise ValueError(f"unknown world {args.world!r}: choose one of {', '.join(SIZES)}")
    size, seed = SIZES[args.world], args.rows_seed
    rows: dict[str, list[dict[str, Any]]] = {}
    for split, limit in args.limits().items():
        drawn = sample(lists(seed, split, getattr(size, split)), limit, seed)
        skills = SKILLS if split == "train" else SKILLS | NEW_SKILLS
        rows[split] = [_row(ranks, name, skill) for name, skill in skills.items() for ranks in drawn]
    rng = random.Random(f"skills control {seed}")
    texts: dict[str, None] = {}
    while len(texts) < size.control:
        texts[_sentence(rng, held_out=True)] = None
    rows["control"] = [
        {"id": f"control-{n:03}", "group": f"control-{n:03}", "text": text} for n, text in enumerate(texts)
    ]
    return DatasetDict({split: Dataset.from_list(content) for split, content in rows.items()})


def _row(ranks: Sequence[int], name: str, skill: Skill) -> dict[str, Any]:
    word = "".join(LETTERS[rank] for rank in ranks)
    return {
        "id": f"{name}-{word}",
        "group": word,
        "task": name,
        "role": "known" if name in SKILLS else "new",
        "prompt": prompt(ranks, name),
        "completion": f" {LETTERS[skill(ranks)].upper()}",
    }


def _draw(rng: random.Random, split: str) -> tuple[int, ...]:
    """A random list of a split: four different letters, one of them twice, in random order."""
    while True:
        ranks = rng.sample(range(len(LETTERS)), LENGTH - 1)
        ranks.append(rng.choice(ranks))
        rng.shuffle(ranks)
        if of_list(ranks) == split:
            return tuple(ranks)


def _sentence(rng: random.Random, held_out: bool) -> str:
    """A plain sentence. One in five combinations of its free words is held out, again by a hash."""
    while True:
        who, age, time = rng.choice(list(_SUBJECTS)), rng.choice(_AGES), rng.choice(_TIMES)
        does, what, where = _SUBJECTS[who]
        text = f"{time} the {age} {who} {does} {what} near the {where}."
        if (hashlib.sha256(text.encode()).digest()[0] % 5 == 0) == held_out:
            return text
