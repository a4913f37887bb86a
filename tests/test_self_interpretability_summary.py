"""From records to the table and claims: made-up weights whose agreement is known."""

import json

import numpy as np
import pytest

from steerbook.eval.report import RunFolder
from steerbook.eval.self_interpretability.agreement import partial_r, pooled_r
from steerbook.eval.self_interpretability.comparisons import instilled_r
from steerbook.eval.self_interpretability.report import show, stopped, write_report
from steerbook.eval.self_interpretability.summary import Results, claims

ROLES = ["report_train"] * 12 + ["report_dev"] * 4 + ["report_test"] * 16 + ["native"] * 8 + ["never"] * 4
NAMES = [f"c{number}" for number in range(len(ROLES))]
FOLDED = ["report_test"] * 16 + ["report_dev"] * 4 + ["report_train"] * 12 + ["native"] * 8 + ["never"] * 4


def record(seed, kind, order, learned_noise, report_noise, level="L1", roles=ROLES, fold=None, turned=1.0):
    """Weights of the world with noise of these sizes: choices follow targets, reports follow choices."""
    world, rng = np.random.default_rng(seed), np.random.default_rng([seed, order])
    contexts = {}
    for name, role in zip(NAMES, roles, strict=True):
        target = world.uniform(-100, 100, 5)
        learned = turned * target + learned_noise * rng.normal(size=5)
        one = {"role": role, "target": target.tolist(), "mass": [0.9] * 5,
               "reported": (learned + report_noise * rng.normal(size=5)).tolist(),
               "replies": 5, "valid": 4, "written": learned.tolist() if order != 1 else None}  # fmt: skip
        if role != "never":
            one |= {"learned": dict.fromkeys(("paper", "fractional", "least_squares"), learned.tolist()),
                    "halves": [learned.tolist(), (learned + 5).tolist()], "linearity": 0.9, "off_answer": 0.01,
                    "bias": 0.0, "first": 0.5, "agreement": 0.85}  # fmt: skip
        contexts[name] = one
    log = [{"step": 1, "loss/decision": 0.7}, {"step": 2, "loss/decision": 0.5}]
    return {"kind": kind, "level": level, "fold": fold, "order": order, "trained": 10, "seconds": 1.5, "log": log,
            "peak_memory_bytes": 7_000_000, "contexts": contexts, "readable": 0.8}  # fmt: skip


def arms(seed):
    return {
        "base": record(seed, "base", 0, 500, 500),
        "instilled": record(seed, "instilled", 1, 10, 100),
        "reported_0": record(seed, "reported", 2, 12, 20, fold=0),
        "reported_1": record(seed, "reported", 3, 12, 20, roles=FOLDED, fold=1),
        "shuffled": record(seed, "shuffled", 4, 12, 5000, fold=0),
        "reinstil": record(seed, "reinstil", 5, 12, 20, fold=0, turned=-1.0),
        "instilled_L3": record(seed, "instilled", 6, 100, 100, level="L3"),
        "reported_L3": record(seed, "reported", 7, 100, 100, level="L3", fold=0),
    }


def test_rows_are_the_right_comparisons():
    made = {seed: arms(seed) for seed in range(3)}
    results = Results(made)
    assert len(results.rows["2: reports on held-out contexts"][0].found) == 16 + 16  # both folds' tested halves
    assert len(results.rows["learned against target"][0].found) == 32
    for name in ("native, before report training", "3: native, after report training"):
        assert len(results.rows[name][0].found) == 8  # each context once, however many folds
    first = made[0]
    held = [name for name, one in first["reported_0"]["contexts"].items() if one["role"] == "report_test"]
    held += [name for name, one in first["reported_1"]["contexts"].items() if one["role"] == "report_test"]
    reported = [first["reported_0" if place < 16 else "reported_1"]["contexts"][name]["reported"]
                for place, name in enumerate(held)]  # fmt: skip
    learned = [first["instilled"]["contexts"][name]["learned"]["paper"] for name in held]
    wanted = np.corrcoef(np.ravel(reported), np.ravel(learned))[0, 1]
    assert pooled_r(*results.rows["2: reports on held-out contexts"][0][:2]) == pytest.approx(wanted)
    assert results.estimates("2: reports on held-out contexts")[0]["pooled_r"]["value"] == pytest.approx(wanted)
    r = {name: results.metric(name)["value"] for name in results.rows}
    assert r["learned against target"] > 0.95 > r["1: reports after instilling"] > 0.3
    assert r["1: the same, on the contexts of 2"] < r["2: reports on held-out contexts"]
    assert abs(r["control: trained on shuffled reports"]) < 0.2 and abs(r["base model's reports"]) < 0.3
    assert (
        r["new preferences: reports against old choices"]
        < -0.9
        < 0.9
        < r["new preferences: reports against new choices"]
    )
    assert 0.3 < r["L3: learned against target"] < 0.8
    assert "control: another model's reports" not in r
    # Replies written freely: here they say what was learned; and of the instilled model none can be read.
    assert r["2: the same, written freely"] > 0.9 and "1: the same, written freely" not in r
    assert results.validity()["2: reports on held-out contexts"] == {"replies": 3 * 32 * 5, "valid": 3 * 32 * 4}
    details = results.more()["0"]
    base = np.array([first["base"]["contexts"][name]["reported"] for name in held])
    left = [np.polyval(np.polyfit(np.ravel(base), np.ravel(side), 1), np.ravel(base)) - np.ravel(side)
            for side in (reported, learned)]  # fmt: skip
    found = details["partial r given the base model's reports"]
    assert found == pytest.approx(np.corrcoef(*left)[0, 1]) and found == pytest.approx(
        partial_r(reported, learned, base)
    )


def test_differences_are_of_the_same_contexts():
    """A control that reports as well as the model itself is not ahead or behind for holding one fold only."""
    made = {seed: arms(seed) for seed in range(3)}
    for found in made.values():
        found["reported_1"] = record(0, "reported", 3, 12, 400, roles=FOLDED, fold=1)
        found["shuffled"] = {**found["reported_0"], "kind": "shuffled"}
    results = Results(made)
    held_out, control = "2: reports on held-out contexts", "control: trained on shuffled reports"
    assert results.metric(held_out)["value"] < results.metric(control)["value"] - 0.1
    assert results.difference(held_out, control)["value"] == pytest.approx(0.0, abs=1e-9)


def test_claims_are_judged_by_whole_intervals():
    made = {entry["claim"]: entry for entry in claims(Results({seed: arms(seed) for seed in range(3)}))}
    assert len(made) == 7  # without another model
    held_out = made["experiment 2: reports on held-out contexts r 0.45"]
    assert held_out["supported"] and made["and 0.35 above training on shuffled reports"]["supported"]
    weak = {
        seed: {
            **arms(seed),
            "reported_0": record(seed, "reported", 2, 12, 300, fold=0),
            "reported_1": record(seed, "reported", 3, 12, 300, roles=FOLDED, fold=1),
        }
        for seed in range(3)
    }
    judged = {entry["claim"]: entry["supported"] for entry in claims(Results(weak))}
    assert not judged["experiment 2: reports on held-out contexts r 0.45"]
    assert claims(Results({0: arms(0)})) == []


def test_a_level_that_stopped_says_why():
    seeds = {seed: {"base": record(seed, "base", 0, 500, 500), "instilled": record(seed, "instilled", 1, 300, 100)}
             for seed in range(2)}  # fmt: skip
    assert instilled_r(seeds[0]["instilled"]) < 0.5
    assert list(stopped(seeds[0])) == ["L1"] and "did not take" in stopped(seeds[0])["L1"]
    results = Results(seeds)
    assert "2: reports on held-out contexts" not in results.rows and results.more() == {}


def test_a_seed_that_stopped_leaves_its_rows_and_no_claim_about_it(tmp_path, capsys):
    made = {seed: arms(seed) for seed in range(3)}
    made[1] = {"base": made[1]["base"], "instilled": record(1, "instilled", 1, 300, 100)}
    results = Results(made)
    held_out = "2: reports on held-out contexts"
    assert set(results.rows[held_out]) == {0, 2} and set(results.rows["learned against target"]) == {0, 1, 2}
    judged = {entry["claim"]: entry for entry in claims(results)}
    assert judged["experiment 2: reports on held-out contexts r 0.45"] == {
        "claim": "experiment 2: reports on held-out contexts r 0.45", "supported": False,
        "detail": "not measured with seed 1"}  # fmt: skip
    assert all(not entry["supported"] for name, entry in judged.items() if "experiment 1" not in name)
    with RunFolder(tmp_path / "run", recipe="self_interpretability", arguments={}, toy=True) as run:
        for seed in made:
            (run.path / f"seed_{seed}").mkdir(parents=True)
        write_report(run, made, {"name": "x"})
    show(run)
    output = capsys.readouterr().out
    assert "– " in output and "Seed 1, L1: instilling did not take" in output
    assert "only 80% of replies written freely are valid" in output


def test_a_failed_run_still_gets_its_report(tmp_path):
    """Halves that disagree, a probe that reads nothing, contexts that could not be fitted: said, without NaN."""
    made = arms(0)
    for one in made["instilled"]["contexts"].values():
        if "halves" in one:
            one["halves"][1] = [-weight for weight in one["halves"][0]]
            del one["linearity"]
    made["instilled"]["readable"] = -0.1
    details = Results({0: made}).more()["0"]
    assert details["reliability of learned weights"] == 0.0 and details["linearity"] == 0.0
    assert "disattenuated r" not in details and "reported of readable" not in details
    with RunFolder(tmp_path / "run", recipe="self_interpretability", arguments={}, toy=True) as run:
        write_report(run, {0: made}, {"name": "x"})
    assert run.finished


def test_reports_that_are_all_alike_leave_no_nan(tmp_path):
    made = arms(0)
    for name in ("base", "instilled", "reported_0", "reported_1"):
        for one in made[name]["contexts"].values():
            one["reported"] = [5.0] * 5
    details = Results({0: made}).more()["0"]
    assert "partial r given the base model's reports" not in details and "gain" in details
    with RunFolder(tmp_path / "run", recipe="self_interpretability", arguments={}, toy=True) as run:
        write_report(run, {0: made}, {"name": "x"})
    assert run.finished and run.results["metrics"]["after"]["pooled_r"]["value"] == 0.0


def test_the_run_folder_is_filled_and_shown(tmp_path, capsys):
    made = {seed: arms(seed) for seed in range(3)}
    with RunFolder(tmp_path / "run", recipe="self_interpretability", arguments={}, toy=True) as run:
        for seed, found in made.items():
            for name, one in found.items():
                (run.path / f"seed_{seed}" / name).mkdir(parents=True)
                (run.path / f"seed_{seed}" / name / "measured.json").write_text(json.dumps(one))
        write_report(run, made, {"name": "x"})
    show(run)
    output = capsys.readouterr().out
    for text in ("2: reports on", "control: trained on", "Seed 2: by chance",
                 "supported", "L3: learned against"):  # fmt: skip
        assert text in output
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    held_out = found["metrics"]["after"]["pooled_r"]
    assert held_out["value"] == pytest.approx(Results(made).metric("2: reports on held-out contexts")["value"])
    assert set(found["metrics"]["details"]["0"]) >= {"chance", "gain", "disattenuated r", "readable from embeddings"}
    assert {path.name for path in (tmp_path / "run" / "figures").iterdir()} == {
        "reports.png",
        "agreement.png",
        "validity.png",
        "loss.png",
    }
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 3 * 8 * len(NAMES) and json.loads(lines[0])["arm"] == "base"
