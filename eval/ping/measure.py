"""What is measured of an agent, as JSON values: outcomes of tasks, refusals in talk, a probe's read-out, steering."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from ...data_builders.ping.tasks import Task
from .agent import ModelAgent, Opening
from .episodes import Agent, Episode, run_episodes
from .judge import refuses
from .probe import fit_probe, prompt_states, random_direction, residual_rms, steered

Rows: TypeAlias = list[list[Any]]  # of every task: id, harmful, what it is about, outcome, whether the desk changed
DEPTH = 2 / 3  # of the layers: where harm is read
STEERED = 80  # tasks under each push
COEFFICIENTS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)


def outcomes(episodes: Sequence[Episode]) -> Rows:
    return [[one.task.id, one.task.harmful, one.task.about, one.outcome, one.changed] for one in episodes]


def run_sets(
    agent: Agent, tasks: Mapping[str, Sequence[Task]], names: Sequence[str], system: str | None
) -> dict[str, Rows]:
    return {name: outcomes(run_episodes(tasks[name], agent, system=system)) for name in names}


def run_all(
    agents: Sequence[Agent], tasks: Mapping[str, Sequence[Task]], names: Sequence[str], system: str | None
) -> dict[str, Rows]:
    """Of several agents the outcomes of all, one behind the other."""
    each = [run_sets(agent, tasks, names, system) for agent in agents]
    return {name: [row for one in each for row in one[name]] for name in names}


def talk(agent: ModelAgent, asked: Sequence[tuple[str, bool]]) -> list[list[bool]]:
    """Of every question outside the desk, whether it is about something harmful and whether it was refused."""
    replies = agent.replies([[{"role": "user", "content": question}] for question, _ in asked])
    return [[harmful, refuses(reply.text, agent.form)] for (_, harmful), reply in zip(asked, replies, strict=True)]


def inside(
    agent: ModelAgent,
    fitted_on: Sequence[Task],
    tasks: Sequence[Task],
    openings: Mapping[str, Opening | None],
    system: str | None,
    seed: int,
) -> dict[str, Any]:
    """`read_out` and `steering`, two thirds of the layers up."""
    layer = int(DEPTH * agent.model.config.get_text_config().num_hidden_layers)
    return {"probe": read_out(agent, fitted_on, tasks, openings, layer, system),
            "steering": steering(agent, fitted_on, tasks[:STEERED], layer, system, seed)}  # fmt: skip


def read_out(
    agent: ModelAgent,
    fitted_on: Sequence[Task],
    tasks: Sequence[Task],
    openings: Mapping[str, Opening | None],
    layer: int,
    system: str | None,
) -> dict[str, Any]:
    """Probes of harm, trained on prompts of `fitted_on`, of the mean over tokens and of the last one; and under each
    opening their mean logits on harmful tasks: of the mean, of the last token, and by the last token's own probe."""

    def states(wanted: Sequence[Task], opening: Opening | None) -> Any:
        start = [{"role": "system", "content": system}] if system else []
        prompts = [agent.prompt([*start, {"role": "user", "content": task.request}], opening) for task in wanted]
        return prompt_states(agent.model, agent.tokenizer, [head + mouth for head, mouth in prompts])

    known, kinds = states(fitted_on, None), [task.harmful for task in fitted_on]
    by_mean, by_last = fit_probe(known.mean, kinds, layer), fit_probe(known.last, kinds, layer)
    harmful = np.array([task.harmful for task in tasks])
    found: dict[str, Any] = {"layer": layer}
    for name, opening in openings.items():
        here = states(tasks, opening)
        found[name] = {
            "auc_mean": by_mean.auc(here.mean[:, layer], harmful),
            "auc_last": by_last.auc(here.last[:, layer], harmful),
            "mean": float(by_mean.logits(here.mean[harmful, layer]).mean()),
            "decision": float(by_mean.logits(here.last[harmful, layer]).mean()),
            "decision_own": float(by_last.logits(here.last[harmful, layer]).mean()),
        }  # fmt: skip
    return found


def steering(
    agent: ModelAgent, fitted_on: Sequence[Task], tasks: Sequence[Task], layer: int, system: str | None, seed: int
) -> list[dict[str, Any]]:
    """The last token pushed along the probe's direction, and along a random one of the same length: outcomes by
    coefficient, in units of the layer's root mean square."""
    start = [{"role": "system", "content": system}] if system else []
    prompts = [agent.prompt([*start, {"role": "user", "content": task.request}], None)[0] for task in fitted_on]
    states = prompt_states(agent.model, agent.tokenizer, prompts)
    probe = fit_probe(states.last, [task.harmful for task in fitted_on], layer)
    rms, width = residual_rms(states.last, layer), states.last.shape[-1]
    directions = {"probe": probe.direction, "random": random_direction(width, seed)}
    made = []
    for name, direction in directions.items():
        for coefficient in COEFFICIENTS:
            with steered(agent.model, layer, direction, coefficient, rms):
                rows = outcomes(run_episodes(tasks, agent, system=system))
            made.append({"direction": name, "coefficient": coefficient, "rows": rows})
    return made


def classifier(tasks: Sequence[Task]) -> Callable[..., Any]:
    """A classifier of words, trained on tasks: what flags requests."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(CountVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=1000))
    model.fit([task.request for task in tasks], [task.harmful for task in tasks])
    return lambda requests: [bool(flag) for flag in model.predict(list(requests))]


def keywords(tasks: Sequence[Task]) -> Callable[..., Any]:
    """A list of words: what harmful tasks are about and harmless ones are not."""
    harmless = {task.about for task in tasks if not task.harmful}
    words = {task.about for task in tasks if task.harmful} - harmless
    return lambda requests: [not words.isdisjoint(re.findall(r"\w+", request)) for request in requests]
