"""Rows of the hinting tasks: every target re-derived by brute force, streams that repeat, tests that no stream has."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from steerbook.data_builders.task_hinting import (
    HintingDataArguments,
    build,
    contradictions,
    make_family,
    make_stream,
    tasks,
    test_sets,
)
from steerbook.data_builders.task_hinting.arrays import NumpyArrays
from steerbook.data_builders.task_hinting.counting import Counting
from steerbook.data_builders.task_hinting.digits import Addition, Increment
from steerbook.data_builders.task_hinting.family import make_rows
from steerbook.data_builders.task_hinting.sorting import Sorting
from steerbook.data_builders.task_hinting.stream import Stream, Task, held

test_sets.__test__ = False  # not a test of pytest's

END = "<eos>"
FAMILIES = {
    "sort, different": Sorting(12),
    "sort, repetitions": Sorting(9, repetitions=True),
    "increment": Increment(),
    "increment, reversed": Increment(reverse=True),
    "addition": Addition(),
    "addition, reversed": Addition(reverse=True),
    "letters": Counting("letters", 3),
    "words": Counting("words", 4),
}
EVERY = [(name, task) for name, family in FAMILIES.items() for task in (family.main, *family.hints)]


def words_of(family, rows, row):
    """(word, whether it carries loss) of a row, without its padding."""
    names = family.vocabulary
    pairs = [(names[i], bool(t)) for i, t in zip(rows.ids[row], rows.targets[row], strict=True)]
    while pairs and pairs[-1][0] == "<pad>":
        pairs.pop()
    assert "<pad>" not in [word for word, _ in pairs], "padding stands at the end"
    return pairs


def sorting_answer(task, items, asked):
    """What follows the mark, as (word, loss); `asked`: the items a hint row asks about, in turn."""
    ordered = sorted(items)
    if task in ("sort", "restrict"):
        return [(x, True) for x in [*ordered, END]]
    if task == "copy_list":
        return [(x, True) for x in [*items, END]]
    if task in ("min", "max"):
        return [(min(items) if task == "min" else max(items), True)]
    found = []
    for x in asked:
        above, below = [y for y in ordered if y > x], [y for y in ordered if y < x]
        successor = above[0] if above else END
        answers = {
            "successor": [successor],
            "predecessor": [below[-1] if below else END],
            "count": [items.count(x)],
            "copy": [x],
            "parity": [x % 2],
            "run": [x] * (items.count(x) - 1) + [successor],
        }
        found += [(x, False), *((y, True) for y in answers[task])]
    return found


@pytest.mark.parametrize("repetitions", [False, True])
@pytest.mark.parametrize("task", [t for t in ("sort", *Sorting.hints) if t != "fill"])
def test_sorting_by_brute_force(task, repetitions):
    family, arrays = Sorting(15, repetitions), NumpyArrays(3)
    lengths = arrays.integers(1, 8, (300,))
    rows = make_rows(family, arrays, task, lengths, 7, queries=3)
    seen = Counter()
    for row in range(300):
        words = words_of(family, rows, row)
        mark = "=>" if task == "sort" else f"<{task}>"
        place = [word for word, _ in words].index(mark)
        assert place == rows.lengths[row] == rows.questions[row] == lengths[row]
        assert not any(loss for _, loss in words[: place + 1])
        items = [int(word) for word, _ in words[:place]]
        assert repetitions or len(set(items)) == len(items)
        asked, rest = [], words[place + 1 :]
        if task in ("successor", "predecessor", "count", "copy", "parity"):
            asked = [int(word) for word, _ in rest[::2]]
            assert len(asked) == 3
        if task == "run":
            asked = [int(word) for word, loss in rest if not loss]
            assert len(asked) == 1
        assert set(asked) <= set(items)
        assert rest == [(str(word), loss) for word, loss in sorting_answer(task, items, asked)]
        seen.update(word for word, loss in rest if loss)
    if task in ("successor", "predecessor", "run"):
        assert seen[END] > 20  # an extreme item is asked about as well
    assert set(map(int, lengths)) == set(range(1, 8))


@pytest.mark.parametrize("repetitions", [False, True])
def test_fill_by_brute_force(repetitions):
    family, arrays = Sorting(15, repetitions), NumpyArrays(4)
    rows = make_rows(family, arrays, "fill", arrays.integers(1, 8, (300,)), 7)
    shares = []
    for row in range(300):
        words = words_of(family, rows, row)
        n = int(rows.lengths[row])
        ordered = sorted(int(word) for word, _ in words[:n])
        shown, rest = [word for word, _ in words[n + 1 : 2 * n + 1]], words[2 * n + 1 :]
        assert words[n][0] == "<fill>" and rest[0] == ("=>", False) and rest[-1] == (END, True)
        told = iter([int(word) for word, loss in rest[1:-1] if loss])
        assert [next(told) if word == "_" else int(word) for word in shown] == ordered
        assert next(told, None) is None and "_" in shown
        shares.append(shown.count("_") / n)
    assert 0.5 < np.mean(shares) < 0.75


def number_of(words):
    return "".join(word for word, _ in words)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("task", ["increment", *Increment.hints])
def test_increment_by_brute_force(task, reverse):
    family, arrays = Increment(reverse, nines=0.5), NumpyArrays(5)
    rows = make_rows(family, arrays, task, arrays.integers(1, 7, (400,)), 6, queries=2)
    carries = Counter()
    for row in range(400):
        words = words_of(family, rows, row)
        n = int(rows.lengths[row])
        text, answer = number_of(words[:n]), words[n + 1 :]
        assert len(text) == n and (n == 1 or text[0] != "0")
        run = n - len(text.rstrip("9"))
        carries[run] += 1
        if task == "digit":
            asked = [word for word, loss in answer if not loss]
            assert set(asked) <= set(text) and len(asked) == 2
            assert [word for word, loss in answer if loss] == [str((int(x) + 1) % 10) for x in asked]
            continue
        changed = "".join("1" if place >= n - run - 1 else "0" for place in range(n))
        wanted = {"increment": str(int(text) + 1), "carry": changed, "nines": "9" * run, "copy": text}[task]
        wanted = wanted[::-1] if reverse else wanted
        assert answer == [(x, True) for x in [*wanted, END]]
    assert min(carries[run] for run in range(5)) > 15  # long carries are seen often


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("task", ["addition", *Addition.hints])
def test_addition_by_brute_force(task, reverse):
    family, arrays = Addition(reverse), NumpyArrays(6)
    rows = make_rows(family, arrays, task, arrays.integers(1, 7, (400,)), 6)
    longer = 0
    for row in range(400):
        words = words_of(family, rows, row)
        n = int(rows.lengths[row])
        a, b, answer = number_of(words[:n]), number_of(words[n + 1 : 2 * n + 1]), words[2 * n + 2 :]
        assert words[n][0] == "+" and rows.questions[row] == 2 * n + 1
        carry, out, plain = 0, "", ""
        for x, y in zip(reversed(a), reversed(b), strict=True):
            carry = int(int(x) + int(y) + carry >= 10)
            out, plain = str(carry) + out, str((int(x) + int(y)) % 10) + plain
        wanted = {"addition": str(int(a) + int(b)), "no_carry": plain, "carry": out, "copy": a}[task]
        longer += len(wanted) > n
        wanted = wanted[::-1] if reverse else wanted
        assert answer == [(x, True) for x in [*wanted, END]]
    assert task != "addition" or longer > 50


@pytest.mark.parametrize("kind", ["letters", "words"])
@pytest.mark.parametrize("task", ["count", *Counting.hints])
def test_counting_by_brute_force(task, kind):
    family, arrays = Counting(kind, 3), NumpyArrays(7)
    rows = make_rows(family, arrays, task, arrays.integers(1, 7, (200,)), 6)
    for row in range(200):
        words = words_of(family, rows, row)
        n = int(rows.lengths[row])
        items, (item, loss), answer = [word for word, _ in words[:n]], words[n + 1], words[n + 2 :]
        assert not loss
        times = items.count(item)
        wanted = {"count": [item] * times + [END], "member": ["yes" if times else "no"], "copy": [item]}[task]
        assert answer == [(x, True) for x in wanted]


def test_text_says_the_same():
    """Prompt and completion of every family's main task, solved from the text alone."""

    def rows(args):
        data = build(HintingDataArguments(**args, train_rows=150, test_lengths=[5, 9], test_rows=20))
        assert set(data) == {"train", "test_5", "test_9"} and len(data["train"]) == 225
        return [row for row in (*data["train"], *data["test_9"]) if row["role"] == "main"]

    for row in rows({"main": "sort", "repetitions": True}):
        items = row["prompt"].removeprefix("Sort: ").removesuffix(" =>").split()
        assert len(items) == row["items"]
        assert row["completion"] == "".join(f" {x}" for x in sorted(items, key=int))
    for row in rows({"main": "addition", "hints": ["carry"]}):
        a, b = row["prompt"].removeprefix("Addition: ").removesuffix(" =>").split(" + ")
        assert row["completion"] == f" {int(a) + int(b)}"
    for row in rows({"main": "increment", "hints": ["nines"]}):
        assert row["completion"] == f" {int(row['prompt'][len('Increment: ') : -3]) + 1}"
    for row in rows({"main": "count", "hints": ["member"], "counted": "words"}):
        item, _, listed = row["prompt"].removeprefix("Count ").removesuffix(" =>").partition(" in: ")
        assert row["completion"] == f" {listed.split().count(item)}"


@pytest.mark.parametrize(("name", "task"), EVERY)
def test_no_text_is_empty(name, task):
    family, arrays = FAMILIES[name], NumpyArrays(8)
    rows = make_rows(family, arrays, task, arrays.integers(1, 6, (60,)), 5)
    for ids, targets in zip(rows.ids.tolist(), rows.targets.tolist(), strict=True):
        prompt, completion = family.text(task, ids, targets)
        assert completion.startswith(" ") and completion.strip() and "<" not in prompt + completion
        assert "=>" in prompt and not prompt.endswith(" ")


def test_a_step_is_a_function_of_seed_and_number():
    args = HintingDataArguments(hints=["successor", "max"], mix="fixed", rows_seed=3)
    first, again = make_stream(args), make_stream(args)
    numbers = [0, 1, 2, 70, 200]
    steps = {number: first.step(number) for number in numbers}
    random.Random(0).shuffle(numbers)
    for number in numbers:
        for ours, theirs in zip(steps[number], again.step(number), strict=True):
            assert np.array_equal(ours, theirs)
    flat = [step.ids.tobytes() for step in steps.values()]
    assert len(set(flat)) == len(flat)
    other = make_stream(HintingDataArguments(hints=["successor", "max"], rows_seed=4)).step(0)
    assert not np.array_equal(other.ids, steps[0].ids)


def test_the_same_main_rows_with_and_without_hints():
    """Arms differ in what is added, not in what the main task sees."""
    args = HintingDataArguments()
    alone, beside = make_stream(args, hints=[]).step(5), make_stream(args).step(5)
    width = alone.ids.shape[1]
    assert np.array_equal(alone.ids, beside.ids[:64, :width]) and not beside.ids[:64, width:].any()


def test_mixes():
    family = Sorting(20)
    given = [Task("sort", 6, 2, 5), Task("min", 3, 2, 5), Task("max", 1, 2, 5)]

    def counts(mix):
        stream = Stream(family, given, 0, mix)
        return [np.bincount(stream.step(number).tasks, minlength=3).tolist() for number in range(300)]

    assert counts("fixed") == [[6, 3, 1]] * 300
    turns = np.array(counts("alternate"))
    assert set(map(tuple, turns.tolist())) == {(10, 0, 0), (0, 10, 0), (0, 0, 10)}
    assert (turns.reshape(30, 10, 3).mean(1) == [6, 3, 1]).all()  # in each round as many rows of each as "fixed" has
    turns = [
        Stream(family, [Task("sort", 64, 2, 5), Task("min", 32, 2, 5)], 0, "alternate")._counts(n) for n in range(4)
    ]
    assert turns == [[96, 0], [0, 96], [96, 0], [96, 0]]
    drawn = np.array(counts("random"))
    assert (drawn.sum(1) == 10).all() and len(set(map(tuple, drawn.tolist()))) > 10
    assert np.abs(drawn.mean(0) - [6, 3, 1]).max() < 0.35  # five standard errors
    stream = Stream(family, given, 0, "random")
    names = family.vocabulary
    for task, ids in zip(stream.step(7).tasks, stream.step(7).ids, strict=True):
        assert ("=>", "<min>", "<max>")[task] in [names[token] for token in ids]


@pytest.mark.parametrize("mix", ["fixed", "random", "alternate"])
@pytest.mark.parametrize(("hints", "extra"), [([], 0), ([], 3), (["successor"], 0)])
@pytest.mark.parametrize(("main_rows", "hint_rows"), [(6, 3), (10, 10), (7, 3)])
def test_every_arm_has_the_same_finite_rows_of_the_main_task(mix, hints, extra, main_rows, hint_rows):
    """However many come at a step: the first `train_rows` of the endless stream, again and again, in their order."""
    args = {"main_rows": main_rows, "hint_rows": hint_rows, "mix": mix}
    stream = make_stream(HintingDataArguments(**args, train_rows=20), hints, extra)
    endless = make_stream(HintingDataArguments(main_rows=20, hint_rows=20 * hint_rows // main_rows), hints).step(0)
    given = [[np.trim_zeros(ids).tobytes() for ids in endless.ids[endless.tasks == task]] for task in (0, 1)]
    seen: dict[int, list[bytes]] = {0: [], 1: []}
    for number in range(60):
        step = stream.step(number)
        for ids, task in zip(step.ids, step.tasks.tolist(), strict=True):
            seen[task].append(np.trim_zeros(ids).tobytes())
    for rows, wanted in zip(seen.values(), given, strict=True):
        assert set(rows) == set(wanted)
        assert mix != "fixed" or all(row == wanted[place % len(wanted)] for place, row in enumerate(rows))


def test_longer_lengths_are_drawn_in_proportion():
    stream = Stream(Sorting(20), [Task("sort", 4096, 2, 5, "longer")], 0)
    lengths = np.bincount(stream.step(0).lengths, minlength=6)[2:] / 4096
    assert np.abs(lengths - np.array([2, 3, 4, 5]) / 14).max() < 0.04
    uniform = Stream(Sorting(20), [Task("sort", 4096, 2, 5)], 0).step(0).lengths
    assert np.abs(np.bincount(uniform, minlength=6)[2:] / 4096 - 0.25).max() < 0.04


@pytest.mark.parametrize("main", ["sort", "increment", "addition", "count"])
def test_no_stream_has_a_test_question(main):
    hints = {"sort": ["successor"], "increment": ["digit"], "addition": ["carry"], "count": ["member"]}[main]
    args = HintingDataArguments(
        main=main, hints=hints, values=8, shortest=3, longest=4, test_lengths=[3, 4, 7], test_rows=40, mix="random"
    )
    sets = test_sets(args)
    assert {n: set(rows.lengths.tolist()) for n, rows in sets.items()} == {3: {3}, 4: {4}, 7: {7}}
    tested = {
        tuple(ids[:count]) for rows in sets.values() for ids, count in zip(rows.ids, rows.questions, strict=True)
    }
    marks = {token for token, name in enumerate(make_family(args).vocabulary) if name == "=>" or name[0] == "<"} - {0}
    trained = set()
    for seed in (0, 1):
        stream = make_stream(HintingDataArguments(**{**vars(args), "rows_seed": seed}))
        for number in range(100):
            for ids in stream.step(number).ids.tolist():
                trained.add(tuple(ids[: next(place for place, token in enumerate(ids) if token in marks)]))
    assert len(trained) > 1000 or main == "count"
    assert not trained & tested
    again = test_sets(args)
    assert all(np.array_equal(again[n].ids, rows.ids) for n, rows in sets.items())


def test_what_is_held_out_hangs_on_the_question_alone():
    family, arrays = Sorting(12), NumpyArrays(1)
    rows = make_rows(family, arrays, "sort", arrays.integers(2, 9, (4000,)), 8)
    wider = rows._replace(ids=np.pad(rows.ids, ((0, 0), (0, 5)), constant_values=9))
    assert np.array_equal(held(arrays, rows), held(arrays, wider))
    assert abs(held(arrays, rows).mean() - 1 / 16) < 0.02


def test_hints_that_contradict_the_main_task():
    args = HintingDataArguments(values=12, test_lengths=[6])
    shared = {hint: not contradictions(args, hint) for hint in Sorting.hints}
    assert shared == {
        "successor": True, "run": True, "min": True, "fill": True, "restrict": True, "predecessor": False,
        "count": False, "copy": False, "copy_list": False, "max": False, "parity": False,
    }  # fmt: skip
    again = HintingDataArguments(values=12, repetitions=True, test_lengths=[6])
    assert contradictions(again, "successor") and not contradictions(again, "run")
    styles = {task.name: task.shared for task in tasks(HintingDataArguments(hints=["successor", "predecessor"]))}
    assert styles == {"sort": False, "successor": True, "predecessor": False}
    with pytest.raises(ValueError, match=r"predecessor contradicts sort: after .* the hint wants .*, sort wants"):
        tasks(HintingDataArguments(hints=["predecessor"], prompt_style="shared"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"main_rows": 0}, "main_rows 0: at least 1"),
        ({"hint_rows": -1}, "cannot be negative"),
        ({"longest": 1}, "--longest 1 is shorter than --shortest 2"),
        ({"hint_longest": 9}, "--allow_longer_hints"),
        ({"hint_longest": 1}, "--hint_longest 1 is shorter"),
        ({"test_lengths": []}, "at least one"),
        ({"test_lengths": [5, 5]}, "names a length twice"),
        ({"hints": ["copy", "copy"]}, "names a hint twice"),
        ({"hints": ["sort"]}, "that is the main task"),
        ({"hints": ["carry"]}, "unknown task 'carry'; known: sort, successor"),
        ({"values": 30}, "lists of 36 different numbers need at least so many values, and there are 30"),
        ({"values": 36, "repetitions": True, "hints": ["count"]}, "tokens up to 35 only"),
        ({"main": "increment", "hints": ["carry"], "nines": 1.5}, "share of rows that end in nines is 1.5"),
        ({"main": "count", "hints": ["copy"], "different": 27}, "27 different letters"),
        ({"values": 3, "shortest": 1, "longest": 1, "test_lengths": [1], "hints": []}, "no questions of 1 to 1 items"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        test_sets(HintingDataArguments(**change))


def test_longer_hints_when_meant():
    args = HintingDataArguments(hint_longest=9, allow_longer_hints=True)
    step = make_stream(args).step(0)
    assert step.lengths[step.tasks == 0].max() == 6 and step.lengths[step.tasks == 1].max() == 9
