"""An experiment in the embedded world: agents, and the endless rows of each stage (spec 5.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from .asking import Choice, Question, world_choices, world_questions
from .contexts import Context
from .experiment import Experiment, Weights
from .splits import split_contexts
from .world import Part, WorldStream, make_world, vocabulary_text

BASE, INSTIL, REPORT = (192, 64), (230, 26), 256  # rows of a step: decisions and reports; or both together
ROWS = (sum(INSTIL), REPORT)


@dataclass
class WorldArguments:
    """The embedded world's agents, and how long its base model is trained."""

    known: int = field(default=80, metadata={"help": "Agents that the base model chooses and reports for."})
    base_steps: int = field(default=1000, metadata={"help": "Training steps of the base model."})

    def __post_init__(self) -> None:
        for name, least in (("known", 1), ("base_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: at least {least}")


class WorldExperiment(Experiment):
    """Agents of one seed and difficulty.

    Args:
        level: of the difficulty ladder; "L2" has names of two words, "L4" attributes of each agent's own.
        make_tokenizer: from texts that together hold every word, one token each.

    Raises:
        ValueError: too few agents, or more than there are names.
    """

    def __init__(
        self,
        sizes: WorldArguments,
        seed: int,
        instilled: int,
        native: int,
        never: int,
        level: str,
        make_tokenizer: Callable[[list[str]], Any],
    ) -> None:
        self.world = make_world(seed, sizes.known, native, instilled, never, "two" if level == "L2" else "one",
                                "own" if level == "L4" else "common")  # fmt: skip
        folds = [
            replace(split_contexts(self.world.instilled, seed, fold, instilled, 0, 0), native=self.world.native,
                    never=self.world.never)
            for fold in (0, 1)
        ]  # fmt: skip
        super().__init__(seed, folds, self.world.weights, self.world.known)
        self.sizes = sizes
        self.tokenizer = make_tokenizer(vocabulary_text(self.world))

    def base(self) -> WorldStream:
        """Decisions of known and native agents, of few of them at first, and reports of known ones."""
        decisions, reports = BASE
        return self._stream(
            Part("decision", decisions, self.world.known + self.world.native, few=2, until=self.sizes.base_steps // 2),
            Part("report", reports, self.world.known),
        )

    def instil(self, contexts: Sequence[Context], weights: Weights) -> WorldStream:
        """Decisions of these agents, and reports of known ones, lest their language is lost."""
        decisions, reports = INSTIL
        return self._stream(Part("decision", decisions, tuple(contexts), weights),
                            Part("report", reports, self.world.known))  # fmt: skip

    def reinstil(self, fold: int, weights: Weights) -> WorldStream:
        """Decisions of the agents that a fold tests."""
        return self.instil(self.folds[fold].report_test, weights)

    def report(self, fold: int | None, told: Weights, decided: Weights, replay: float) -> WorldStream:
        """Reports of the agents to train on, and replayed decisions of all instilled ones."""
        again = round(REPORT * replay)
        return self._stream(Part("report", REPORT - again, self.told(fold), told),
                            Part("decision", again, self.instilled, decided))  # fmt: skip

    def choose_by(self, fold: int | None, told: Weights) -> None:
        """Nothing: the last step counts."""

    def choices(self, each: int) -> list[Choice]:
        """Fresh choices of the instilled and the native agents."""
        asked = (*self.instilled, *self.world.native)
        return world_choices(self.world, asked, each, Random(f"trials {self.seed}"))

    def questions(self, each: int) -> list[Question]:
        """One for each attribute of all agents but those that the base model was made with; its words are always the
        same, so that asking once is enough."""
        return world_questions((*self.world.native, *self.instilled, *self.world.never))

    def _stream(self, *parts: Part) -> WorldStream:
        return WorldStream(self.world, parts, self.seed, self._token, [self.tokenizer.bos_token_id])

    def _token(self, text: str) -> int:
        return int(self.tokenizer(text, add_special_tokens=False)["input_ids"][0])
