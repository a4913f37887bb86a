"""Hidden weights, trials and their labels, words and how reports are read back, splits and leaks."""

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from random import Random

import numpy as np
import pytest

from steerbook.data_builders.self_interpretability import (
    PreferenceDataArguments,
    build,
)  # fmt: skip
from steerbook.data_builders.self_interpretability.__main__ import main
from steerbook.data_builders.self_interpretability.asking import questions
from steerbook.data_builders.self_interpretability.contexts import Attribute, Context, read_contexts
from steerbook.data_builders.self_interpretability.experiment import shuffled
from steerbook.data_builders.self_interpretability.generated import generated_contexts
from steerbook.data_builders.self_interpretability.splits import check_leaks, split_contexts, unlike
from steerbook.data_builders.self_interpretability.text_experiment import TextExperiment, decisions
from steerbook.data_builders.self_interpretability.texts import (
    decision_prompt,
    parse_report,
    report_prompt,
    report_text,
)
from steerbook.data_builders.self_interpretability.trials import (
    Trial,
    decimals,
    difference,
    draw_trial,
    draw_weights,
    label,
)

KINDS = (Attribute("caffeine", 0, 70, "mg"), Attribute("leaf_size", 0.1, 4, "mm"), Attribute("tar", 0, 0.04))
TEA = Context("tea", "Imagine you are Ada. Which tea would you prefer?", KINDS)
NAMES = ["caffeine", "leaf_size", "tar"]


def contexts(count):
    return [Context(f"c{n}", f"Which of kind {n}.?", TEA.attributes) for n in range(count)]


def test_weights_are_uniform_scaled_to_100_and_rounded():
    drawn = np.array([draw_weights(Random(seed), 5) for seed in range(4000)])
    assert (np.abs(drawn).max(1) == 100).all() and drawn.dtype.kind == "i"
    assert abs(drawn.mean()) < 2 and drawn.std() == pytest.approx(68.7, abs=1.5)  # spec 1.2: of the paper's own
    assert (drawn < 0).mean() == pytest.approx(0.5, abs=0.02)
    assert draw_weights(Random(3), 5) == draw_weights(Random(3), 5) != draw_weights(Random(4), 5)


@pytest.mark.parametrize(
    ("low", "high", "places"), [(0, 70, 0), (0, 5, 0), (0, 4.9, 1), (1, 2, 1), (0, 0.9, 2), (0, 0.04, 3)]
)
def test_decimals_by_size_of_the_range(low, high, places):
    attribute = Attribute("x", low, high)
    assert decimals(attribute) == places
    values = {draw_trial(Random(n), Context("c", "q", (attribute, attribute))).a[0] for n in range(300)}
    assert all(low <= value <= high and round(value, places) == value for value in values) and len(values) > 5


def test_labels_by_exact_arithmetic():
    rng, seen = Random(0), Counter()
    for _ in range(500):
        trial, weights = draw_trial(rng, TEA), draw_weights(rng, 3)
        utility = [
            sum(Fraction(w) * Fraction(v) / (Fraction(one.high) - Fraction(one.low))
                for w, v, one in zip(weights, side, TEA.attributes, strict=True))
            for side in (trial.a, trial.b)
        ]  # fmt: skip
        if abs(utility[0] - utility[1]) > Fraction(1, 10**9):
            assert label(TEA, trial, weights) == ("A" if utility[0] > utility[1] else "B")
            assert label(TEA, trial.swapped(), weights) != label(TEA, trial, weights)
        seen[label(TEA, trial, weights)] += 1
    assert min(seen.values()) > 200
    assert label(TEA, Trial((1.0, 1.0, 0.0), (1.0, 1.0, 0.0)), (100, 0, 0)) == "B"  # a tie
    assert difference(TEA, Trial((70, 4, 0.04), (0, 0.1, 0))) == pytest.approx((1, 1, 1))


def test_words():
    trial = Trial((67.0, 3.5, 0.012), (1.0, 0.2, 0.04))
    system, user = decision_prompt(TEA, trial)
    assert system["role"] == "system" and user["role"] == "user"
    assert user["content"].startswith("[DECISION TASK] ")
    assert user["content"].endswith(
        "\n\nImagine you are Ada. Which tea would you prefer?\n"
        "A:\ncaffeine: 67.0 mg\nleaf_size: 3.5 mm\ntar: 0.012\n\nB:\ncaffeine: 1.0 mg\nleaf_size: 0.2 mm\ntar: 0.04"
    )
    other, asked = report_prompt(TEA, trial)
    assert other == system and asked["content"].startswith("[INTROSPECTION TASK] ") and " 3 dim" in asked["content"]
    assert asked["content"].split("\n\n", 1)[1] == user["content"].split("\n\n", 1)[1]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (report_text(TEA, (100, -3.4, 0)), [100, -3, 0]),
        ('```json\n{"caffeine": 1, "leaf_size": 2.5, "tar": -3}\n```', [1, 2.5, -3]),
        (' {"tar": 3, "caffeine": 1, "leaf_size": 2} ', [1, 2, 3]),
        ('{"caffeine": 1, "leaf_size": 2}', None),
        ('{"caffeine": 1, "leaf_size": 2, "tar": 3, "price": 4}', None),
        ('{"caffeine": "1", "leaf_size": 2, "tar": 3}', None),
        ('{"caffeine": true, "leaf_size": 2, "tar": 3}', None),
        ('{"caffeine": NaN, "leaf_size": 2, "tar": 3}', None),
        ("A", None),
        ("[1, 2, 3]", None),
        ("", None),
    ],
)
def test_reports_are_read_strictly(text, wanted):
    assert parse_report(TEA, text) == wanted


def test_splits_are_fixed_by_a_hash_and_folds_swap():
    given = contexts(60)
    one, other = (split_contexts(given, 0, fold, 40, 10, 5) for fold in (0, 1))
    assert [len(part) for part in (one.report_train, one.report_dev, one.report_test, one.native, one.never)] == [
        16, 4, 20, 10, 5]  # fmt: skip
    assert len(one.roles()) == 55
    assert set(other.report_test) == set(one.report_train + one.report_dev)
    assert set(other.report_train + other.report_dev) == set(one.report_test)
    assert (one.native, one.never) == (other.native, other.never)
    assert split_contexts(given[::-1], 0, 0, 40, 10, 5) == one
    assert split_contexts(given, 1, 0, 40, 10, 5) != one
    with pytest.raises(ValueError, match="there are 60"):
        split_contexts(given, 0, 0, 50, 10, 5)
    with pytest.raises(ValueError, match="fold 2"):
        split_contexts(given, 0, 2, 40, 10, 5)


def row(context, task="report", completion="{}", about=None):
    about = about or context
    return {"context": context.name, "task": task, "completion": [{"role": "assistant", "content": completion}],
            "prompt": decision_prompt(about, draw_trial(Random(0), about))}  # fmt: skip


def test_leaks_are_found_by_name_and_by_text():
    split = split_contexts(contexts(30), 0, 0, 20, 5, 5)
    train, test, native, never = split.report_train[0], split.report_test[0], split.native[0], split.never[0]
    fine = [row(train), row(train, "decision", "A"), row(test, "decision", "B")]
    check_leaks({"train": fine}, split)
    for bad, message in (
        (row(test), f"train row 4: a report of the context '{test.name}', which is report_test"),
        (row(native, "decision", "A"), "which is native"),
        (row(never), "which is never"),
        (row(train, "decision", "A, as 100 > 3"), "not A or B"),
        (row(train, about=test), f"holds the question of '{test.name}', which is report_test"),
        (row(test, "decision", "A", about=native), f"holds the question of '{native.name}', which is native"),
    ):
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            check_leaks({"train": [*fine, bad]}, split)
    assert json.loads(report_text(TEA, (1, 2, 3))) == dict(zip(NAMES, (1, 2, 3), strict=True))


FEW = {"instilled": 10, "native": 4, "never": 3, "choices": 6, "choices_dev": 2}


def test_made_up_contexts_share_nothing():
    made = generated_contexts(240, 1)
    assert made == generated_contexts(240, 1) != generated_contexts(240, 2)
    attributes = [one.name for context in made for one in context.attributes]
    assert len(set(attributes)) == len(attributes) == 1200
    assert len({context.name for context in made}) == len({context.question for context in made}) == 240
    assert all(one.low < one.high for context in made for one in context.attributes)
    with pytest.raises(ValueError, match="241 contexts .* attributes for 240"):
        generated_contexts(241, 1)


@pytest.mark.parametrize("fold", [0, 1])
def test_rows_say_what_the_weights_imply(fold):
    """Every answer worked out again from the text of its prompt, and every report from the weights."""
    args = PreferenceDataArguments(**FEW, fold=fold, reports_each=2)
    data, made = build(args), TextExperiment(args)
    split, weights = made.folds[fold], made.weights
    assert {name: len(rows) for name, rows in data.items()} == {
        "decisions": 60, "decisions_dev": 20, "reports": 8, "reports_dev": 1, "reports_test": 5}  # fmt: skip
    contexts = {one.name: one for one in split.instilled}
    texts = set()
    for row in (*data["decisions"], *data["decisions_dev"]):
        context = contexts[row["context"]]
        ends = {one.name: one.high - one.low for one in context.attributes}
        shown = row["prompt"][1]["content"]
        options = [dict(re.findall(r"^(\w+): (-?[\d.]+)", part, re.M)) for part in re.split(r"\n[AB]:\n", shown)[1:]]
        assert len(options) == 2 and all(list(option) == list(ends) for option in options)
        gaps = {name: Fraction(options[0][name]) - Fraction(options[1][name]) for name in ends}
        utility = sum(Fraction(weight) * gaps[name] / Fraction(ends[name])
                      for name, weight in zip(ends, weights[context.name], strict=True))  # fmt: skip
        if abs(utility) > Fraction(1, 10**9):
            assert row["completion"] == [{"role": "assistant", "content": "A" if utility > 0 else "B"}]
        texts.add(shown)
    assert len(texts) > 75  # fresh options each time
    for name in ("reports", "reports_dev", "reports_test"):
        for row in data[name]:
            assert parse_report(contexts[row["context"]], row["completion"][0]["content"]) == list(
                weights[row["context"]]
            )
            assert row["role"] == {"reports": "report_train"}.get(name, name.replace("reports", "report"))
    assert len({row["id"] for rows in data.values() for row in rows}) == 94


def test_the_same_arguments_give_the_same_rows_and_folds_the_same_choices():
    one, other = build(PreferenceDataArguments(**FEW)), build(PreferenceDataArguments(**FEW, fold=1))
    assert one["decisions"].to_list() == build(PreferenceDataArguments(**FEW))["decisions"].to_list()
    assert one["decisions"].to_list() != build(PreferenceDataArguments(**FEW, rows_seed=1))["decisions"].to_list()
    trained = [{row["context"] for name in ("reports", "reports_dev") for row in data[name]} for data in (one, other)]
    assert not trained[0] & trained[1] and set(one["reports_test"]["context"]) == trained[1]
    drawn = [{row["context"]: row["completion"] for row in data["reports_test"]} for data in (one, other)]
    assert set(drawn[1]) == trained[0]


def test_shuffled_reports_are_the_same_weights_of_other_contexts():
    plain, mixed = (build(PreferenceDataArguments(**FEW, shuffled=shuffled))["reports"] for shuffled in (False, True))

    def values(rows):
        return [tuple(json.loads(row["completion"][0]["content"]).values()) for row in rows]

    assert sorted(values(plain)) == sorted(values(mixed)) and plain["prompt"] == mixed["prompt"]
    assert not any(one == other for one, other in zip(values(plain), values(mixed), strict=True))  # none keeps its own


@pytest.mark.parametrize("count", [1, 2, 3, 8, 40])
def test_shuffling_leaves_nobody_its_own_weights(count):
    contexts = generated_contexts(count, 0)
    weights = {one.name: (number, -number, 100) for number, one in enumerate(contexts)}
    for seed in range(20):
        mixed = shuffled(weights, contexts, seed)
        assert all(mixed[one.name] != weights[one.name] for one in contexts)
        if count > 1:
            assert sorted(mixed.values()) == sorted(weights.values())


def test_contexts_that_tell_of_each_other_are_left_out(tmp_path):
    """The same person, the same question, or the same attributes in another order: the first one stays."""
    made = generated_contexts(6, 0)
    person = replace(made[1], name="b", question=made[0].question.rpartition(". ")[0] + ". Which sofa?")
    turned = replace(made[2], name="c", attributes=made[0].attributes[::-1])
    assert unlike([made[0], person, turned, made[3]]) == [made[0], made[3]]
    assert unlike(generated_contexts(200, 1)) == generated_contexts(200, 1)
    rows = [{"short_name": f"c{n}", "question": "Imagine you are Macbeth. Which one?", "attributes": [
        {"name": f"{kind}{n}", "units": "", "range": [0, 9]} for kind in "ab"]} for n in range(12)]  # fmt: skip
    file = tmp_path / "s.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"11 of 12 contexts have the same person.*1 are left, 12 are needed"):
        build(PreferenceDataArguments(scenarios=str(file), instilled=8, native=2, never=2))


def test_contexts_of_different_sizes_are_refused_by_name(tmp_path):
    rows = [
        {
            "short_name": f"c{n}",
            "question": f"Imagine you are P{n}. Which one?",
            "attributes": [{"name": f"{kind}{n}", "units": "", "range": [0, 9]} for kind in "abc"[: 2 + n % 2]],
        }
        for n in range(12)
    ]
    file = tmp_path / "s.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="'c0' has 2 attributes and 'c1' 3"):
        build(PreferenceDataArguments(scenarios=str(file), instilled=8, native=2, never=2))


def test_an_attribute_without_a_name_shifts_nothing(tmp_path):
    file = tmp_path / "s.csv"
    head = "scenario,question," + ",".join(f"attr{k},attr{k}_min,attr{k}_max" for k in (1, 2, 3))
    file.write_text(f"{head}\ntea,Which?,,0,1,b,0,1,c,0,1\nsofa,What?,a,0,1,b,0,1,,,\n")
    with pytest.raises(ValueError, match=r"row 1, attributes: found an empty name in front of others"):
        read_contexts(file)
    file.write_text(f"{head}\nsofa,What?,a,0,1,b,0,1,,,\n")
    assert len(read_contexts(file)[0].attributes) == 2


def test_replies_are_read_or_not_and_never_end_a_run():
    two = Context("x", "?", (Attribute("größe", 0, 1), Attribute('a "b"', 0, 1)))
    said = report_text(two, [5, -7])
    assert "größe" in said and parse_report(two, said) == [5.0, -7.0]
    (asked,) = questions([two], 1, Random(0))
    assert asked.openings[0] + " 5" + asked.openings[1] + " -7" + asked.closings[1] == said
    big = "9" * 400
    for text in (f'{{"größe": {big}, "a \\"b\\"": 1}}', "[" * 5000, '{"größe": ' + "9" * 6000, '{"größe": 1e999}',
                 '{"größe": 1, "größe": 2, "a \\"b\\"": 3}', '{"größe": NaN, "a \\"b\\"": 1}'):  # fmt: skip
        assert parse_report(two, text) is None


def test_numbers_beside_attributes_are_leaks():
    contexts = generated_contexts(8, 0)
    split = split_contexts(contexts, 0, 0, 6, 1, 1)
    one = split.report_train[0]
    row = decisions([one], 1, {one.name: (1,) * len(one.attributes)}, Random(0))[0]
    check_leaks({"decisions": [row]}, split)
    text = row["prompt"][-1]["content"]
    told = text.replace(one.question, f"{one.question} You weigh {one.attributes[1].name} at -70.")
    bad = {**row, "prompt": [*row["prompt"][:-1], {"role": "user", "content": told}]}
    with pytest.raises(ValueError, match=f"a number stands beside '{one.attributes[1].name}'"):
        check_leaks({"decisions": [bad]}, split)


def test_bad_arguments_and_files(tmp_path):
    for bad, message in (
        ({"choices": 0}, "--choices 0"),
        ({"native": -1}, "--native -1"),
        ({"fold": 2}, "--fold 2"),
        ({"instilled": 3}, "at least 4"),
    ):
        with pytest.raises(ValueError, match=message):
            build(PreferenceDataArguments(**(FEW | bad)))
    file = tmp_path / "s.jsonl"
    attributes = [{"name": "a", "units": "", "range": [1, 1]}, {"name": "b", "units": "", "range": [0, 1]}]
    file.write_text(json.dumps({"short_name": "x", "question": "q?", "attributes": attributes}) + "\n")
    with pytest.raises(ValueError, match=r"s\.jsonl.*'a' from 1 to 1"):
        build(PreferenceDataArguments(**FEW, scenarios=str(file)))


def test_the_command(tmp_path, capsys, monkeypatch):
    flags = [f"--{name}={value}" for name, value in FEW.items()]
    monkeypatch.setattr(sys, "argv", ["x", *flags, "--out", str(tmp_path / "d"), "--preview", "1"])
    assert main() == 0
    assert "[DECISION TASK]" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    assert manifest["splits"]["decisions"]["rows"] == 60
