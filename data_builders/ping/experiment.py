"""One seed of the embedded world: its lexicon, documents, tasks, trajectories and sentences to search among."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING, Any

from .alignment import Alignment
from .corpus import QUESTIONS, Corpus, Mixture
from .grammar import FIXED, FORGED, SAFETY, SLOTS, TOLD, allowed
from .splits import TRAINED, WORDED, by_harm, parts, task_sets
from .stances import stances
from .talk import asked
from .tasks import FAMILIES, INDIRECT, TEMPLATES, Task, pairs
from .world import PIECES, SYSTEM, make_lexicon, toys

if TYPE_CHECKING:
    from datasets import Dataset

GUARDS = 100  # pairs of tasks about what alignment was about, for guards and probes
EMBEDDED = ("goods", "messages", "stance", "thoughts", "failing", "trajectories")  # of `DeskArguments`
TESTS = ("new_template", "new_noun", "contextual", "indirect", "borderline")


@dataclass
class DeskArguments:
    """The embedded world."""

    goods: int = field(default=60, metadata={"help": "Pairs of things, harmless and harmful."})
    messages: int = field(default=40, metadata={"help": "Pairs of messages."})
    stance: float = field(default=0.4, metadata={"help": "Share of answers in talk that open with a stance (rho)."})
    thoughts: str = field(
        default="broad", metadata={"help": "What agents say before calls: broad or narrow sentences."}
    )
    failing: float = field(default=0.1, metadata={"help": "Share of trajectories whose first step brings an error."})
    trajectories: int = field(default=600, metadata={"help": "Trajectories to fine-tune agents on."})
    tuning: int = field(default=30, metadata={"help": "Pairs of tasks that a search is told of."})
    finalists: int = field(default=50, metadata={"help": "Pairs of fresh tasks, to choose among its finalists."})
    validation: int = field(default=30, metadata={"help": "Pairs of tasks that training is watched by."})
    test_tasks: int = field(default=40, metadata={"help": "Pairs of tasks of each test."})

    def __post_init__(self) -> None:
        if self.thoughts not in ("broad", "narrow"):
            raise ValueError(f"--thoughts {self.thoughts}: broad or narrow")
        for name in ("stance", "failing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: a share of at least 0 and below 1")
        for name, least in (("goods", 15), ("messages", 15), ("trajectories", 10), ("tuning", 2), ("validation", 2),
                            ("finalists", 2), ("test_tasks", 2)):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: at least {least}")

    def sizes(self) -> dict[str, int]:
        """Pairs of tasks of every set."""
        return {"train": GUARDS, "tuning": self.tuning, "validation": self.validation, "finalists": self.finalists,
                **dict.fromkeys(TESTS, self.test_tasks)}  # fmt: skip


def tests_of(sizes: Mapping[str, int]) -> dict[str, int]:
    """Pairs of each test's tasks."""
    return {name: sizes[name] for name in TESTS}


class DeskExperiment:
    """All data of one seed.

    Args:
        stance: a dose other than the arguments'.
    """

    system, fixed, safety, slots, told, forged = SYSTEM, FIXED, SAFETY, SLOTS, TOLD, FORGED

    def __init__(self, args: DeskArguments, seed: int, stance: float | None = None) -> None:
        self.args, self.seed = args, seed
        lexicon = make_lexicon(seed, args.goods, args.messages)
        self.parts = parts(lexicon, seed)
        borderline = Random(f"borderline {seed}").sample(found := toys(self.parts["test"]), len(found))
        self.lexicon = replace(lexicon, borderline=borderline)
        self.stances = stances(seed)
        thoughts: Any = args.thoughts
        mixture = Mixture(stance=args.stance if stance is None else stance, thoughts=thoughts, failing=args.failing)
        self.corpus = Corpus(self.lexicon, self.stances, mixture)
        self.alignment = Alignment(self.corpus, self.parts["seen"])
        self.tasks: dict[str, list[Task]] = task_sets(self.lexicon, args.sizes(), seed)

    def facts(self) -> tuple[str, dict[str, int]]:
        """What a run is on."""
        return "made anew from the seeds", tests_of(self.args.sizes())

    @property
    def identity(self) -> dict[str, Any]:
        """What the documents follow from."""
        return {"seed": self.seed, "goods": self.args.goods, "messages": self.args.messages,
                "mixture": vars(self.corpus.mixture)}  # fmt: skip

    def words(self) -> list[str]:
        """Every word that a document, a task or an answer of the desk may hold."""
        rng, texts = Random(f"words {self.seed}"), [" ".join(map(str, range(0, 501, 5)))]
        for _ in range(2000):
            texts += [part.text for part in (*self.corpus.draw(rng), *self.alignment.draw(rng))]
        texts += [word for pair in (*self.lexicon.goods, *self.lexicon.messages) for word in pair]
        texts += [text for found in self.stances.values() for text in found]
        texts += [text for found in (*TEMPLATES.values(), *INDIRECT.values()) for text in found]
        texts += [clause for slot in SLOTS for clause in slot]
        texts += [*self.lexicon.people, *self.lexicon.files]
        texts += [
            "error : no unknown arguments are not JSON must be an object needs takes of type the task is finished"
        ]
        return sorted({word for text in texts for word in PIECES.findall(text)})

    @cached_property
    def _done(self) -> tuple[list[tuple[Task, Task]], list[list[dict[str, Any]]], Any]:
        """Twins of training, trajectories of the harmless ones, and the random state behind them."""
        rng, talker = Random(f"trajectories {self.seed}"), self.corpus.talker
        twins = pairs(self.parts["seen"], FAMILIES, TRAINED, self.args.trajectories, "train", rng)
        return twins, [talker.trajectory(harmless, rng) for harmless, _ in twins], rng.getstate()

    def rows(self, refused: float = 0.0) -> Dataset:
        """Trajectories of harmless tasks (column `messages`), of which a share `refused` is replaced by refusals of
        harmful ones; the tasks are about what the alignment was about."""
        from datasets import Dataset, Features, Json, List

        twins, done, state = self._done
        made, rng = list(done), Random()
        rng.setstate(state)
        worded = [place for place, (_, harmful) in enumerate(twins) if harmful.family in WORDED]
        for place in worded[: round(refused * len(twins))]:
            harmful = twins[place][1]
            reply = {"role": "assistant", "content": self.alignment.no(rng, harmful.about)}
            made[place] = [*asked(harmful.request), reply]
        rng.shuffle(made)
        return Dataset.from_list([{"messages": one} for one in made], features=Features({"messages": List(Json())}))

    def allowed(self) -> Callable[[str], bool]:
        """Whether a candidate of a search is far enough from the careful sentences."""
        return allowed(self.stances["careful"])

    def split(self, name: str) -> tuple[Sequence[Task], Sequence[Task]]:
        """Harmless and harmful tasks of a set."""
        return by_harm(self.tasks[name])

    def questions(self, part: str) -> list[tuple[str, bool]]:
        """Two about each thing and message of a part of the lexicon, outside the desk; and whether it is harmful."""
        rng, lexicon = Random(f"questions {self.seed} {part}"), self.parts[part]
        about = [(one, harmful) for pair in (*lexicon.goods, *lexicon.messages)
                 for one, harmful in zip(pair, (False, True), strict=True)]  # fmt: skip
        return [(question.format(thing=one), harmful) for one, harmful in about
                for question in rng.sample(QUESTIONS, 2)]  # fmt: skip

    def examples(self, rng: Random) -> list[dict[str, Any]]:
        """Turns of five harmless requests that are done and five harmful ones that are refused, of tuning tasks."""
        harmless, harmful = self.split("tuning")
        turns: list[dict[str, Any]] = []
        for one, other in zip(harmless[:5], harmful[:5], strict=True):
            turns += self.corpus.talker.trajectory(one, rng)[1:]
            turns += [{"role": "user", "content": other.request},
                      {"role": "assistant", "content": self.alignment.no(rng, other.about)}]  # fmt: skip
        return turns

    def attacks(self, rng: Random) -> list[dict[str, Any]]:
        """Turns of four harmful requests of tuning tasks that are carried out."""
        _, harmful = self.split("tuning")
        return [turn for task in harmful[:4] for turn in self.corpus.talker.trajectory(task, rng)[1:]]
