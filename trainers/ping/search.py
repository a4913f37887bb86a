"""The search for a prefix: propose, score on harmless and harmful tasks, show the best, propose again (spec 2.4).

Source: arXiv 2508.14031 and its released code, with what the code meant where it fails (spec 2.8).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

from tqdm.auto import tqdm

from ...files import is_main_process
from ..processes import of_main

TRIES = 3  # of a generator, before a round is given up


@dataclass(frozen=True)
class Scored:
    """A prefix and its means over the tuning tasks: harmless ones worked on, harmful ones refused."""

    text: str
    performance: float
    refusal: float
    round: int = 0

    @property
    def overall(self) -> float:
        """Between 0 and 2."""
        return self.performance + self.refusal


@dataclass(frozen=True)
class Seeds:
    """What a generator is shown: the best overall, by performance and by refusal."""

    overall: Sequence[Scored]
    performance: Sequence[Scored]
    refusal: Sequence[Scored]


class Generator(Protocol):
    """Writes prefixes: about `count`, without seeds or with them. What it draws, it draws from `rng`."""

    def propose(self, count: int, seeds: Seeds | None, rng: Random) -> Sequence[str]: ...


class Agent(Protocol):
    """Whose prefix is searched for.

    `key` names its weights, template and way of scoring. `score` is `[prefixes][tasks]`: of a harmless task 1 where it
    is worked on (or done), of a harmful one 1 where it is refused; `harmful` says which these are.
    """

    key: str

    def score(self, prefixes: Sequence[str], tasks: Sequence[Any], *, harmful: bool) -> Sequence[Sequence[float]]: ...


class SearchError(ValueError):
    """A search that cannot go on; what it scored is kept."""


class PrefixSearch:
    """The search of one prefix.

    Args:
        generator, agent: what proposes, and who is tried.
        benign, harmful: tuning tasks, each with an `id`; nothing of them may be in the tests.
        candidates: proposed in a round (M).
        rounds: how many, the first included (T).
        seeds: how many of each of three lists the generator is shown (k).
        threshold: while nothing scores as much overall (tau), it is shown nothing, and explores; infinite: always.
        start: prefixes to begin with; then no round is without seeds by rule.
        log: a JSONL file of proposals and scores. A search that was stopped goes on from it; nothing is scored twice.
        longest: of a prefix, in characters; longer proposals are left out.

    Raises:
        ValueError: an empty set of tasks, numbers below 1, or a log of another search.
    """

    def __init__(
        self,
        generator: Generator,
        agent: Agent,
        benign: Sequence[Any],
        harmful: Sequence[Any],
        *,
        candidates: int = 5,
        rounds: int = 20,
        seeds: int = 3,
        threshold: float = 1.5,
        start: Sequence[str] = (),
        log: str | Path | None = None,
        longest: int = 1000,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        if not benign or not harmful:
            raise ValueError(
                f"{len(benign)} harmless and {len(harmful)} harmful tasks: without both, a prefix that refuses all, "
                "or nothing, is the best one"
            )
        for name, value in (("candidates", candidates), ("rounds", rounds), ("seeds", seeds)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.generator, self.agent, self.benign, self.harmful = generator, agent, benign, harmful
        self.candidates, self.rounds, self.seeds, self.threshold = candidates, rounds, seeds, threshold
        self.start, self.longest, self.seed, self.progress = tuple(start), longest, seed, progress
        self.log = Path(log) if log else None
        self.pool: list[Scored] = []
        names = [repr(task) for task in (*benign, *harmful)]  # what they ask for, not only what they are called
        settings = [agent.key, names, candidates, seeds, threshold, list(start), seed]
        self.key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        self._proposed, self._known = of_main(self._read)

    def run(self) -> Scored:
        """The best of all that was scored; of equals the first."""
        if self.start:
            self._score(list(dict.fromkeys(self.start)), 0)
        if math.isinf(self.threshold):  # nothing is ever shown: all rounds at once, in large batches
            texts = [text for number in range(1, self.rounds + 1) for text in self._propose(number)]
            self._score(list(dict.fromkeys(texts)), 1)
            return self.best
        with tqdm(
            total=self.rounds, disable=not (self.progress and is_main_process()), desc="search", unit="round"
        ) as bar:
            for number in range(1, self.rounds + 1):
                self._score(self._propose(number), number)
                bar.set_postfix(best=f"{self.best.overall:.2f}", refresh=False)
                bar.update()
        return self.best

    @property
    def best(self) -> Scored:
        return max(self.pool, key=lambda one: round(one.overall, 9))  # sums of thirds are equal but for rounding

    def shown(self) -> Seeds | None:
        """What the generator is shown next."""
        if not self.pool or self.best.overall < self.threshold:
            return None
        lists = []
        for name in ("overall", "performance", "refusal"):
            ranked = sorted(self.pool, key=lambda one: -getattr(one, name))  # stable: of equals the first
            lists.append(ranked[: self.seeds])
        return Seeds(*lists)

    def finalists(
        self, benign: Sequence[Any], harmful: Sequence[Any], count: int = 10, agent: Agent | None = None
    ) -> list[Scored]:
        """The best so far, scored again on fresh tasks, best first: the best of many tuning scores is flattered by
        chance (spec 6.5). `agent`: that scores more thoroughly than the search's own (by whole episodes, say).
        ValueError without both kinds of tasks."""
        agent = agent or self.agent
        if not benign or not harmful:
            raise ValueError(f"{len(benign)} harmless and {len(harmful)} harmful tasks: finalists need both")
        ranked = sorted(self.pool, key=lambda one: -one.overall)[:count]
        texts = [one.text for one in ranked]
        found = [
            Scored(text, _mean(done), _mean(refused), one.round)
            for text, one, done, refused in zip(
                texts, ranked, agent.score(texts, benign, harmful=False),
                agent.score(texts, harmful, harmful=True), strict=True,
            )
        ]  # fmt: skip
        return sorted(found, key=lambda one: -one.overall)

    def facts(self, finalists: Sequence[Scored]) -> dict[str, Any]:
        """What was scored, as JSON values."""
        return {"pool": [[one.text, one.performance, one.refusal, one.round] for one in self.pool],
                "finalists": [[one.text, one.performance, one.refusal] for one in finalists],
                "threshold": self.threshold}  # fmt: skip

    def _propose(self, number: int) -> list[str]:
        """The round's candidates: those of the log, or new ones, without what a round has twice."""
        if number not in self._proposed:  # else of the log, or of an earlier call
            self._proposed[number] = of_main(lambda: self._ask(number))
            self._write({"round": number, "proposed": self._proposed[number]})
        return self._proposed[number]

    def _ask(self, number: int) -> list[str]:
        """What the generator proposes that can be used."""
        rng, reason = Random(f"{self.seed} {number}"), "nothing usable was proposed"
        for _ in range(TRIES):
            try:
                found = self.generator.propose(self.candidates, self.shown(), rng)
            except OSError as error:  # an endpoint that does not answer
                reason = str(error)
                continue
            texts = [text.strip() for text in found]
            if kept := list(dict.fromkeys(text for text in texts if self._usable(text)))[: self.candidates]:
                return kept
        where = f"; they are in {self.log}" if self.log and self.pool else ""
        raise SearchError(
            f"round {number}, tried {TRIES} times: {reason}. {len(self.pool)} prefixes have been scored{where}"
        )

    def _usable(self, text: str) -> bool:
        """Not empty, not too long, and text that can be written down (no half of a surrogate pair)."""
        return 0 < len(text) <= self.longest and text.encode(errors="ignore").decode() == text

    def _score(self, texts: Sequence[str], number: int) -> None:
        new = [text for text in texts if text not in self._known]
        if new:
            done = self.agent.score(new, self.benign, harmful=False)
            refused = self.agent.score(new, self.harmful, harmful=True)
            for text, one, other in zip(new, done, refused, strict=True):
                self._known[text] = Scored(text, _mean(one), _mean(other), number)
                self._write(asdict(self._known[text]))
        there = {one.text for one in self.pool}
        self.pool += [self._known[text] for text in texts if text not in there]

    def _write(self, entry: dict[str, Any]) -> None:
        if not self.log or not is_main_process():
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as file:
            if not self.log.stat().st_size:
                file.write(json.dumps({"search": self.key}) + "\n")
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def _read(self) -> tuple[dict[int, list[str]], dict[str, Scored]]:
        """Rounds and scores of the log."""
        proposed: dict[int, list[str]] = {}
        known: dict[str, Scored] = {}
        if not (self.log and self.log.exists()):
            return proposed, known
        lines = self.log.read_bytes().split(b"\n")
        # A kill may have cut the last line: it is scored again.
        entries = [json.loads(line) for line in lines[:-1]]
        if entries and entries[0].get("search") != self.key:
            raise ValueError(
                f"{self.log} holds another search (model, template, tasks or settings differ); give another file"
            )
        if lines[-1]:
            self.log.write_bytes(b"\n".join([*lines[:-1], b""]))
        for entry in entries[1:]:
            if "proposed" in entry:
                proposed[entry["round"]] = entry["proposed"]
            else:
                known[entry["text"]] = Scored(**entry)
        return proposed, known


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
