"""From records to tables, claims, figures and the run folder, on records whose numbers can be worked out by hand."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest

from steerbook.eval.atlas import normalised
from steerbook.eval.atlas.claims import claims, crossover, rule_kept
from steerbook.eval.atlas.figures import alpha_curve, coefficients_map, data_curve, disentanglement_map, layer_and_kind
from steerbook.eval.atlas.report import show, write_report
from steerbook.eval.atlas.summary import Results, arm_key, chosen_alphas, columns, per_task, read_records
from steerbook.eval.report import RunFolder
from steerbook.eval.results import screen_rows, table
from steerbook.files import write_json

TASKS = ("max", "min")


def rows(**tasks):
    """`max=[1, 0]`: two rows of the task max, of which the first is right."""
    return [
        {"id": f"{task}-{i}", "group": f"g{i}", "task": task, "correct": bool(mark), "nats": 0.5, "tokens": 1}
        | ({} if mark else {"prediction": "x"})
        for task, marks in tasks.items()
        for i, mark in enumerate(marks)
    ]


def share(right, of=20):
    return [1] * round(right * of) + [0] * (of - round(right * of))


def texts(*nats):
    return [
        {"id": f"t{i}", "group": f"t{i}", "tokens": i + 1, "nats": value * (i + 1)} for i, value in enumerate(nats)
    ]


def record(section, name, test, task=None, n=None, **more):
    return {
        "section": section, "name": name, "task": task, "n": n, "alpha": None, "trained": 0, "seconds": 2.0,
        "peak_memory_bytes": 1000, "dev": {}, "splits": {"test": test}, "log": [], "coefficients": None,
        "block_names": None, **more,
    }  # fmt: skip


def keyed(records):
    return {arm_key(r["section"], r["name"], r["task"], r["n"]): r for r in records}


def both(right, of=20):
    return rows(max=share(right, of), min=share(right, of))


BLOCKS = [f"model.layers.{i}.{kind}.weight" for i in range(3) for kind in ("self_attn.q_proj", "mlp.up_proj")]
BLOCKS.append("model.norm.weight")


def addition(alpha=0.7, isotropic=0.75, atlas=0.95, base=0.3, of=20, shift=0.0):
    found = [
        record("addition", "base", both(base, of), splits={"test": both(base, of), "control": texts(1.0, 2.0)}),
        record("addition", "alpha", both(alpha, of), alpha=0.25 + shift, dev={"accuracy": alpha},
               log=[{"alpha": a / 20, "accuracy": alpha * math.exp(-10 * (a / 20 - 0.25) ** 2)} for a in range(21)]),
        record("addition", "isotropic", both(isotropic, of), trained=2, dev={"accuracy": isotropic},
               log=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]),
        record("addition", "atlas", both(atlas, of), trained=2 * len(BLOCKS), dev={"accuracy": atlas},
               log=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 0.5}, {"train_runtime": 2.0, "num_tokens": 80.0,
                                                                            "step": 2}],
               coefficients=[[0.1 * j for j in range(len(BLOCKS))], [0.3] * len(BLOCKS)], block_names=BLOCKS,
               vectors=list(TASKS), disentanglement=[[0.0, 0.1], [0.3, 0.0]], disentanglement_tasks=list(TASKS)),
        *[record("addition", "tuned", rows(**{task: [1] * of}), task=task, trained=500) for task in TASKS],
    ]  # fmt: skip
    return found


def of_seeds(make, count=3):
    return Results({seed: keyed(make(seed)) for seed in range(count)})


def verdicts(results, toy=True):
    return {made["claim"]: made["supported"] for made in claims(results, toy)}


# --- arms, means over tasks ----------------------------------------------------------------------------------------


def test_arm_keys():
    assert arm_key("addition", "atlas") == "addition_atlas"
    assert arm_key("fewshot", "lora", "sec", 16) == "fewshot_lora_sec_n16"
    assert arm_key("data", "joint", n=2) == "data_joint_n2" and arm_key("negation", "alpha", "a-b") == (
        "negation_alpha_a-b"
    )
    for bad in (("subtraction", "atlas"), ("addition", "lofit")):
        with pytest.raises(ValueError, match="no arm"):
            arm_key(*bad)


def test_records_are_read_in_the_tables_order(tmp_path):
    made = [record("fewshot", "lora", [], task="sec", n=16), record("addition", "atlas", []),
            record("fewshot", "atlas", [], task="sec", n=4), record("addition", "base", [])]  # fmt: skip
    for key, content in keyed(made).items():
        (tmp_path / "seed_3" / key).mkdir(parents=True)
        write_json(tmp_path / "seed_3" / key / "measured.json", content)
    found = read_records(tmp_path, [3])[3]
    assert list(found) == ["addition_base", "addition_atlas", "fewshot_atlas_sec_n4", "fewshot_lora_sec_n16"]


def test_tasks_count_alike_whatever_their_size():
    test = rows(max=[1, 1, 1, 0], min=[0, 1])
    results = of_seeds(lambda s: [record("addition", "atlas", test)], 1)
    values, groups = results.questions(0, ("addition", "atlas", None), "test", "accuracy")
    assert values.mean() == pytest.approx((3 / 4 + 1 / 2) / 2) and groups == ["g0", "g1", "g2", "g3", "g0", "g1"]
    found = results.metric(("addition", "atlas", None), "test", "accuracy")
    assert found["value"] == pytest.approx(0.625) and found["high"] <= 1
    assert results.task_accuracies(0, ("addition", "atlas", None)) == {"max": 0.75, "min": 0.5}


def test_records_of_several_tasks_are_one_arm():
    results = of_seeds(lambda s: [record("fewshot", "atlas", rows(b=[1, 0, 0, 0]), task="b", n=4),
                                  record("fewshot", "atlas", rows(a=[1, 1]), task="a", n=4)])  # fmt: skip
    arm = ("fewshot", "atlas", 4)
    assert list(results.arms) == [arm]
    assert results.metric(arm, "test", "accuracy")["value"] == pytest.approx((1 + 1 / 4) / 2)
    assert results.label(arm) == "aTLAS, 4 shots" and results.sizes("fewshot") == [4]


def test_normalised_is_relative_to_the_fine_tuned_of_the_same_seed():
    tuned = {"max": [1, 1, 1, 0], "min": [1, 0, 0, 0]}
    test = rows(max=[1, 1, 0, 0], min=[0, 0, 1, 0])
    arms = [record("addition", "atlas", test)]
    arms += [record("addition", "tuned", rows(**{task: marks}), task=task) for task, marks in tuned.items()]
    results = of_seeds(lambda s: arms)
    found = results.metric(("addition", "atlas", None), "test", "normalised")["value"]
    assert found == pytest.approx((0.5 / 0.75 + 0.25 / 0.25) / 2)
    assert found == pytest.approx(normalised({"max": 0.5, "min": 0.25}, {"max": 0.75, "min": 0.25}))
    assert "normalised" in [column.title for column in columns(results, "addition")]
    hopeless = of_seeds(lambda s: [record("addition", "tuned", rows(max=[0, 0]), task="max")])
    assert [column.title for column in columns(hopeless, "addition")] == ["accuracy"]  # nothing to divide by


def test_target_and_control_of_a_negation():
    test = rows(a=[1, 0], b=[1, 1, 1, 0], c=[0, 0])
    made = [record("negation", "base", test),
            record("negation", "atlas", rows(a=[0, 0], b=[1, 1, 1, 1], c=[0, 0]), task="a"),
            record("negation", "atlas", rows(a=[1, 1], b=[0, 0, 0, 1], c=[1, 0]), task="b")]  # fmt: skip
    results = of_seeds(lambda s: made, 1)
    base, atlas = ("negation", "base", None), ("negation", "atlas", None)
    value = {
        (arm[1], name): results.metric(arm, "test", name)["value"]
        for arm in (base, atlas)
        for name in ("target", "control")
    }
    assert value["base", "target"] == pytest.approx((1 / 2 + 3 / 4) / 2)  # of a and b, the tasks that are forgotten
    assert value["base", "control"] == pytest.approx(((3 / 4 + 0) / 2 + (1 / 2 + 0) / 2) / 2)
    assert value["atlas", "target"] == pytest.approx((0 + 1 / 4) / 2)
    assert value["atlas", "control"] == pytest.approx(((1 + 0) / 2 + (1 + 1 / 2) / 2) / 2)
    found = results.combination({base: 1, atlas: -1}, "test", "target")  # row against row, target by target
    assert found["value"] == pytest.approx(value["base", "target"] - value["atlas", "target"])


def test_table_and_screen():
    results = of_seeds(lambda s: addition(atlas=0.9 + 0.05 * (s == 1), shift=0.05 * s))
    shown = columns(results, "addition")
    assert [column.title for column in shown] == [
        "accuracy", "normalised", "control perplexity", "disentanglement error"]  # fmt: skip
    found = {row["method"]: row for row in table(results, shown, results.of("addition"))}
    atlas = found["aTLAS"]
    assert atlas["accuracy"]["seeds"] == pytest.approx([0.9, 0.95, 0.9]) and atlas["parameters"] == 14
    assert atlas["accuracy"]["value"] == pytest.approx(2.75 / 3) == atlas["normalised"]["value"]
    assert atlas["disentanglement error"]["value"] == pytest.approx(0.2) and atlas["tokens_per_second"] == 40
    assert found["base"]["control perplexity"]["value"] == pytest.approx(math.exp((1 + 2 * 2) / 3))
    assert found["fine-tuned singles"]["accuracy"]["value"] == 1 and "control perplexity" not in atlas
    lines = {line["method"]: line for line in screen_rows(list(found.values()), shown)}
    assert lines["aTLAS"]["each seed"] == "90 95 90" and lines["aTLAS"]["accuracy"].startswith("91.7 [")
    assert per_task(results)["base"] == pytest.approx({"max": 0.3, "min": 0.3})
    assert chosen_alphas(results, "addition") == {"all": pytest.approx([0.25, 0.30, 0.35])}


def test_arms_on_other_rows_are_not_compared():
    results = of_seeds(lambda s: [record("addition", "atlas", rows(max=[1, 1])),
                                  record("addition", "alpha", rows(max=[1, 1, 1]))])  # fmt: skip
    with pytest.raises(ValueError, match="seed 0: aTLAS, best single alpha were measured on different rows of test"):
        results.combination({("addition", "atlas", None): 1, ("addition", "alpha", None): -1}, "test", "accuracy")


# --- claims --------------------------------------------------------------------------------------------------------


def test_clear_effects_of_the_addition_are_supported_and_others_are_not():
    assert verdicts(of_seeds(lambda s: addition(of=200))) == {
        "addition: best single alpha reaches below 85 %": True,
        "addition: learned isotropic reaches below 85 %": True,
        "addition: aTLAS reaches at least 90 %": True,
        "addition: aTLAS at least 10 points above learned isotropic": True,
    }
    found = verdicts(of_seeds(lambda s: addition(alpha=0.8 + 0.05 * s, isotropic=0.84, atlas=0.92, of=200)))
    assert found == {
        "addition: best single alpha reaches below 85 %": False,
        "addition: learned isotropic reaches below 85 %": False,  # 84 alone is below, its interval is not
        "addition: aTLAS reaches at least 90 %": False,
        "addition: aTLAS at least 10 points above learned isotropic": False,  # 8 points
    }


def test_real_models_are_promised_no_numbers():
    assert verdicts(of_seeds(lambda s: addition(isotropic=0.88, of=200)), toy=False) == {
        "addition: aTLAS above learned isotropic": True,
        "addition: aTLAS above best single alpha": True,
    }


def test_fewer_than_three_seeds_judge_nothing():
    assert claims(of_seeds(lambda s: addition(), 2), True) == []


def test_few_shot_claims():
    def make(seed):
        return [
            record("fewshot", name, rows(**{task: share(right, 100)}), task=task, n=n)
            for n, finetune, lora in ((4, 0.7, 0.9 + 0.03 * seed), (16, 0.8, 0.5))
            for name, right in (("atlas", 0.93), ("finetune", finetune), ("lora", lora))
            for task in ("sec", "smax")
        ]

    assert verdicts(of_seeds(make)) == {
        "few-shot: aTLAS above fine-tuning at 4 shots": True,
        "few-shot: aTLAS above LoRA at 4 shots": False,
        "few-shot: aTLAS above fine-tuning at 16 shots": True,
        "few-shot: aTLAS above LoRA at 16 shots": True,
    }


def test_budget_claims():
    def make(seed):
        return [
            record("budget", name, rows(**{task: share(right, 100)}), task=task, n=2)
            for name, right in (("random", 0.7), ("gradient", 0.8 + 0.01 * seed), ("blockwise", 0.6 + 0.1 * seed))
            for task in ("sec", "smax")
        ]

    results = of_seeds(make)
    assert results.label(("budget", "blockwise", 2)) == "vectors by gradient, by block, 2 of them"
    assert verdicts(results) == {
        "budget: vectors by gradient above random vectors, 2 of them": True,
        "budget: vectors by gradient, by block above random vectors, 2 of them": False,
    }


def negation(target, control, dev_control=0.97):
    test = {task: share(0.9, 100) for task in ("a", "b", "c")}
    made = [record("negation", "base", rows(**test))]
    for name, left, kept in (("alpha", 0.4, 0.87), ("atlas", target, control)):
        for task in ("a", "b"):
            marks = {other: share(left if other == task else kept, 100) for other in test}
            made.append(record("negation", name, rows(**marks), task=task, alpha=0.5,
                               dev={"target": left, "control": dev_control, "base_control": 1.0,
                                    "control_share": 0.95}))  # fmt: skip
    return made


def test_negation_claims():
    below = "negation: aTLAS's target below the alpha search's, with control within the rule"
    keeps = "negation: aTLAS keeps over 95 % of the base's control on test rows (the surplus)"
    assert verdicts(of_seeds(lambda s: negation(0.1, 0.9))) == {below: True, keeps: True}
    assert verdicts(of_seeds(lambda s: negation(0.1, 0.5))) == {below: True, keeps: False}
    assert verdicts(of_seeds(lambda s: negation(0.45, 0.9))) == {below: False, keeps: True}
    broken = of_seeds(lambda s: negation(0.1, 0.9, dev_control=0.94 if s == 1 else 0.95))
    assert rule_kept(broken) == (4, 6) and verdicts(broken) == {below: False, keeps: True}
    (detail,) = [made["detail"] for made in claims(broken, True) if made["claim"] == below]
    assert detail.endswith("; control on dev rows at least 95 % of the base's in 4 of 6")
    assert chosen_alphas(broken, "negation") == {"a": [0.5] * 3, "b": [0.5] * 3}


def data(joint):
    return [record("data", name, both(right), n=n) for name, each in (("atlas", {2: 0.8, 8: 0.9, 32: 0.95}),
            ("joint", joint)) for n, right in each.items()]  # fmt: skip


def test_crossover():
    assert crossover(of_seeds(lambda s: data({2: 0.5, 8: 0.8, 32: 1.0}))) == {"rows_per_task": 32, "up_to": 32}
    assert crossover(of_seeds(lambda s: data({2: 0.5, 8: 0.95, 32: 1.0})))["rows_per_task"] == 8
    equal = of_seeds(lambda s: data({2: 0.5, 8: 0.8, 32: 0.95}))
    assert crossover(equal) == {"rows_per_task": None, "up_to": 32}  # as good is not ahead
    assert crossover(of_seeds(lambda s: addition())) is None


# --- the run folder ------------------------------------------------------------------------------------------------


def everything(seed):
    shots = [
        record("fewshot", name, rows(sec=share(right + 0.05 * (n == 16))), task="sec", n=n, trained=3)
        for n in (4, 16)
        for name, right in (("finetune", 0.6), ("lora", 0.6), ("isotropic", 0.7), ("atlas", 0.8))
    ]
    base = record("fewshot", "base", rows(sec=share(0.2)), task="sec")
    return [*addition(), *data({2: 0.5, 8: 0.8, 32: 1.0}), base, *shots, *negation(0.1, 0.9)]


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_run_folder_is_filled_and_shown(tmp_path, capsys, seeds):
    path = tmp_path / "run"
    with RunFolder(path, recipe="atlas", arguments={}, toy=True) as run:
        for seed in range(seeds):
            for key, content in keyed(everything(seed)).items():
                (path / f"seed_{seed}" / key).mkdir(parents=True)
                write_json(path / f"seed_{seed}" / key / "measured.json", content)
        write_report(run, read_records(path, range(seeds)), {"name": "tiny_lm", "folder": "seed_0/base_model"})
    show(run)
    output = capsys.readouterr().out
    found = json.loads((path / "results.json").read_text())
    assert found["status"] == "finished" and found["metrics"]["after"]["accuracy"]["value"] == pytest.approx(0.95)
    assert len(found["metrics"]["after"]["accuracy"]["seeds"]) == seeds
    assert found["metrics"]["per_task"]["tasks"] == list(TASKS) and found["metrics"]["per_task"]["base"] == [0.3, 0.3]
    assert found["metrics"]["crossover"] == {"rows_per_task": 32, "up_to": 32}
    assert "Joint fine-tuning is ahead of aTLAS from: 32 rows a task" in output
    assert found["metrics"]["fewshot"]["fewshot: aTLAS, 16 shots"]["accuracy"]["value"] == pytest.approx(0.85)
    assert found["metrics"]["negation"]["negation: aTLAS"]["target"]["value"] == pytest.approx(0.1)
    assert found["cost"]["peak_memory_bytes"]["aTLAS"] == 1000 and found["trainable_parameters"]["aTLAS"] == 14
    assert (len(found["claims"]) == 10) == (seeds == 3) and ("not supported" in output) == (seeds == 3)
    assert ("Claims are judged from three seeds on" in output) == (seeds == 1) == bool(found["metrics"]["paired"])
    samples = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
    assert {s["arm"] for s in samples} == {key for key in keyed(everything(0)) if key.startswith("addition")}
    figures = {"addition", "alpha", "data", "fewshot", "negation", "disentanglement"}
    figures |= {f"{kind}_seed_{seed}" for kind in ("coefficients", "loss") for seed in range(seeds)}
    assert {file.stem for file in (path / "figures").glob("*.png")} == figures
    card = (path / "README.md").read_text()
    assert "| aTLAS |" not in card and "| after |" in card and "| fewshot: aTLAS, 16 shots |" in card
    assert "PeftModel" not in card  # composed weights are no adapter


def test_a_run_without_some_sections(tmp_path, capsys):
    with RunFolder(tmp_path, recipe="atlas", arguments={}, toy=True) as run:
        records = {0: keyed(negation(0.1, 0.9))}
        for key, content in records[0].items():
            (tmp_path / "seed_0" / key).mkdir(parents=True)
            write_json(tmp_path / "seed_0" / key / "measured.json", content)
        write_report(run, records, {"name": "org/base", "revision": None})
    show(run)
    assert "All tasks at once" not in capsys.readouterr().out
    assert {file.stem for file in (tmp_path / "figures").glob("*.png")} == {"negation"}


# --- figures -------------------------------------------------------------------------------------------------------


def test_layers_and_kinds():
    places, kinds = layer_and_kind(
        ["embed.weight", "model.layers.0.q.weight", "model.layers.11.q.weight", "norm.bias"]
    )
    assert places == [(None, "embed.weight"), (0, "q.weight"), (11, "q.weight"), (None, "norm.bias")]
    assert kinds == ["embed.weight", "q.weight", "norm.bias"]
    places, _ = layer_and_kind(["vision.layers.0.q", "text.layers.0.q"])
    assert places == [(0, "vision.layers.*.q"), (0, "text.layers.*.q")]
    assert layer_and_kind(["all", "norm1.weight"])[0] == [(None, "all"), (None, "norm1.weight")]
    places, kinds = layer_and_kind(["model.layers.0", "model.layers.1", "model.norm"])  # blocks="layer"
    assert places == [(0, "model.layers"), (1, "model.layers"), (None, "model.norm")]


def test_figures_are_the_same_bytes_each_time(tmp_path):
    made = []
    for attempt in ("a", "b"):
        folder = tmp_path / attempt
        folder.mkdir()
        value = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 4}
        alone = {"value": 0.7, "low": None, "high": None, "n": 1}
        coefficients_map(np.ones((2, 7)), BLOCKS, TASKS, folder / "1.png", title="t")
        coefficients_map([[0.0]], ["all"], ["x"], folder / "2.png", title="isotropic, and nothing learned")
        disentanglement_map([[0.0, 0.0], [0.0, 0.0]], TASKS, folder / "3.png", title="t")
        alpha_curve([[(0.0, 0.1), (1.0, 0.2)]], {}, folder / "4.png", title="t")
        data_curve({"aTLAS": {2: value, 8: alone}, "joint": {8: value}}, folder / "5.png", title="t")
        made.append([file.read_bytes() for file in sorted(folder.iterdir())])
    assert made[0] == made[1] and all(4_000 < len(content) < 200_000 for content in made[0])
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_figures_refuse(tmp_path):
    path = tmp_path / "x.png"
    for bad in ([[1.0]], [[math.nan] * 7] * 2):
        with pytest.raises(ValueError, match=r"must be finite and \[2 vectors, 7 blocks\]"):
            coefficients_map(bad, BLOCKS, TASKS, path, title="t")
    with pytest.raises(ValueError, match=r"shares must be \[2, 2\]"):
        disentanglement_map([[0.0, 1.5], [0.0, 0.0]], TASKS, path, title="t")
    with pytest.raises(ValueError, match="all at the same alphas"):
        alpha_curve([[(0.0, 0.1)], [(0.5, 0.1)]], {}, path, title="t")
    with pytest.raises(ValueError, match="at least one number of rows"):
        data_curve({}, path, title="t")
    assert not path.exists()
