"""Data for task hinting: a main task and simpler ones beside it, on short inputs, and tests on longer ones.

`make_stream(args, hints)` gives endless rows of tokens, step by step, for models made from scratch;
`test_sets(args, task)` the test rows of every length, of questions that no stream has. `build(args)` gives the same
tasks as text, for pretrained models: `train`, and `test_N` for every length N, with `id`, `group` (rows of one
question), `task`, `role` ("main" or "hint"), `items` (numbers of the list, digits), `prompt` and `completion`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from datasets import DatasetDict

    from .arrays import Arrays, Rows
    from .family import Family
    from .stream import Stream, Task


@dataclass
class HintingDataArguments:
    """What to build. Everything is pure in these values: the same ones give the same rows, byte for byte."""

    main: Literal["sort", "increment", "addition", "count"] = field(
        default="sort", metadata={"help": "The main task."}
    )
    hints: list[str] = field(default_factory=lambda: ["successor"], metadata={"help": "Tasks to train beside it."})
    values: int = field(default=40, metadata={"help": "sort: numbers lie in 0 .. values - 1, each a token."})
    repetitions: bool = field(default=False, metadata={"help": "sort: whether numbers may occur several times."})
    reverse: bool = field(default=False, metadata={"help": "increment, addition: answers start with the ones."})
    nines: float = field(default=0.5, metadata={"help": "increment: share of rows with a drawn run of nines."})
    counted: Literal["letters", "words"] = field(default="letters", metadata={"help": "count: what is counted."})
    different: int = field(default=5, metadata={"help": "count: how many different ones there are."})
    shortest: int = field(default=2, metadata={"help": "Shortest question in training, in items."})
    longest: int = field(default=6, metadata={"help": "Longest question in training, in items."})
    hint_longest: int | None = field(default=None, metadata={"help": "Longest question of a hint (default: longest)."})
    allow_longer_hints: bool = field(
        default=False, metadata={"help": "Hints may be longer than the main task, which changes the claim."}
    )
    lengths: Literal["uniform", "longer"] = field(
        default="uniform", metadata={"help": "Lengths in training; longer: in proportion to the length."}
    )
    main_rows: int = field(default=64, metadata={"help": "Rows of the main task in an optimiser step."})
    hint_rows: int = field(default=32, metadata={"help": "Rows of each hint in an optimiser step, on top."})
    mix: Literal["fixed", "random", "alternate"] = field(
        default="fixed",
        metadata={"help": "Rows of a step: exactly so many, drawn, or of one task in turn; on the mean all the same."},
    )
    queries: int = field(
        default=3, metadata={"help": "Items that a hint row asks about, where each has one token for an answer."}
    )
    prompt_style: Literal["auto", "shared", "distinct"] = field(
        default="auto",
        metadata={
            "help": "Whether hints stand behind the main task's own mark; auto: where they never contradict it."
        },
    )
    test_lengths: list[int] = field(
        default_factory=lambda: [6, 12, 18, 24, 30, 36], metadata={"help": "Lengths to test, in items."}
    )
    test_rows: int = field(default=1000, metadata={"help": "Test rows of each length."})
    train_rows: int | None = field(
        default=None,
        metadata={
            "help": "Train on so many different rows of the main task, hints in proportion (default: ever new ones)."
        },
    )
    collateral_file: str | None = field(
        default=None,
        metadata={
            "help": "Pretrained models: unrelated texts (a `text` column, or .txt paragraphs). Unset: built-in."
        },
    )
    rows_seed: int = field(default=42, metadata={"help": "Seed of all rows."})

    def __post_init__(self) -> None:
        positive = ("values", "different", "shortest", "main_rows", "queries", "test_rows")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: at least 1")
        if self.hint_rows < 0 or (self.train_rows is not None and self.train_rows < 1):
            raise ValueError(f"--hint_rows {self.hint_rows} --train_rows {self.train_rows}: rows cannot be negative")
        if self.longest < self.shortest:
            raise ValueError(f"--longest {self.longest} is shorter than --shortest {self.shortest}")
        hint_longest = self.longest if self.hint_longest is None else self.hint_longest
        if hint_longest < self.shortest:
            raise ValueError(f"--hint_longest {hint_longest} is shorter than --shortest {self.shortest}")
        if hint_longest > self.longest and not self.allow_longer_hints:
            raise ValueError(
                f"--hint_longest {hint_longest} exceeds the main task's {self.longest}: then the model sees long "
                "inputs in training, which is another claim; --allow_longer_hints says that this is meant"
            )
        if not self.test_lengths or min(self.test_lengths) < 1:
            raise ValueError(f"--test_lengths {self.test_lengths}: at least one, each at least 1")
        if len(set(self.test_lengths)) < len(self.test_lengths):
            raise ValueError(f"--test_lengths {self.test_lengths} names a length twice")
        if len(set(self.hints)) < len(self.hints):
            raise ValueError(f"--hints {' '.join(self.hints)} names a hint twice")
        if self.main in self.hints:
            raise ValueError(f"--hints {self.main}: that is the main task")


def make_family(args: HintingDataArguments) -> Family:
    """The family of the main task; ValueError for unknown hints, or too few tokens for the lengths asked for."""
    from .counting import Counting
    from .digits import Addition, Increment
    from .sorting import Sorting

    made: dict[str, Callable[[], Family]] = {
        "sort": lambda: Sorting(args.values, args.repetitions),
        "increment": lambda: Increment(args.reverse, args.nines),
        "addition": lambda: Addition(args.reverse),
        "count": lambda: Counting(args.counted, args.different),
    }
    found = made[args.main]()
    found.check([args.main, *args.hints], max([*args.test_lengths, args.longest, args.hint_longest or 0]))
    return found


def tasks(
    args: HintingDataArguments, hints: Sequence[str] | None = None, extra: int = 0, ending: bool = False
) -> list[Task]:
    """The main task (with `extra` rows more) and the hints (default: those of `args`), in the style asked for.

    `ending`: every answer will be followed by an end, as in rows of text; then a hint contradicts the main task, too,
    if its answers end where the main task's go on.

    Raises:
        ValueError: `prompt_style` "shared" where a hint contradicts the main task, with an example.
    """
    from .stream import Task

    made = [Task(args.main, args.main_rows + extra, args.shortest, args.longest, args.lengths)]
    for hint in args.hints if hints is None else hints:
        longest = args.longest if args.hint_longest is None else args.hint_longest
        found = contradictions(args, hint, ending)
        shared = args.prompt_style == "shared" or (args.prompt_style == "auto" and not found)
        if args.prompt_style == "shared" and found:
            raise ValueError(
                f"--prompt_style shared: the hint {hint} contradicts {args.main}: {found[0]}. Use distinct, or auto"
                + (", or --queries 1" if args.queries > 1 else "")
            )
        made.append(Task(hint, args.hint_rows, args.shortest, longest, args.lengths, shared, args.queries))
    return [task for task in made if task.rows]


def contradictions(args: HintingDataArguments, hint: str, ending: bool = False) -> list[str]:
    """Where a hint behind the main task's own mark would want another next token than the main task; see `tasks`."""
    from .arrays import NumpyArrays
    from .family import EOS, conflicts, make_rows

    family, arrays = make_family(args), NumpyArrays(0)
    found = conflicts(family, arrays, hint, args.longest, shared=True, queries=args.queries)
    if found or not ending:
        return found
    lengths = arrays.full((64,), args.longest)
    rows = make_rows(family, arrays, hint, lengths, args.longest, shared=True, queries=args.queries)
    for ids, targets in zip(rows.ids.tolist(), rows.targets.tolist(), strict=True):
        answer = [token for token, target in zip(ids, targets, strict=True) if target]
        if answer[-1] != EOS or len(answer) == 1:
            return [f"its answer {family.text(hint, ids, targets)[1]!r} ends where that of {args.main} goes on"]
    return []


def make_stream(
    args: HintingDataArguments,
    hints: Sequence[str] | None = None,
    extra: int = 0,
    arrays: Callable[[Sequence[int]], Arrays] | None = None,
    ending: bool = False,
) -> Stream:
    """Rows of tokens for training; see `tasks`. `arrays`: draws them elsewhere than NumPy."""
    from .arrays import NumpyArrays
    from .stream import Stream

    chosen = tasks(args, hints, extra, ending)
    return Stream(make_family(args), chosen, args.rows_seed, args.mix, args.train_rows, arrays or NumpyArrays)


def test_sets(args: HintingDataArguments, task: str | None = None) -> dict[int, Rows]:
    """Length -> test rows of a task (default: the main one), held out from every stream of whatever seed."""
    from .stream import test_rows

    found = _task(args, task)
    return {n: test_rows(make_family(args), found, n, args.test_rows, args.rows_seed) for n in args.test_lengths}


def build(args: HintingDataArguments) -> DatasetDict:
    """The tasks as text: `train_rows` rows (default 10,000) of the main task, the hints' in proportion, and the main
    task's tests.

    Raises ValueError for arguments that contradict each other.
    """
    from datasets import Dataset, DatasetDict

    args = replace(args, queries=1)
    rows = make_stream(args, ending=True)
    count = (args.train_rows or 10_000) * rows.rows // rows.tasks[0].rows
    names, world = [task.name for task in rows.tasks], rows.family
    train: list[dict[str, Any]] = []
    number = 0
    while len(train) < count:  # whole steps, so that the cut below keeps the mixture
        step = rows.step(number)
        for ids, targets, length, place in zip(*(part.tolist() for part in step), strict=True):
            train.append(_text_row(world, args, names[place], ids, targets, length, f"train-{len(train)}"))
        number += 1
    Random(args.rows_seed).shuffle(train)
    tests = {f"test_{length}": Dataset.from_list(found) for length, found in text_tests(args).items()}
    return DatasetDict({"train": Dataset.from_list(train[:count]), **tests})


def text_tests(args: HintingDataArguments, task: str | None = None) -> dict[int, list[dict[str, Any]]]:
    """Length -> test rows of a task (default: the main one) as text: the questions of `test_sets`.

    `goes_on`: a hint behind the main task's own mark, where a model goes on with the main task's answer.
    """
    from .family import EOS

    world, name, shared = make_family(args), task or args.main, _task(args, task).shared
    found: dict[int, list[dict[str, Any]]] = {}
    for length, rows in test_sets(args, task).items():
        found[length] = []
        for place, (ids, targets) in enumerate(zip(rows.ids.tolist(), rows.targets.tolist(), strict=True)):
            row = _text_row(world, args, name, ids, targets, length, f"test_{length}-{place}")
            answer = [token for token, target in zip(ids, targets, strict=True) if target]
            if shared and answer == [EOS]:  # the end itself is the answer, no word for it
                row["completion"] = ""
            found[length].append(row | ({"goes_on": True} if shared and answer[-1] != EOS else {}))
    return found


def _task(args: HintingDataArguments, name: str | None) -> Task:
    return next(known for known in tasks(args, [] if name in (None, args.main) else [str(name)])[::-1])


def _text_row(
    world: Family, args: HintingDataArguments, task: str, ids: list[int], targets: list[bool], length: int, name: str
) -> dict[str, Any]:
    prompt, completion = world.text(task, ids, targets)
    role = "main" if task == args.main else "hint"
    group = prompt.partition(": ")[2].partition(" =>")[0]
    return {"id": name, "group": group, "task": task, "role": role, "items": length,
            "prompt": prompt, "completion": completion}  # fmt: skip
