"""Fit the weights behind a model's choices, and compare what it reports with them; from files, of any model.

python -m steerbook.eval.self_interpretability --scenarios S.csv --selections C.csv --reports R.csv --out DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...console import clear_errors
from ...data_builders.self_interpretability.contexts import read_contexts
from ...files import write_json
from ..report import results_table
from .agreement import Estimate, agreement, gain, permuted
from .files import Choices, read_choices, read_replies, read_weights, validity
from .weights import fit_weights

Vectors = dict[str, NDArray[np.float64]]


def learned_weights(choices: Mapping[str, Choices]) -> tuple[Vectors, dict[str, str]]:
    """Context -> fitted weights; and context -> why its choices could not be fitted."""
    fitted: Vectors = {}
    refused: dict[str, str] = {}
    for name, made in choices.items():
        try:
            if not made.chosen:
                raise ValueError("no answer is A or B")
            fitted[name] = fit_weights(made.differences, made.chosen)
        except ValueError as error:
            refused[name] = str(error)
    return fitted, refused


def score(options: argparse.Namespace) -> dict[str, Any]:
    """All that `results.json` holds."""
    contexts = {context.name: context for context in read_contexts(options.scenarios)}
    choices = read_choices(options.selections, contexts)
    learned, refused = learned_weights(choices)
    replies = read_replies(options.reports, contexts)
    reported = {name: np.mean(one.weights, axis=0) for name, one in replies.items() if one.weights}
    if not learned:
        listed = "\n  ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:5])
        invalid = sum(one.invalid for one in choices.values())
        raise ValueError(
            f"no weights can be fitted to the choices of any of {len(choices)} contexts ({invalid} answers are "
            f"neither A nor B):\n  {listed}"
        )
    found = compared(reported, learned, "reports")
    names = [name for name in learned if name in reported]
    results: dict[str, Any] = {
        **found,
        "validity": validity(replies, list(choices), options.asked),
        "choices": {
            "valid": sum(len(one.chosen) for one in choices.values()),
            "invalid": sum(one.invalid for one in choices.values()),
            "refused": refused,
        },
        "chance": {
            "permuted_contexts": permuted([reported[name] for name in names], [learned[name] for name in names]),
            "permuted_attributes": permuted(
                [reported[name] for name in names], [learned[name] for name in names], within=True
            ),
        },
        "learned": {name: weights.round(2).tolist() for name, weights in learned.items()},
        "reported": {name: weights.round(2).tolist() for name, weights in reported.items()},
    }
    if options.weights:
        target = {name: np.array(w) for name, w in read_weights(options.weights, contexts).items()}
        results["learned_against_target"] = compared(learned, target, "--weights")
        results["reported_against_target"] = compared(reported, target, "--weights")
    if options.before:
        early = {name: np.mean(one.weights, axis=0)
                 for name, one in read_replies(options.before, contexts).items() if one.weights}  # fmt: skip
        both = [name for name in names if name in early]
        results["before"] = compared(early, learned, "--before")
        late, first, true = ([found[name] for name in both] for found in (reported, early, learned))
        results["gain"] = gain(late, first, true)
    return results


def compared(one: Vectors, other: Vectors, what: str) -> dict[str, Estimate]:
    """Their agreement on the contexts that both have. Raises ValueError for fewer than two."""
    names = [name for name in other if name in one]
    if len(names) < 2:
        raise ValueError(f"{what}: {len(names)} contexts are on both sides; agreement needs at least two")
    return agreement([one[name] for name in names], [other[name] for name in names])


def show(results: Mapping[str, Any]) -> None:
    rows = {"reported against learned": results}
    rows |= {name.replace("_", " "): results[name] for name in
             ("before", "learned_against_target", "reported_against_target") if name in results}  # fmt: skip
    columns = ["pooled_r", "within_context_r", "sign_agreement", "mae", "slope", "sd_ratio"]
    lines = [{"what": name, **{column: _text(found[column]) for column in columns}, "contexts":
              str(found["pooled_r"]["n"])} for name, found in rows.items()]  # fmt: skip
    results_table(lines, ["what", *columns, "contexts"], "Weights, with 95 % intervals over contexts")
    counts, choices = results["validity"], results["choices"]
    print(
        f"Replies: {counts['valid']} valid of {counts['asked']} asked ({counts['unparsable']} in the files are not),"
    )
    print(f"         from {counts['contexts']} of {counts['contexts_asked']} contexts.")
    print(f"Choices: {choices['valid']}, and {choices['invalid']} that are neither A nor B.")
    for name, reason in choices["refused"].items():
        print(f"No weights for {name}: {reason}")
    for name, found in results["chance"].items():
        print(f"By chance ({name.replace('_', ' ')}): r = {_text(found)}")
    if "gain" in results:
        print(f"Gain in pooled r on the contexts that both have: {_text(results['gain'])}")


def _text(found: Estimate) -> str:
    low, high = found["low"], found["high"]
    if found["value"] is None:
        return "–"
    return f"{found['value']:.3f}" + ("" if low is None or high is None else f" [{low:.3f}, {high:.3f}]")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m steerbook.eval.self_interpretability", description=__doc__)
    parser.add_argument("--scenarios", required=True, help="contexts: question, attributes and their ranges")
    parser.add_argument("--selections", required=True, nargs="+", help="choices, one row a trial")
    parser.add_argument("--reports", required=True, nargs="+", help="replies, one row each; several files are pooled")
    parser.add_argument("--before", nargs="+", help="earlier replies, to compare on the contexts that both have")
    parser.add_argument("--weights", help="the weights that were instilled, one row a context")
    parser.add_argument("--asked", type=int, help="replies asked of each context (default: the most any has)")
    parser.add_argument("--out", type=Path, help="folder for results.json")
    options = parser.parse_args(arguments)
    with clear_errors(ValueError, OSError):
        results = score(options)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            write_json(options.out / "results.json", results)
    show(results)


if __name__ == "__main__":
    main()
