"""From measurements to table and claims, on records whose numbers can be worked out by hand."""

import pytest

from steerbook.eval.lofit.summary import Results, claims, columns, comparisons, overlaps
from steerbook.eval.results import screen_rows, table


def samples(values, metric="mc1"):
    return [{"id": f"q{i}", "group": f"q{i}", "metrics": {metric: float(v), "mc2": 0.5}} for i, v in enumerate(values)]


def record(name, values, k=None, draw=0, trained=0, heads=None, **splits):
    measured = {"test": samples(values), **{split: samples(content) for split, content in splits.items()}}
    return {"name": name, "k": k, "draw": draw, "trained": trained, "seconds": 2.0, "heads": heads, "splits": measured,
            "peak_memory_bytes": 5_000_000}  # fmt: skip


def seed(base, lofit, draws=(), lora=None, marker=None, heads=((0, 1), (1, 0)), **collateral):
    arms = {
        "base": {
            **record("base", base, **collateral),
            "total_heads": 20,
            "ks": [2],
            "loss": "sft",
            "base_fingerprint": "one",
        }
    }
    if marker is not None:
        arms["marker"] = record("marker", marker)
    arms["lofit_k2"] = record("lofit", lofit, k=2, trained=10, heads=[list(head) for head in heads], **collateral)
    for number, values in enumerate(draws, 1):
        arms[f"random_k2_draw{number}"] = record("random", values, k=2, draw=number, trained=10)
    if lora is not None:
        arms["lora"] = record("lora", lora, trained=5000)
    return arms


def verdicts(results):
    return {claim["claim"]: claim["supported"] for claim in claims(results, columns(first_splits(results))[0])}


def first_splits(results):
    return results.records[results.seeds[0]]["base"]["splits"]


def test_draws_are_averaged_question_by_question():
    results = Results({0: seed([0, 0], [1, 1], draws=([1, 0], [1, 0], [0, 0], [0, 1]))})
    values, groups = results.questions(0, ("random", 2), "test", "mc1")
    assert values.tolist() == [0.5, 0.25] and groups == ["q0", "q1"]
    found = results.combination({("lofit", 2): 1, ("random", 2): -1}, "test", "mc1")
    assert found["value"] == pytest.approx(0.625)


def test_table_and_screen():
    records = {s: seed([0, 0, 0, 1], [1, 1, 1, s % 2], lora=[1, 1, 1, 1]) for s in range(3)}
    results = Results(records)
    shown = columns(first_splits(results))
    assert [column.title for column in shown] == ["MC1", "MC2"]
    rows = {row["method"]: row for row in table(results, shown)}
    assert list(rows) == ["base", "LoFiT 10 %", "LoRA r=8"]
    assert rows["LoFiT 10 %"]["MC1"]["value"] == pytest.approx((0.75 + 1 + 0.75) / 3)
    assert rows["LoFiT 10 %"]["MC1"]["seeds"] == [0.75, 1.0, 0.75] and rows["LoFiT 10 %"]["parameters"] == 10
    lines = screen_rows(table(results, shown), shown)
    assert lines[1]["each seed"] == "75 100 75" and lines[1]["MC1"].startswith("83.3 [")


def test_perplexity_is_the_exponential_of_the_mean():
    arms = seed([0, 1], [1, 1])
    for arm in arms.values():
        arm["splits"]["text"] = samples([1.0, 3.0], metric="nats_per_token")
    row = table(Results({0: arms}), columns(arms["base"]["splits"]))[0]
    assert row["perplexity"]["value"] == pytest.approx(7.389056, abs=1e-5)


def test_clear_effects_are_supported_and_noise_is_not():
    base, good = [0] * 40, [1] * 40
    records = {s: seed(base, good, draws=([0, 1] * 20,), lora=good, marker=good, control=good) for s in range(3)}
    found = verdicts(Results(records))
    assert found["the base prefers the misconception (MC1 at most 30 %)"]
    assert found["LoFiT on 10 % of the heads gains over 75 points on held-out questions"]
    assert found["learned heads beat random heads at 10 %"]
    assert found["LoFiT on 10 % loses less than 5 points on facts without a misconception"]
    lora = next(text for text in found if "LoRA" in text)
    assert found[lora]  # 5,000 numbers against 10

    same = {s: seed(base, [s % 2] * 40, draws=([(s + 1) % 2] * 40,), marker=good) for s in range(3)}
    found = verdicts(Results(same))
    assert not found["learned heads beat random heads at 10 %"]
    assert not found["LoFiT on 10 % of the heads gains over 75 points on held-out questions"]


def test_lora_needs_a_hundred_times_more_numbers():
    records = {s: seed([0] * 9, [1] * 9, lora=[1] * 9) for s in range(3)}
    for arms in records.values():
        arms["lora"]["trained"] = 1000  # exactly 100 times
    (claim,) = [c for c in claims(Results(records), columns(records[0]["base"]["splits"])[0]) if "LoRA" in c["claim"]]
    assert not claim["supported"] and "100 times fewer" in claim["detail"]


def test_fewer_than_three_seeds_judge_nothing():
    assert verdicts(Results({s: seed([0, 0], [1, 1]) for s in range(2)})) == {}


def test_collateral_damage_is_not_hidden():
    records = {s: seed([0] * 30, [1] * 30, marked=[1] * 30) for s in range(3)}
    for arms in records.values():
        arms["lofit_k2"]["splits"]["marked"] = samples([1] * 20 + [0] * 10)
    assert not verdicts(Results(records))["LoFiT on 10 % loses less than 5 points on what unreliable sources say"]


def test_overlap_of_heads():
    records = {0: seed([0], [1]), 1: seed([0], [1], heads=((0, 1), (1, 5))), 2: seed([0], [1], heads=((1, 0), (0, 1)))}
    found = overlaps(Results(records))["k=2"]
    assert found["pairs"] == [1, 2, 1] and found["chance"] == pytest.approx(2 * 2 / 20)
    records[1]["base"]["base_fingerprint"] = "another"
    assert overlaps(Results(records)) == {}  # heads of different bases have nothing in common but their numbers
    for arms, again in zip(records.values(), ([[0, 1], [1, 0]], [[0, 1], [0, 2]], [[3, 3], [2, 2]]), strict=True):
        arms["lofit_k2"]["heads_again"] = again
    found = overlaps(Results(records))["k=2"]
    assert found == {"observed": 1.0, "chance": pytest.approx(0.2), "pairs": [2, 1, 0]}


def test_one_seed_is_compared_on_its_questions():
    results = Results({0: seed([0] * 12, [1] * 12, lora=[1] * 11 + [0])})
    found = comparisons(results, columns(first_splits(results))[0])
    assert found["base"]["difference"] == 1 and found["base"]["p_value"] == pytest.approx(2 / 2**12)
    assert found["LoRA r=8"]["p_value"] == 1 and comparisons(Results({0: results.records[0], 1: results.records[0]}),
                                                             columns(first_splits(results))[0]) == {}  # fmt: skip


def test_equal_differences_are_not_certainty():
    found = Results({s: seed([1] * 40, [1] * 40) for s in range(3)}).combination({("lofit", 2): 1, ("base", None): -1},
                                                                              "test", "mc1")  # fmt: skip
    assert found["value"] == 0 and found["high"] == -found["low"] == pytest.approx(3.84 / 123.84)
