"""Weights from choices, agreement of reports with them, and the command on files of any model."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import pearsonr

from steerbook.data_builders.self_interpretability.contexts import read_contexts
from steerbook.eval.self_interpretability.__main__ import main
from steerbook.eval.self_interpretability.agreement import DRAWS, agreement, disattenuated, gain, permuted
from steerbook.eval.self_interpretability.files import read_choices, read_replies, validity
from steerbook.eval.self_interpretability.weights import fit_weights, linearity, scaled

REAL = Path(__file__).parents[1].parent / "shared" / "data" / "self_interpretability"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the published files are not beside this checkout")


def trials(count=200, attributes=4, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (count, attributes))
    utility = x @ np.array([2.0, -3.0, 0.5, 1.0])[:attributes] + 0.3
    return x, utility, rng.uniform(size=count) < 1 / (1 + np.exp(-utility))


# ---- weights ----


def test_the_papers_estimator_is_the_posterior_mode():
    x, _, chosen = trials()

    def loss(b):
        z = (x @ b[:-1] + b[-1]) * np.where(chosen, 1, -1)
        return np.logaddexp(0, -z).sum() + 0.5 * (b[:-1] ** 2).sum()

    mode = minimize(loss, np.zeros(5), tol=1e-12).x[:-1]
    assert fit_weights(x, chosen) == pytest.approx(scaled(mode), abs=1e-3)


def test_fractional_recovers_a_logistic_chooser_exactly_and_least_squares_a_linear_one():
    x, utility, _ = trials()
    wanted = scaled([2.0, -3.0, 0.5, 1.0])
    assert fit_weights(x, 1 / (1 + np.exp(-utility)), "fractional") == pytest.approx(wanted, abs=1e-3)
    assert fit_weights(x, utility, "least_squares") == pytest.approx(wanted, abs=1e-9)
    assert linearity(x, utility) == pytest.approx(1)
    noise = np.random.default_rng(1).normal(size=len(x)) * 3
    assert linearity(x, utility + noise) < 0.7
    clipped = np.clip(utility * 20, -10, 10)
    slopes = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), clipped, rcond=None)[0][:-1]
    assert fit_weights(x, utility * 20, "least_squares") == pytest.approx(scaled(slopes))
    assert fit_weights(x, np.array([0.0, 1.0])[(utility > 0).astype(int)], "fractional").shape == (4,)


def test_a_noise_free_chooser_is_recovered_as_well_as_the_specification_says():
    """Spec 1.9: r = .968 at 50 trials of 5 attributes, .987 at 100."""
    for count, wanted in ((50, 0.968), (100, 0.987)):
        true, found = [], []
        for seed in range(40):
            rng = np.random.default_rng([seed, count])
            weights = scaled(rng.uniform(-100, 100, 5))
            x = rng.uniform(size=(count, 5)) - rng.uniform(size=(count, 5))
            true.append(weights)
            found.append(fit_weights(x, x @ weights > 0))
        assert pearsonr(np.ravel(true), np.ravel(found))[0] == pytest.approx(wanted, abs=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": np.ones(200)}, r"all 200 choices are equal \(A\)"),
        ({"choices": np.zeros(200)}, r"all 200 choices are equal \(B\)"),
        ({"choices": np.full(200, 0.5)}, "choices must be 1"),
        ({"choices": np.full(200, 2.0), "estimator": "fractional"}, "between 0 and 1"),
        ({"choices": np.zeros(3)}, r"got \(200, 4\) and \(3,\)"),
        ({"differences": np.full((200, 4), np.nan)}, "finite"),
        (
            {"differences": np.zeros((4, 4)), "choices": np.array([0, 1, 0, 1])},
            "4 trials are too few to fit 4",
        ),
        ({"differences": np.zeros((200, 4))}, "no attribute has any effect"),
        ({"estimator": "brms"}, "unknown estimator 'brms'"),
    ],
)
def test_choices_that_tell_nothing_are_refused(change, message):
    x, _, chosen = trials()
    with pytest.raises(ValueError, match=message):
        fit_weights(**{"differences": x, "choices": chosen, **change})


# ---- agreement ----


def vectors(sizes, seed=0):
    rng = np.random.default_rng(seed)
    learned = [rng.normal(size=size) * 50 for size in sizes]
    return [0.5 * one + rng.normal(size=len(one)) * 20 + 5 for one in learned], learned


@pytest.mark.parametrize("sizes", [[5] * 8, [5, 3, 2, 5, 7, 3]])
def test_statistics_by_their_definitions(sizes):
    reported, learned = vectors(sizes)
    found = agreement(reported, learned)
    x, y = np.concatenate(reported), np.concatenate(learned)
    assert found["pooled_r"]["value"] == pytest.approx(pearsonr(x, y)[0])
    each = [pearsonr(a, b)[0] for a, b in zip(reported, learned, strict=True)]
    assert found["within_context_r"]["value"] == pytest.approx(np.mean(each))
    assert found["sign_agreement"]["value"] == pytest.approx(np.mean(np.sign(x) == np.sign(y)))
    assert found["mae"]["value"] == pytest.approx(np.abs(x - y).mean())
    assert found["slope"]["value"] == pytest.approx(np.polyfit(y, x, 1)[0])
    assert found["sd_ratio"]["value"] == pytest.approx(x.std() / y.std())
    drawn = np.random.default_rng(0).integers(0, len(sizes), (DRAWS, len(sizes)))
    values = [pearsonr(np.concatenate([reported[i] for i in row]), np.concatenate([learned[i] for i in row]))[0]
              for row in drawn]  # fmt: skip
    assert (found["pooled_r"]["low"], found["pooled_r"]["high"]) == pytest.approx(np.quantile(values, [0.025, 0.975]))
    assert found["pooled_r"]["n"] == len(sizes)


def test_a_gain_is_paired_over_contexts():
    before, learned = vectors([5] * 30)
    after = [0.2 * one + 0.8 * true for one, true in zip(before, learned, strict=True)]
    found = gain(after, before, learned)
    late, early = agreement(after, learned)["pooled_r"], agreement(before, learned)["pooled_r"]
    assert found["value"] == pytest.approx(late["value"] - early["value"]) and found["low"] > 0
    assert found["high"] - found["low"] < early["high"] - early["low"] + late["high"] - late["low"]


def test_chance_within_contexts_keeps_what_contexts_have_in_common():
    """Contexts that differ only in how much is liked at all: attributes may change places, contexts may not."""
    level = np.repeat(np.linspace(-80, 80, 40), 5).reshape(40, 5)
    rng = np.random.default_rng(0)
    reported, learned = level + rng.normal(size=level.shape), level + rng.normal(size=level.shape)
    assert permuted(reported, learned, within=True)["value"] > 0.99
    found = permuted(reported, learned)
    assert abs(found["value"]) < 0.02 and found["low"] < -0.2 < 0.2 < found["high"]
    ragged = [one[: 2 + number % 3] for number, one in enumerate(reported)]
    others = [one[: 2 + number % 3] for number, one in enumerate(learned)]
    assert abs(permuted(ragged, others)["value"]) < 0.02


def test_measurement_error_is_taken_out():
    assert disattenuated(0.4, 0.64, 1.0) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        disattenuated(0.4, 0.0)


@pytest.mark.parametrize(
    ("reported", "learned"),
    [([[1, 2]], [[1, 2]]), ([[1, 2], [1, 2, 3]], [[1, 2], [1, 2]]), ([[1], [2]], [[1], [2]]),
     ([[1, np.nan], [1, 2]], [[1, 2], [1, 2]])],
)  # fmt: skip
def test_weights_that_cannot_be_compared(reported, learned):
    with pytest.raises(ValueError, match="same contexts|finite"):
        agreement(reported, learned)


# ---- files ----


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def scenario(name, count=3, **more):
    row = {"scenario": name, "question": f"Which {name}?"}
    for place in range(1, count + 1):
        row |= {f"attr{place}": f"size_{place}", f"attr{place}_min": 0, f"attr{place}_max": 10 * place}
    return row | more


@pytest.fixture
def files(tmp_path):
    """Three contexts, the last of which always chooses A; reports of two, one of them unparsable."""
    rng = np.random.default_rng(0)
    true = {"tea": [1.0, -0.5, 0.2], "lamp": [-1.0, 0.3, 0.6], "rug": [1.0, 0.0, 0.0]}
    choices, reports = [], []
    for name, weights in true.items():
        for _ in range(60):
            one, other = rng.uniform(size=3), rng.uniform(size=3)
            better = "A" if name == "rug" or weights @ (one - other) > 0 else "B"
            values = {f"{side}_attribute_{k + 1}": value[k] * 10 * (k + 1)
                      for side, value in (("A", one), ("B", other)) for k in range(3)}  # fmt: skip
            choices.append({"scenario": name, "selection": better, **values})
        reports += [{"scenario": name, **{f"report_attr{k + 1}": 100 * w for k, w in enumerate(weights)}}] * 2
    choices.append({**choices[0], "selection": "neither"})
    reports[1] = {**reports[1], "report_attr2": "a lot"}
    return {
        "scenarios": write(tmp_path / "s.csv", [scenario(name) for name in true]),
        "selections": write(tmp_path / "c.csv", choices),
        "reports": write(tmp_path / "r.csv", reports),
        "weights": write(tmp_path / "w.csv", [{"scenario": name, **{f"attr{k + 1}": 100 * w for k, w in enumerate(v)}}
                                              for name, v in true.items()]),
    }  # fmt: skip


def flags(files, *names):
    return [part for name in names for part in (f"--{name}", files[name])]


def test_the_command_on_files(files, tmp_path, capsys):
    given = flags(files, "scenarios", "selections", "reports", "weights")
    main([*given, "--before", files["reports"], "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["pooled_r"]["value"] > 0.97 and found["pooled_r"]["n"] == 2 and found["sign_agreement"]["value"] == 1
    assert {"within_context_r", "mae", "slope", "sd_ratio"} <= set(found)
    assert found["validity"] == {
        "asked": 6,
        "valid": 5,
        "unparsable": 1,
        "contexts_asked": 3,
        "contexts": 3,
        "not_asked": [],
    }
    assert found["choices"]["valid"] == 180 and found["choices"]["invalid"] == 1
    assert list(found["choices"]["refused"]) == ["rug"] and "(A)" in found["choices"]["refused"]["rug"]
    assert found["learned_against_target"]["pooled_r"]["value"] > 0.97
    assert found["gain"]["value"] == 0
    output = capsys.readouterr().out
    for text in (
        "5 valid of 6 asked (1 in the files are not)",
        "No weights for rug: all 60 choices",
        "1 that are nei",
    ):
        assert text in output


def test_differences_are_in_units_of_the_range(files):
    contexts = {context.name: context for context in read_contexts(files["scenarios"])}
    found = read_choices([files["selections"]], contexts)["tea"]
    row = next(csv.DictReader(Path(files["selections"]).open()))
    wanted = [(float(row[f"A_attribute_{k}"]) - float(row[f"B_attribute_{k}"])) / (10 * k) for k in (1, 2, 3)]
    assert found.differences[0] == pytest.approx(wanted) and len(found.chosen) == 60 and found.invalid == 1


def test_replies_asked_may_be_said(files):
    contexts = {context.name: context for context in read_contexts(files["scenarios"])}
    again = Path(files["reports"]).with_name("again.csv")
    again.write_text(Path(files["reports"]).read_text())
    replies = read_replies([files["reports"], str(again)], contexts)
    assert validity(replies, list(contexts), None)["asked"] == 12
    assert validity(replies, list(contexts), 10)["asked"] == 30
    for each in (-3, 0, 3):
        with pytest.raises(ValueError, match=f"--asked {each}: some context has 4 replies"):
            validity(replies, list(contexts), each)
    fewer = validity(
        replies, list(contexts)[:2], None
    )  # of contexts that nobody was asked about, replies do not count
    assert fewer["asked"] == 8 and fewer["valid"] <= 8 and fewer["not_asked"] == [list(contexts)[2]]


def test_what_would_count_twice_or_mix_models_is_refused(files, tmp_path):
    with pytest.raises(SystemExit, match="is given twice"):
        main([*flags(files, "scenarios", "selections"), "--reports", files["reports"], files["reports"]])
    rows = list(csv.DictReader(Path(files["selections"]).open()))
    write(tmp_path / "two.csv", [{**row, "model": f"m{number % 2}"} for number, row in enumerate(rows)])
    with pytest.raises(SystemExit, match=r"rows of 2 models \(m0, m1\)"):
        main([*flags(files, "scenarios", "reports"), "--selections", str(tmp_path / "two.csv")])
    weights = list(csv.DictReader(Path(files["weights"]).open()))
    write(Path(files["weights"]), [*weights, weights[0]])
    with pytest.raises(SystemExit, match="for the second time"):
        main(flags(files, "scenarios", "selections", "reports", "weights"))
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "c.jsonl").write_text("\n".join([*lines, json.dumps({"scenario": "tea"})]))
    with pytest.raises(SystemExit, match=r"row 182: no column selection"):
        main([*flags(files, "scenarios", "reports"), "--selections", str(tmp_path / "c.jsonl")])


def test_choices_that_cannot_be_fitted_are_listed(files, tmp_path):
    rows = list(csv.DictReader(Path(files["selections"]).open()))
    write(tmp_path / "a.csv", [{**row, "selection": "A"} for row in rows])
    with pytest.raises(SystemExit) as error:
        main([*flags(files, "scenarios", "reports"), "--selections", str(tmp_path / "a.csv")])
    assert "any of 3 contexts" in str(error.value) and "choices are equal (A)" in str(error.value)


def test_reports_that_are_all_alike_have_no_r(files, tmp_path, capsys):
    rows = list(csv.DictReader(Path(files["reports"]).open()))
    flat = [
        {key: (5 if key.startswith("report_attr") and value else value) for key, value in row.items()} for row in rows
    ]
    write(tmp_path / "flat.csv", flat)
    main(
        [
            *flags(files, "scenarios", "selections"),
            "--reports",
            str(tmp_path / "flat.csv"),
            "--out",
            str(tmp_path / "o"),
        ]
    )
    found = json.loads((tmp_path / "o" / "results.json").read_text())
    assert found["pooled_r"]["value"] is None and found["mae"]["value"] > 0 and "–" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "row", "parts"),
    [
        ("scenarios", scenario("tea"), ["s.csv", "row 4", "each one once"]),
        ("scenarios", scenario("one", 1), ["row 4", "1 attributes", "2 to 10"]),
        ("scenarios", scenario("many", 11), ["row 4", "11 attributes", "2 to 10"]),
        ("scenarios", scenario("low", attr2_min=20), ["row 4", "'size_2' from '20' to '20'"]),
        ("scenarios", scenario("none", attr2_max="much"), ["row 4", "two numbers"]),
        ("scenarios", scenario("twice", attr2="size_1"), ["row 4", "'size_1' twice"]),
        ("selections", {"scenario": "sofa", "selection": "A"}, ["c.csv", "row 182", "'sofa' is not among the 3"]),
        ("selections", {"scenario": "tea", "selection": "A", "A_attribute_1": "big"}, ["row 182", "must be numbers"]),
        ("reports", {"scenario": "sofa", "report_attr1": 1}, ["r.csv", "row 7", "'sofa'"]),
        ("weights", {"scenario": "tea", "attr1": "x"}, ["w.csv", "row 4", "must be numbers"]),
    ],
)
def test_bad_rows_name_file_and_row(files, tmp_path, kind, row, parts):
    rows = [*csv.DictReader(Path(files[kind]).open()), row]
    write(Path(files[kind]), rows)
    with pytest.raises(SystemExit) as caught:
        main([*flags(files, "scenarios", "selections", "reports", "weights"), "--out", str(tmp_path / "out")])
    text = str(caught.value.code)
    assert text.startswith("error: ") and all(part in text for part in parts), text
    assert not (tmp_path / "out").exists()


def test_missing_columns_and_contexts_without_both_sides(files, tmp_path):
    write(tmp_path / "r.csv", [{"scenario": "tea", "report": 1}])
    with pytest.raises(SystemExit, match="no column report_attr1; there are scenario, report"):
        main(flags(files, "scenarios", "selections", "reports"))
    write(tmp_path / "r.csv", [{"scenario": "tea", "report_attr1": 1, "report_attr2": 2, "report_attr3": 3}])
    with pytest.raises(SystemExit, match="reports: 1 contexts are on both sides"):
        main(flags(files, "scenarios", "selections", "reports"))


def test_contexts_as_objects(tmp_path):
    attributes = [
        {"name": "weight", "units": "kg", "range": [1, 5]},
        {"name": "cost", "units": None, "range": [0, 9]},
    ]
    path = tmp_path / "contexts.json"
    path.write_text(json.dumps([{"short_name": "tea", "question": "Which tea?", "attributes": attributes}]))
    (found,) = read_contexts(path)
    assert found.name == "tea" and [(a.name, a.units, a.low, a.high) for a in found.attributes] == [
        ("weight", "kg", 1, 5), ("cost", "", 0, 9)]  # fmt: skip
    path.write_text(json.dumps([{"short_name": "tea", "question": "Which tea?", "attributes": [{"name": "x"}] * 2}]))
    with pytest.raises(ValueError, match="'x' from None to None"):
        read_contexts(path)


# ---- the paper's own files (spec 1.9, 2.2) ----


@real
@pytest.mark.parametrize(
    ("reports", "wanted", "counts"),
    [
        (["instilled_weight_reports"], (0.506, 0.489, 0.58, 46), (574, 79)),
        (["report_trained_first_50", "report_trained_last_50"], (0.752, 0.731, 0.80, 33), (994, 100)),
        (["weight_reports"], (-0.008, None, None, None), (877, 96)),
    ],
)
def test_the_papers_numbers(tmp_path, reports, wanted, counts):
    main(["--scenarios", str(REAL / "scenarios.csv"), "--out", str(tmp_path),
          "--selections", str(REAL / "gpt-4o-mini_instilled_selections.csv"),
          "--weights", str(REAL / "instilled_weights.csv"),
          "--reports", *(str(REAL / f"gpt-4o-mini_{name}.csv") for name in reports)])  # fmt: skip
    found = json.loads((tmp_path / "results.json").read_text())
    for name, value, room in zip(("pooled_r", "within_context_r", "sign_agreement", "mae"), wanted,
                                 (0.01, 0.01, 0.01, 1), strict=True):  # fmt: skip
        assert value is None or found[name]["value"] == pytest.approx(value, abs=room)
    assert (found["validity"]["valid"], found["validity"]["contexts"]) == counts
    assert found["validity"]["asked"] == 1000 and found["choices"] == {"valid": 5000, "invalid": 0, "refused": {}}
    assert found["learned_against_target"]["pooled_r"]["value"] == pytest.approx(0.871, abs=0.01)
    authors = {row["scenario"]: [float(row[f"b_attr{k}"]) for k in range(1, 6)]
               for row in csv.DictReader((REAL / "gpt-4o-mini_regression_results.csv").open())}  # fmt: skip
    both = [(authors[name], weights) for name, weights in found["learned"].items()]
    assert pearsonr(*(np.ravel(side) for side in zip(*both, strict=True)))[0] >= 0.999
