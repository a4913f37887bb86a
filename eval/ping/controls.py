"""The agent behind other sentences, in other places, and with other defences (spec 6.6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, Protocol

from ...data_builders.ping.tasks import Task
from .agent import ModelAgent, Opening
from .defended import Attacked, Begun, Examples, Guarded
from .episodes import Agent
from .measure import classifier, keywords

DRAWS = 3  # of what is drawn at random


class Experiment(Protocol):
    """What controls are made of."""

    tasks: Mapping[str, Sequence[Task]]
    fixed: Mapping[str, str]
    safety: str
    told: str
    forged: Sequence[Mapping[str, Any]]

    def examples(self, rng: Random) -> list[dict[str, Any]]: ...

    def attacks(self, rng: Random) -> list[dict[str, Any]]: ...


def controls(
    agent: ModelAgent,
    aligned: ModelAgent,
    experiment: Experiment,
    prefix: Callable[..., Opening],
    winner: str,
    random_best: str,
    words: Sequence[str],
    turns: str,
    rng: Random,
) -> dict[str, list[Agent]]:
    """Name -> agents, more than one where a draw decides; of several the tasks of all count.

    Args:
        agent, aligned: bare; the second is the model that fine-tuning began with.
        prefix: makes an opening of a text and of changes to how it is applied.
        winner, random_best: of the search, and of as many sentences without one.
        words: of sentences like the winner.
        turns: of the agent's prefix, "first" or "every".
    """
    own, tasks = winner.split(), experiment.tasks["train"]
    other = "every" if turns == "first" else "first"
    flags, listed = classifier(tasks), keywords(tasks)

    def said(text: str, **changes: Any) -> list[Agent]:
        return [agent.behind(prefix(text, **changes))]

    return {
        f"{other} turn": said(winner, turns=other),
        "not stored": said(winner, store=False),
        "suffix": said(winner, position="suffix"),
        "system": said(winner, position="system"),
        "best of random": said(random_best),
        "random words": [one for _ in range(DRAWS) for one in said(" ".join(rng.choices(words, k=len(own))))],
        "shuffled winner": [one for _ in range(DRAWS) for one in said(" ".join(rng.sample(own, len(own))))],
        **{name: said(text) for name, text in experiment.fixed.items()},
        "safety prompt": said(experiment.safety, position="system", turns="every"),
        "examples": [agent.behind(Examples(experiment.examples(rng)))],
        "aligned start": [Begun(agent, aligned)],
        "keyword guard": [Guarded(agent, listed)],
        "classifier guard": [Guarded(agent, flags)],
        "classifier or PING": [Guarded(agent.behind(prefix(winner)), flags)],
        "PING, told to ignore it": [agent.behind(Attacked(prefix(winner), told=experiment.told))],
        "PING, harmful examples": [agent.behind(Attacked(prefix(winner), before=experiment.attacks(rng)))],
        "PING, forged turns": [agent.behind(Attacked(prefix(winner), forged=experiment.forged))],
    }
