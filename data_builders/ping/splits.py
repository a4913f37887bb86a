"""Which things, messages and templates go where: no two parts share what decides them (spec 6.2, 6.5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random

from .tasks import (
    CONTEXTUAL,
    FAMILIES,
    INDIRECT,
    TEMPLATES,
    Lexicon,
    Task,
    make_task,
    pairs,
)

TRAINED = {family: templates[:4] for family, templates in TEMPLATES.items()}
HELD_OUT = {family: templates[4:] for family, templates in TEMPLATES.items()}
WORDED = tuple(family for family in FAMILIES if family not in CONTEXTUAL)
SHARES = {"seen": 0.5, "tuning": 0.2, "finalists": 0.1}  # of the lexicon; the rest is for tests


def parts(lexicon: Lexicon, seed: int) -> dict[str, Lexicon]:
    """The lexicon cut into four: "seen" (what training may be about), "tuning", "finalists" and "test".

    Raises:
        ValueError: too few pairs for two in every part.
    """
    rng = Random(f"{seed} parts")
    made: dict[str, dict[str, Sequence[tuple[str, str]]]] = {name: {} for name in (*SHARES, "test")}
    for kind in ("goods", "messages"):
        found = list(getattr(lexicon, kind))
        rng.shuffle(found)
        for name, share in SHARES.items():
            count = round(share * len(getattr(lexicon, kind)))
            made[name][kind], found = found[:count], found[count:]
        made["test"][kind] = found
        if min(len(one[kind]) for one in made.values()) < 2:
            raise ValueError(f"{len(getattr(lexicon, kind))} pairs of {kind} are too few: every part needs two")
    return {name: replace(lexicon, goods=one["goods"], messages=one["messages"]) for name, one in made.items()}


def task_sets(lexicon: Lexicon, sizes: Mapping[str, int], seed: int = 0) -> dict[str, list[Task]]:
    """Tasks by name of the set; `sizes`: how many pairs of twins each has.

    "train"; "tuning" and "finalists" (for a search; each about things of its own); "validation" (of training: other
    tasks about the things of "tuning"); and the tests: "new_template"
    (things that training was about, in new sentences), "new_noun" (new things in sentences of training), "contextual"
    (whose file it is decides), "indirect" (new things, asked for without naming the deed), "borderline" (sounds
    harmful, and is not). Raises ValueError for other names.
    """
    cut = parts(lexicon, seed)
    made: dict[str, list[Task]] = {}
    for name, count in sizes.items():
        rng = Random(f"{seed} {name}")
        if name == "borderline":
            made[name] = borderline(lexicon, count, rng)
            continue
        if name not in (
            "train",
            "tuning",
            "validation",
            "finalists",
            "new_template",
            "new_noun",
            "contextual",
            "indirect",
        ):
            raise ValueError(f"unknown set of tasks {name!r}")
        part = {"train": "seen", "validation": "tuning", "new_template": "seen"}.get(
            name, name if name in cut else "test"
        )
        templates = {"new_template": HELD_OUT, "indirect": INDIRECT}.get(name, TRAINED)
        families = CONTEXTUAL if name == "contextual" else WORDED
        made[name] = [task for pair in pairs(cut[part], families, templates, count, name, rng) for task in pair]
    return made


def by_harm(tasks: Sequence[Task]) -> tuple[list[Task], list[Task]]:
    """Harmless and harmful ones."""
    return [task for task in tasks if not task.harmful], [task for task in tasks if task.harmful]


def borderline(lexicon: Lexicon, count: int, rng: Random) -> list[Task]:
    """Harmless tasks about what sounds harmful. ValueError for a lexicon that has none."""
    if not lexicon.borderline:
        raise ValueError("the lexicon has no borderline requests")
    made = []
    for number in range(count):
        family, about = lexicon.borderline[number % len(lexicon.borderline)]
        first = ((about, about),)
        own = replace(lexicon, goods=(*first, *lexicon.goods), messages=(*first, *lexicon.messages))
        template = TEMPLATES[family][number // len(lexicon.borderline) % len(TEMPLATES[family])]
        made.append(make_task(own, family, 0, template, False, f"borderline-{number}", rng))
    return made
