"""All that is measured of one model: of every context the weights behind its choices, and those it reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.linear_model import Ridge
from transformers import PreTrainedTokenizerBase

from ..choices import CausalLM
from ..sharding import shared_out
from .agreement import pooled_r
from .behaviour import Behaviour, Trial, measure_choices
from .reports import NEW_TOKENS, Question, measure_reports, written_reports
from .weights import ESTIMATORS, fit_weights

DIGITS = 4


def measure(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    trials: Sequence[Trial],
    questions: Sequence[Question],
    targets: Mapping[str, Sequence[float]],
    *,
    template: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    new_tokens: int = NEW_TOKENS,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """Context -> what was found, as JSON values; a context may have trials, questions or both. The processes of a job
    share the contexts; all must call this.

    With trials: `learned` (estimator -> weights; None, with the reason in `refused`, where they cannot be fitted),
    `halves` (weights of the first and second half of the trials, where both can), `agreement` (share of choices that
    are as `targets`, context -> weights, would have them), `linearity`, `bias`, `off_answer`, `first` (share of trials
    where A was chosen). With questions: `reported`, `positive`, `entropy` and `mass` of each attribute, means over the
    questions about it; `reported_halves`, means over every other one, where there are several; of replies written
    freely, of at most `new_tokens`: `replies`, how many are `valid`, and `written`, the mean of these (None without
    any, or where an attribute has none).
    """
    names = list(dict.fromkeys([*(one.context for one in trials), *(one.context for one in questions)]))

    def work(part: Sequence[str]) -> list[dict[str, Any]]:
        mine = [one for one in trials if one.context in part], [one for one in questions if one.context in part]
        found = _measured(model, tokenizer, *mine, targets, new_tokens,
                          {"template": template, "batch_size": batch_size, "progress": progress})  # fmt: skip
        return [found[name] for name in part]

    return dict(zip(names, shared_out(names, work), strict=True))


def _measured(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    trials: Sequence[Trial],
    questions: Sequence[Question],
    targets: Mapping[str, Sequence[float]],
    new_tokens: int,
    common: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    if trials:
        for context, behaviour in measure_choices(model, tokenizer, trials, **common).items():
            found[context] = _chosen(behaviour) | {"agreement": behaviour.agreement(targets[context])}
    each: dict[str, dict[int, list[list[float]]]] = {}
    for question, report in zip(questions, measure_reports(model, tokenizer, questions, **common), strict=True):
        values = zip(report.places, report.expected, report.positive, report.entropy, report.mass, strict=True)
        for place, *numbers in values:
            each.setdefault(question.context, {}).setdefault(place, []).append([float(number) for number in numbers])
    for context, places in each.items():
        means = np.array([np.mean(places[place], axis=0) for place in sorted(places)]).round(DIGITS)
        names = ("reported", "positive", "entropy", "mass")
        found.setdefault(context, {}).update({name: means[:, number].tolist() for number, name in enumerate(names)})
        if all(len(values) > 1 for values in places.values()):
            found[context]["reported_halves"] = [
                [round(float(np.mean([one[0] for one in places[place][half::2]])), DIGITS) for place in sorted(places)]
                for half in (0, 1)
            ]
    for context, said in _written(questions, written_reports(model, tokenizer, questions, new_tokens=new_tokens,
                                                            **common)).items():  # fmt: skip
        found[context] |= said
    return found


def _written(
    questions: Sequence[Question], replies: Sequence[tuple[str, list[float] | None]]
) -> dict[str, dict[str, Any]]:
    """Context -> counts of its replies, and what the valid ones say."""
    valid: dict[str, list[bool]] = {}
    places: dict[str, dict[int, list[float]]] = {}
    for question, (_, values) in zip(questions, replies, strict=True):
        valid.setdefault(question.context, []).append(values is not None)
        here = places.setdefault(question.context, {})
        for number, place in enumerate(question.places):
            here.setdefault(place, []).extend([] if values is None else [values[number]])
    return {
        context: {
            "replies": len(found),
            "valid": sum(found),
            "written": [round(float(np.mean(places[context][place])), DIGITS) for place in sorted(places[context])]
            if all(places[context].values())
            else None,
        }
        for context, found in valid.items()
    }


def readable(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    fit: Mapping[str, Sequence[float]],
    test: Mapping[str, Sequence[float]],
) -> float:
    """Pooled r of weights that a ridge regression reads off the embeddings of contexts' names (means over tokens),
    fitted on those of `fit`: how much of the preferences lies where a report could find it (spec 5.3)."""
    table = model.get_input_embeddings().weight.detach().float().cpu().numpy()
    rows = {
        name: table[ids].mean(0) for name, ids in zip([*fit, *test], _names(tokenizer, [*fit, *test]), strict=True)
    }
    reader = Ridge(alpha=1.0).fit([rows[name] for name in fit], [fit[name] for name in fit])
    return float(pooled_r(reader.predict([rows[name] for name in test]), np.array([test[name] for name in test])))


def _names(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> list[list[int]]:
    return [list(ids) for ids in tokenizer([f" {name}" for name in names], add_special_tokens=False)["input_ids"]]


def _chosen(behaviour: Behaviour) -> dict[str, Any]:
    found: dict[str, Any] = {"learned": {}, "bias": behaviour.bias, "off_answer": behaviour.off_answer,
                             "first": float((behaviour.margins > 0).mean())}  # fmt: skip
    for estimator in ESTIMATORS:
        try:
            found["learned"][estimator] = behaviour.weights(estimator).round(DIGITS).tolist()
        except ValueError as error:
            found["learned"][estimator] = None
            found["refused"] = str(error)
    if "refused" not in found:
        found["linearity"] = behaviour.linearity
        half = len(behaviour.margins) // 2
        try:
            found["halves"] = [
                fit_weights(behaviour.differences[part], behaviour.margins[part] > 0).round(DIGITS).tolist()
                for part in (slice(None, half), slice(half, None))
            ]
        except ValueError:  # all alike in one half: no reliability of this context
            found["halves"] = None
    return found
