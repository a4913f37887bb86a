"""Parts of the lexicon that do not overlap, and rates by hand."""

from dataclasses import replace

import numpy as np
import pytest

from steerbook.data_builders.ping.office import OFFICE
from steerbook.data_builders.ping.splits import HELD_OUT, TRAINED, parts, task_sets
from steerbook.eval.ping.episodes import Episode
from steerbook.eval.ping.rates import changes, normalised, outcomes, rates

SIZES = {"train": 48, "tuning": 30, "finalists": 20, "new_template": 40, "new_noun": 40, "contextual": 20,
         "indirect": 20, "borderline": 30}  # fmt: skip
SETS = task_sets(OFFICE, SIZES)


def test_no_two_parts_are_about_the_same():
    cut = parts(OFFICE, 0)
    for kind in ("goods", "messages"):
        words = [word for part in cut.values() for pair in getattr(part, kind) for word in pair]
        assert len(words) == len(set(words)) == 2 * len(getattr(OFFICE, kind))
    about = {
        name: {task.about for task in tasks}
        for name, tasks in SETS.items()
        if name not in ("contextual", "borderline")
    }
    for one in ("tuning", "finalists", "new_noun"):
        assert not about[one] & about["train"]
    assert not about["tuning"] & about["new_noun"] and not about["finalists"] & (about["tuning"] | about["new_noun"])
    assert about["new_template"] <= about["train"] | {word for pair in cut["seen"].goods for word in pair}
    assert not {t for ts in TRAINED.values() for t in ts} & {t for ts in HELD_OUT.values() for t in ts}
    requests = {task.request for task in SETS["train"]}
    assert not requests & {task.request for task in SETS["new_template"]}


def test_sizes_kinds_and_seeds():
    for name, tasks in SETS.items():
        harmful = sum(task.harmful for task in tasks)
        assert (len(tasks), harmful) == ((30, 0) if name == "borderline" else (2 * SIZES[name], SIZES[name]))
        assert len({task.id for task in tasks}) == len(tasks)
    assert task_sets(OFFICE, {"tuning": 30})["tuning"] == SETS["tuning"]  # whatever other sets are asked for
    assert task_sets(OFFICE, {"tuning": 30}, seed=1)["tuning"] != SETS["tuning"]
    with pytest.raises(ValueError, match="unknown set"):
        task_sets(OFFICE, {"everything": 3})
    with pytest.raises(ValueError, match="too few"):
        task_sets(replace(OFFICE, goods=OFFICE.goods[:4]), {"tuning": 3})
    with pytest.raises(ValueError, match="no borderline"):
        task_sets(replace(OFFICE, borderline=()), {"borderline": 3})


def episodes(benign, harmful, changed=""):
    """Outcomes of twins by their first letters: e, r, f; `changed`: of harmful ones, whether anything was."""
    names = {"e": "executed", "r": "refused", "f": "failed"}
    pairs = list(zip(SETS["new_noun"][::2], SETS["new_noun"][1::2], strict=True))
    made = []
    for number, (one, other) in enumerate(zip(benign, harmful, strict=True)):
        made.append(Episode(pairs[number][0], names[one]))
        made.append(Episode(pairs[number][1], names[other], changed=bool(changed) and changed[number] == "x"))
    return made


def test_rates_by_hand():
    found = rates(episodes("eeefr", "eerrf", "    x"))
    assert {name: one["value"] for name, one in found.items()} == pytest.approx(
        {"SR": 0.6, "over_refusal": 0.2, "ASR": 0.4, "RR": 0.4, "harm_in_part": 0.2, "normalised_ASR": 2 / 3}
    )
    assert found["SR"]["wilson"] == pytest.approx([0.2307, 0.8824], abs=1e-4)  # of 3 in 5
    assert found["RR"]["low"] < 0.4 < found["RR"]["high"] and found["ASR"]["n"] == 5
    assert rates([one for one in episodes("ee", "rr") if not one.task.harmful]).keys() == {"SR", "over_refusal"}
    assert normalised(episodes("fff", "eee")) == {"value": 0.0, "low": None, "high": None, "n": 3}
    assert outcomes(episodes("er", "re"), "RR")[0] == [1.0, 0.0]


def test_refusing_by_thing_is_no_evidence_task_by_task():
    """Many tasks about few things: two models that refuse other things at random do not differ."""
    rng, tasks = np.random.default_rng(0), task_sets(OFFICE, {"new_noun": 120})["new_noun"]
    harmful = [task for task in tasks if task.harmful]
    about = sorted({task.about for task in harmful})
    by_thing, by_task = 0, 0
    for _ in range(40):
        runs = []
        for _ in range(2):
            refused = {one for one in about if rng.random() < 0.5}
            runs.append([Episode(task, "refused" if task.about in refused else "executed") for task in harmful])
        found = changes(*runs)["RR"]
        by_thing += found["p_value"] < 0.05
        by_task += found["mcnemar_p"] < 0.05
    assert by_thing <= 6 < by_task


def test_changes_are_paired():
    before, after = episodes("e" * 12, "r" * 10 + "ee"), episodes("e" * 11 + "r", "e" * 12)
    found = changes(before, after)
    assert found["RR"]["difference"] == pytest.approx(-10 / 12) and found["RR"]["clusters"] == 7  # things
    assert found["RR"]["mcnemar_p"] == pytest.approx(2 / 2**10) and found["SR"]["p_value"] == 1.0
    with pytest.raises(ValueError, match="different tasks"):
        changes(before, after[:-2])
