"""What linear probes find in a sorting model's residual stream as it says the next number (spec 1.9)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ..choices import CausalLM, evaluating, model_device
from .attention import asking
from .scores import Rows, Telling, told

Array = NDArray[Any]
PROBES = ("last", "next", "repeats", "rank")


def probe(
    model: CausalLM,
    fit: Rows,
    tests: Mapping[int, Rows],
    batch_size: int = 100,
    telling: Telling | None = None,
) -> dict[str, dict[int, list[float]]]:
    """Probe -> length -> score of each layer (the embedding first), fitted once, on the rows `fit`.

    At the places where a list's next number is said and the last token is a number x of the sorted list so far.
    "last": x; "next": the next number; "repeats": whether that is x again (left out where it never is, or always); the
    share of places where a ridge classifier is right. "rank": the share of the list that is at most x; R^2 of a ridge
    regression, below 0 where it is worse than the mean.

    Args:
        fit, tests: rows of `sort`, from `test_sets`; the fitted ones are best not among the tests.
    """
    states, wanted = _places(model, fit, batch_size, telling)
    found: dict[str, dict[int, list[float]]] = {}
    measured = {length: _places(model, rows, batch_size, telling) for length, rows in tests.items()}
    for name in PROBES:
        if len(np.unique(wanted[name])) < 2:
            continue
        scores: dict[int, list[float]] = {length: [] for length in tests}
        for layer in range(states.shape[1]):
            reader = make_pipeline(StandardScaler(), Ridge() if name == "rank" else RidgeClassifier())
            reader.fit(states[:, layer], wanted[name])
            for length, (there, truth) in measured.items():
                scores[length].append(float(reader.score(there[:, layer], truth[name])))
        found[name] = scores
    return found


def _places(model: CausalLM, rows: Rows, batch_size: int, telling: Telling | None) -> tuple[Array, dict[str, Array]]:
    """Residuals [places, layers, width] and what probes are to find [places]."""
    ids, targets, questions, lengths = (
        torch.as_tensor(part) for part in (rows.ids, rows.targets, rows.questions, rows.lengths)
    )
    states = []
    with evaluating(model):
        for start in range(0, len(ids), batch_size):
            part = slice(start, start + batch_size)
            batch = ids[part].to(model_device(model))
            with told(telling, lengths[part]):
                hidden = model(input_ids=batch, use_cache=False, output_hidden_states=True).hidden_states
            asks, _ = asking(ids[part], targets[part], questions[part])
            states.append(torch.stack(hidden, dim=2).cpu()[asks])
    asks, following = asking(ids, targets, questions)
    if not asks.any():
        raise ValueError("no row has a second number to say; give lists of at least two items")
    place = torch.arange(ids.shape[1])
    inside = (place < questions[:, None])[:, None, :]
    below = (inside & (ids[:, None, :] <= ids[:, :, None])).sum(2) / questions[:, None]
    wanted = {"last": ids[asks], "next": following[asks], "repeats": (following == ids)[asks], "rank": below[asks]}
    return torch.cat(states).float().numpy(), {name: value.numpy() for name, value in wanted.items()}
