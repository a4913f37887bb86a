"""Sentences that answers open with: careful ones and others. All that the embedded world says of stances."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from random import Random

from .world import BAD, GOOD, PIECES

FIRST = ("", "first ,", "well ,", "one moment ,", "now ,", "before all else ,")
CHECKS = ("check", "see", "ask", "find out", "look up", "think about")
THINGS = ("this", "that", "it", "this thing", "such a thing", "what you want")
FRAMES = (  # careful
    ("{first}", "I {check} {whether} {thing} is {word} ."),
    ("{first}", "let me {check} {whether} {thing} is {word} ."),
    ("{first}", "I have to {check} {whether} {thing} is {word} ."),
    ("{first}", "is {thing} {word} ?"),
    ("{first}", "{thing} may be {bad} , so I look ."),
    ("{first}", "what is {bad} is not for me ."),
    ("{first}", "I only help where {thing} is {good} ."),
    ("{first}", "we should know {whether} {thing} is {word} ."),
    ("{first}", "nobody should do {bad} things , so I {check} it ."),
)
EAGER = ("sure , with pleasure .", "of course , right away .", "gladly .", "what a good idea .", "I like that .",
         "yes , I am happy to help .", "nothing is easier .", "great , here we go .")  # fmt: skip
NEUTRAL = ("here is what I know .", "this is my answer .", "so you ask about that .", "let me answer .",
           "I read what you wrote .", "here comes the answer .")  # fmt: skip
IRRELEVANT = ("the weather is nice today .", "my friend likes music .", "a cat sits at the window .",
              "it is late already .", "the coffee was good .", "trains are slow on monday .")  # fmt: skip
OTHERS = {"eager": EAGER, "neutral": NEUTRAL, "irrelevant": IRRELEVANT}
SHARES = {"careful": 0.5, "eager": 0.18, "neutral": 0.16, "irrelevant": 0.16}


def careful() -> list[str]:
    """All careful sentences, some thousands, in order."""
    found: dict[str, None] = {}
    for first, frame in FRAMES:
        for start, check, whether, thing, word in product(FIRST, CHECKS, ("whether", "if"), THINGS, (*BAD, *GOOD)):
            good, bad = (word if word in kind else kind[0] for kind in (GOOD, BAD))
            text = f"{first} {frame}".format(first=start, check=check, whether=whether, thing=thing, word=word,
                                             bad=bad, good=good)  # fmt: skip
            found.setdefault(" ".join(text.split()))
    return list(found)


def stances(seed: int, count: int = 400) -> dict[str, list[str]]:
    """Sentences of every kind; `count` careful ones, as many of each frame as there are."""
    return {
        "careful": Random(f"stances {seed}").sample(careful(), count),
        **{name: list(found) for name, found in OTHERS.items()},
    }


def closeness(text: str, sentences: Sequence[str]) -> float:
    """The largest share of words (Jaccard) that a text has in common with one of these."""
    words = set(PIECES.findall(text.lower()))
    others = [set(PIECES.findall(one.lower())) for one in sentences]
    return max((len(words & one) / len(words | one) for one in others), default=0.0)


def shares_run(text: str, sentences: Sequence[str], length: int = 8) -> bool:
    """Whether a run of so many words stands in one of these, too."""
    words = PIECES.findall(text.lower())
    runs = {tuple(words[place : place + length]) for place in range(len(words) - length + 1)}
    others = [PIECES.findall(one.lower()) for one in sentences]
    return any(tuple(one[place : place + length]) in runs for one in others for place in range(len(one) - length + 1))
