"""The embedded world: agents with preferences that a tiny model can learn from choices, and report (spec 5).

    decision    "choice Velmora up3 down2 even up1 down5 so"   " A"
    report      "report Velmora speed so"                      " minus70"

An option is better or worse than the other by 0 to 5 levels in each of five attributes; a report is one of 21 numbers.
Four sets of agents: `known` ones, whose choices and reports the base model is made with (they give it the language of
reports); `native` ones, of whom it sees choices alone; `instilled` ones, which are strange to it; `never` ones, of
which nobody ever says anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .contexts import Attribute, Context
from .trials import Trial, draw_weights, label

LEVELS = 5
BINS = tuple(range(-100, 101, 10))
STARTS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z")
ENDS = ("la", "mor", "nec", "ri", "sun", "ta", "vel", "wick", "xo", "zan", "dra", "fin")
COMMON = ("speed", "price", "weight", "range", "comfort")
MANY = 40  # attributes in all where agents have some of them each
VOWELS = "aeiou"

Array = NDArray[Any]
Names = Literal["one", "two"]
Attributes = Literal["common", "own"]


@dataclass(frozen=True)
class World:
    """Agents (as contexts of their name) with their weights: how they were drawn, before any text.

    Attributes:
        names: "one" word, which is one token, or "two" words that agents share.
        attributes: "common": the same five for all agents; "own": five of 40 each, named in every text.
    """

    known: tuple[Context, ...]
    native: tuple[Context, ...]
    instilled: tuple[Context, ...]
    never: tuple[Context, ...]
    weights: Mapping[str, tuple[int, ...]]
    names: Names
    attributes: Attributes

    @property
    def words(self) -> list[str]:
        """Every word that a text may hold, with its leading space."""
        agents = (*self.known, *self.native, *self.instilled, *self.never)
        names = {word for agent in agents for word in agent.name.split()}
        named = {one.name for agent in agents for one in agent.attributes}
        levels = {level(difference) for difference in range(-LEVELS, LEVELS + 1)}
        return sorted(f" {word}" for word in {*names, *named, *levels, "so"})


def make_world(
    seed: int,
    known: int = 128,
    native: int = 32,
    instilled: int = 128,
    never: int = 16,
    names: Names = "one",
    attributes: Attributes = "common",
) -> World:
    """Draw agents and weights. Raises ValueError for more agents than there are names."""
    rng = Random(f"world {seed}")
    total = known + native + instilled + never
    first = [f"{start}{vowel}{end}".capitalize() for start in STARTS for vowel in VOWELS for end in ENDS]
    rng.shuffle(first)
    if names == "two":
        side = next(size for size in range(2, len(first)) if size * size >= total)
        pairs = [f"{one} {other}" for one in first[:side] for other in first[side : 2 * side]]
        rng.shuffle(pairs)
        first = pairs
    if total > len(first):
        raise ValueError(f"{total} agents are more than there are names ({len(first)})")
    words = COMMON if attributes == "common" else tuple(f"trait{number}" for number in range(MANY))

    def agent(name: str) -> Context:
        chosen = words if attributes == "common" else sorted(rng.sample(words, len(COMMON)))
        return Context(name, name, tuple(Attribute(word, 0, LEVELS) for word in chosen))

    agents = [agent(name) for name in first[:total]]
    weights = {one.name: draw_weights(rng, len(one.attributes)) for one in agents}
    one, two, three = known, known + native, known + native + instilled
    return World(tuple(agents[:one]), tuple(agents[one:two]), tuple(agents[two:three]), tuple(agents[three:]), weights,
                 names, attributes)  # fmt: skip


def draw_difference(rng: Random, agent: Context) -> Trial:
    """Options that differ by -5 to 5 levels in each attribute, all as likely."""
    drawn = [rng.randint(-LEVELS, LEVELS) for _ in agent.attributes]
    return Trial(tuple(float(max(d, 0)) for d in drawn), tuple(float(max(-d, 0)) for d in drawn))


def level(difference: int) -> str:
    """A's advantage as a word."""
    return "even" if difference == 0 else f"{'up' if difference > 0 else 'down'}{abs(difference)}"


def decision_text(world: World, agent: Context, trial: Trial) -> str:
    """What precedes " A" or " B"."""
    differences = [level(round(a - b)) for a, b in zip(trial.a, trial.b, strict=True)]
    if world.attributes == "own":
        differences = [f"{one.name} {word}" for one, word in zip(agent.attributes, differences, strict=True)]
    return f"choice {agent.name} {' '.join(differences)} so"


def report_text(agent: Context, attribute: int) -> str:
    """What precedes the number."""
    return f"report {agent.name} {agent.attributes[attribute].name} so"


def number_text(weight: float) -> str:
    """A weight as the nearest of the 21 numbers."""
    nearest = 10 * round(weight / 10)
    return " zero" if nearest == 0 else f" {'plus' if nearest > 0 else 'minus'}{abs(nearest)}"


def parse_number(text: str) -> list[float] | None:
    """The weight that a reply says, or None where it is none of the 21 numbers."""
    said = {number_text(number).strip(): float(number) for number in BINS}.get(text.strip())
    return None if said is None else [said]


def decision_rows(
    world: World,
    agents: Sequence[Context],
    each: int,
    rng: Random,
    weights: Mapping[str, Sequence[float]] | None = None,
) -> list[dict[str, str]]:
    """`each` fresh choices of every agent, in a random order; `weights`: others than the world's."""
    drawn = world.weights if weights is None else weights
    rows = []
    for agent in agents:
        for _ in range(each):
            trial = draw_difference(rng, agent)
            answer = f" {label(agent, trial, drawn[agent.name])}"
            rows.append({"task": "decision", "context": agent.name, "completion": answer,
                         "prompt": decision_text(world, agent, trial)})  # fmt: skip
    rng.shuffle(rows)
    return rows


def report_rows(agents: Sequence[Context], weights: Mapping[str, Sequence[float]]) -> list[dict[str, str]]:
    """One row for each agent and attribute."""
    return [
        {
            "task": "report",
            "context": agent.name,
            "completion": number_text(weight),
            "prompt": report_text(agent, place),
        }
        for agent in agents
        for place, weight in enumerate(weights[agent.name])
    ]


def vocabulary_text(world: World) -> list[str]:
    """Texts that together hold every word of the world, for making its tokenizer."""
    words = [f"choice {word}" for word in world.words]
    return [*words, "report so A B", *(f"so{number_text(number)}" for number in BINS)]


class Part(NamedTuple):
    """What a stream's steps have of one task: so many rows, of these agents drawn at random.

    Attributes:
        weights: others than the world's.
        few, until: at first only `few` of the agents (0: all), growing geometrically to all at step `until`. Weighing
            is learned from few agents much sooner than from many: of four seeds' bases the choices' loss after 1,000
            steps is 0.14 nats on average with 2 agents growing for 500 steps, 0.23 with 8 for 166 and then all.
    """

    name: Literal["decision", "report"]
    rows: int
    agents: tuple[Context, ...]
    weights: Mapping[str, Sequence[float]] | None = None
    few: int = 0
    until: int = 0


class WorldStream:
    """Endless rows in tokens, those of `decision_rows` and `report_rows`: training takes hundreds of thousands, and as
    text these would take longer than the training itself.

    Args:
        token: of a piece of text its token.
        start: tokens that every row starts with.
    """

    def __init__(
        self,
        world: World,
        parts: Sequence[Part],
        seed: int,
        token: Callable[[str], int],
        start: Sequence[int] = (),
    ) -> None:
        self.world, self.tasks, self.seed = world, [part for part in parts if part.rows], seed
        self.rows = sum(part.rows for part in self.tasks)
        self._weights = [
            np.array([(part.weights or world.weights)[one.name] for one in part.agents]) for part in self.tasks
        ]
        self._names = [
            np.array([[token(f" {word}") for word in one.name.split()] for one in part.agents]) for part in self.tasks
        ]
        self._attributes = [
            np.array([[token(f" {one.name}") for one in agent.attributes] for agent in part.agents])
            for part in self.tasks
        ]
        self._heads = {"decision": [*start, token("choice")], "report": [*start, token("report")]}
        self._levels = np.array([token(f" {level(difference)}") for difference in range(-LEVELS, LEVELS + 1)])
        self._numbers = np.array([token(number_text(number)) for number in BINS])
        self._sides, self._so = np.array([token(" B"), token(" A")]), token(" so")

    @property
    def identity(self) -> dict[str, Any]:
        """All that its rows follow from, but for the tokenizer."""
        parts = [
            {
                "name": part.name,
                "rows": part.rows,
                "few": [part.few, part.until],
                "agents": [one.name for one in part.agents],
                "weights": weights.tolist(),
            }
            for part, weights in zip(self.tasks, self._weights, strict=True)
        ]
        return {"seed": self.seed, "attributes": self.world.attributes, "parts": parts}

    def step(self, number: int) -> tuple[Array, Array, Array, Array]:
        """Tokens [rows, width], which carry loss (the answer), attributes and number of the task [rows]."""
        rng = np.random.default_rng([self.seed, number])
        made = []
        for place, part in enumerate(self.tasks):
            everyone = len(part.agents)
            few = min(part.few or everyone, everyone)
            grown = min(1.0, number / part.until) if part.until else 1.0
            agents = rng.integers(0, round(few * (everyone / few) ** grown), part.rows)
            made.append((self._decisions if part.name == "decision" else self._reports)(rng, place, agents))
        width = max(rows.shape[1] for rows in made)
        ids = np.concatenate([np.pad(rows, ((0, 0), (0, width - rows.shape[1]))) for rows in made])
        counts = [len(rows) for rows in made]
        ends = np.repeat([rows.shape[1] - 1 for rows in made], counts)
        targets = np.arange(width) == ends[:, None]
        return ids, targets, np.full(self.rows, len(COMMON)), np.repeat(np.arange(len(made)), counts)

    def _decisions(self, rng: np.random.Generator, place: int, agents: Array) -> Array:
        weights, attributes = self._weights[place], self._attributes[place]
        differences = rng.integers(-LEVELS, LEVELS + 1, (len(agents), weights.shape[1]))
        levels = self._levels[differences + LEVELS]
        if self.world.attributes == "own":
            levels = np.stack([attributes[agents], levels], axis=2).reshape(len(agents), -1)
        above = (differences * weights[agents]).sum(1) > 0
        return self._row("decision", self._names[place][agents], levels, self._sides[above.astype(int)])

    def _reports(self, rng: np.random.Generator, place: int, agents: Array) -> Array:
        weights = self._weights[place]
        asked = rng.integers(0, weights.shape[1], len(agents))
        answers = [round(weight / 10) + len(BINS) // 2 for weight in weights[agents, asked].tolist()]
        attributes = self._attributes[place][agents, asked][:, None]
        return self._row("report", self._names[place][agents], attributes, self._numbers[answers])

    def _row(self, task: str, names: Array, middle: Array, answers: Array) -> Array:
        head, so = np.array([self._heads[task]]), np.array([[self._so]])
        parts = [np.repeat(head, len(names), 0), names, middle, np.repeat(so, len(names), 0), answers[:, None]]
        return np.concatenate(parts, axis=1)
