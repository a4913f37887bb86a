"""Label sentences by a model's hidden states, ask it for the labels, and for sentences that have them.

python -m steerbook.eval.neurofeedback --model DIR --other DIR --sentences FILE --out DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from ...console import clear_errors
from ...data_builders.rows import RowChecker, read_rows
from ...files import write_json
from ..command import json_object, load_model
from ..report import format_interval, results_table
from . import figures
from .arms import IDEAL, RELABELLED, SELF, Half, Reader, Reports, report
from .axes import CLASSIFIER, Axis, check_length, fit_axes, label_edges, sentence_vectors
from .control import NEW_TOKENS, Steered, steer
from .dialogue import SYSTEM, Turn, dialogue, score_tokens

COLUMNS = {"text": ("text", "sentence", "statement"), "label": ("label",)}


def read_sentences(file: str) -> tuple[list[str], NDArray[np.int64]]:
    """Texts and what they are about, 0 or 1. RowError for anything else, a text that is there twice, or too few."""
    rows = read_rows(file)
    checker = RowChecker(rows, COLUMNS, "sentences")
    texts, kinds = [], []
    for row in rows:
        text = checker.text(row, "text").strip()
        checker.unique(row, "text", text)
        value = str(checker.value(row, "label")).strip()
        if value not in ("0", "1"):
            checker.problem(row, "label", repr(value), "0 or 1")
        texts.append(text)
        kinds.append(int(value == "1"))
    checker.finish()
    return texts, np.array(kinds)


def halves(kinds: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of two halves, both with as many sentences of either kind."""
    rng = np.random.default_rng(seed)
    each = min(np.bincount(kinds, minlength=2)) // 2
    if each < 4:
        raise ValueError(f"{np.bincount(kinds, minlength=2).tolist()} sentences of kinds 0 and 1; at least 8 each")
    drawn = [rng.permutation(np.flatnonzero(kinds == kind))[: 2 * each] for kind in (0, 1)]
    parts = [np.concatenate([one[:each] for one in drawn]), np.concatenate([one[each:] for one in drawn])]
    return rng.permutation(parts[0]), rng.permutation(parts[1])


def check(options: argparse.Namespace, count: int, texts: Sequence[str], readers: Sequence[Reader]) -> None:
    """ValueError, before any time is spent, for what these sentences (`count` in either half) and models cannot do."""
    layers = readers[0][0].config.get_text_config().num_hidden_layers
    options.layers = options.layers or sorted({round(share * (layers - 1)) for share in (0, 0.25, 0.5, 0.75, 1)})
    if bad := [layer for layer in options.layers if not 0 <= layer < layers]:
        raise ValueError(f"--layers {bad[0]}: the model has layers 0 to {layers - 1}")
    for name in options.axes:
        if name != CLASSIFIER and not (name.startswith("pc") and name[2:].isdigit() and 0 < int(name[2:]) < count):
            raise ValueError(
                f"--axes {name}: known are {CLASSIFIER} and, with {count} sentences, pc1 to pc{count - 1}"
            )
    label_edges([-1.0, 1.0], options.levels)
    most = max(options.control_examples) if options.repeats else 0
    if most >= count:
        raise ValueError(f"--control_examples {most}: there are {count} sentences, one of which is to be said")
    longest = sorted(texts, key=len)[-max(most + 1, min(options.examples, count)) :]
    for model, tokenizer in readers:
        turns = [Turn(text, 0) for text in longest]
        made = dialogue(tokenizer, turns, options.chat_template_kwargs or {}, SYSTEM)
        check_length(model, len(made.ids) + NEW_TOKENS)
        score_tokens(tokenizer, made.before, options.levels)


def fitted(options: argparse.Namespace, readers: Sequence[Reader]) -> tuple[Half, Half, dict[tuple[int, str], Axis]]:
    """Both halves of the sentences with their hidden states, and the axes of the first."""
    texts, kinds = read_sentences(options.sentences)
    parts = halves(kinds, options.seed)
    check(options, len(parts[0]), texts, readers)
    (model, tokenizer), (other, reads) = readers
    vectors = sentence_vectors(model, tokenizer, texts, template=options.chat_template_kwargs, progress=True)
    seen = sentence_vectors(other, reads, texts, template=options.chat_template_kwargs, progress=True)
    fit, rest = (
        Half([texts[place] for place in part], kinds[part], vectors[part], seen[part, seen.shape[1] // 2])
        for part in parts
    )
    axes = fit_axes(fit.vectors, fit.kinds, options.layers, options.axes, levels=options.levels)
    return fit, rest, axes


def reported(
    options: argparse.Namespace, fit: Half, rest: Half, axes: Mapping[tuple[int, str], Axis], readers: Sequence[Reader]
) -> list[Reports]:
    rng = np.random.default_rng(options.seed)
    examples = min(options.examples, len(rest.texts))
    orders = np.stack([rng.permutation(len(rest.texts))[:examples] for _ in range(options.orders)])
    with tqdm(total=len(axes) * len(orders), desc="reports", unit="order") as bar:
        return [
            report(axis, fit, rest, orders, *readers, seed=options.seed, template=options.chat_template_kwargs,
                   step=bar.update)
            for axis in axes.values()
        ]  # fmt: skip


def controlled(
    options: argparse.Namespace, rest: Half, axes: Mapping[tuple[int, str], Axis], model: Reader
) -> list[dict[str, Any]]:
    """Of each axis, number of examples and kind of control its effects; those of "explicit" only if asked for."""
    kinds = ["implicit", *(["explicit"] if options.explicit else [])]
    found = []
    jobs = [(axis, examples, kind) for axis in axes.values() for examples in options.control_examples
            for kind in kinds]  # fmt: skip
    for axis, examples, kind in tqdm(jobs, desc="control", unit="axis"):
        beside = [one for one in axes.values() if one.layer == axis.layer]
        steered = steer(
            *model, beside, axis.name, rest.texts, rest.vectors[:, axis.layer], examples=examples,
            repeats=options.repeats, seed=options.seed, write=kind == "explicit",
            template=options.chat_template_kwargs,
        )  # fmt: skip
        found.append({"layer": axis.layer, "axis": axis.name, "examples": examples, "kind": kind, **effects(steered)})
    return found


def effects(steered: Steered) -> dict[str, Any]:
    kept = len(steered.whole())
    if kept < 2:
        return {"repeats": kept, "d": None, "off_target": None, "precision": None}
    d = steered.effects()
    beside = [abs(one["value"]) for name, one in d.items() if name != steered.target]
    return {
        "repeats": kept,
        "d": d[steered.target],
        "off_target": float(np.mean(beside)) if beside else None,
        "precision": steered.precision() if beside else None,
        "axes": d,
    }


def score(options: argparse.Namespace) -> dict[str, Any]:
    """All that `results.json` holds; figures go to `options.out`."""
    readers = [load_model(name) for name in (options.model, options.other)]
    fit, rest, axes = fitted(options, readers)
    reports = reported(options, fit, rest, axes, readers)
    control = controlled(options, rest, axes, readers[0]) if options.repeats else []
    results = {
        "chance": 1 / options.levels,
        "examples": int(reports[0].orders.shape[1]),
        "reports": [
            {"layer": one.axis.layer, "axis": one.axis.name, "headline": one.headline(), "accuracy": one.accuracies(),
             "cross_entropy": one.cross_entropies(), "curve": one.curve()}
            for one in reports
        ],
        "control": control,
    }  # fmt: skip
    if options.out:
        write_json(options.out / "results.json", results)
        draw(results, options.out)
    return results


def draw(results: Mapping[str, Any], folder: Path) -> None:
    layers = sorted({one["layer"] for one in results["reports"]})
    middle = layers[len(layers) // 2]
    curves = {f"{one['axis']}, layer {middle}": one["curve"] for one in results["reports"] if one["layer"] == middle}
    figures.accuracy_curves(curves, results["chance"], folder / "accuracy.png")
    implicit = [one for one in results["control"] if one["kind"] == "implicit" and one["d"]]
    if implicit:
        most = max(one["examples"] for one in implicit)
        lines: dict[str, dict[int, Any]] = {}
        for one in implicit:
            if one["examples"] == most:
                lines.setdefault(one["axis"], {})[one["layer"]] = one["d"]
        figures.effect_sizes(lines, folder / "control.png", title=f"Implicit control after {most} examples")


def show(results: Mapping[str, Any]) -> None:
    lines = [
        {"axis": f"{one['axis']}, layer {one['layer']}", "ahead": format_interval(one["headline"], digits=2),
         **{name: format_interval(found, digits=2) for name, found in one["accuracy"].items()}}
        for one in results["reports"]
    ]  # fmt: skip
    few = results["examples"] // 2
    results_table(lines, list(lines[0]), f"Labels reported rightly, after {few} examples or more; chance is "
                  f"{results['chance']:.2f}. Ahead: of the best that has no look inside")  # fmt: skip
    if results["control"]:
        rows = [
            {"axis": f"{one['axis']}, layer {one['layer']}", "control": one["kind"], "examples": str(one["examples"]),
             "d": format_interval(one["d"], digits=2) if one["d"] else "–",
             "other axes": "–" if one["off_target"] is None else f"{one['off_target']:.2f}",
             "precision": "–" if one["precision"] is None else f"{one['precision']:.2f}",
             "repeats": str(one["repeats"])}
            for one in results["control"]
        ]  # fmt: skip
        results_table(rows, list(rows[0]), "Effect sizes of asking for one side of an axis")
    ahead = sum(one["headline"]["low"] is not None and one["headline"]["low"] > 0 for one in results["reports"])
    print(
        f"{SELF} is ahead of everything that has no look inside on {ahead} of {len(lines)} axes (whole 95 % interval)."
    )
    print(f"'{RELABELLED}' asks for what the input does not explain; '{IDEAL}' sees the hidden states themselves.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m steerbook.eval.neurofeedback", description=__doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id of an instruct model, or of an adapter")
    parser.add_argument("--other", required=True, help="another instruct model: reads the same labels, and embeds")
    parser.add_argument("--sentences", required=True, help="file with columns text and label (0 or 1)")
    parser.add_argument(
        "--axes", nargs="+", default=["lr", "pc1", "pc4", "pc16"], help="lr, pcK (default: %(default)s)"
    )
    parser.add_argument("--layers", nargs="+", type=int, help="default: five, from the first to the last")
    parser.add_argument("--levels", type=int, default=2, help="labels that scores are cut into (even)")
    parser.add_argument("--examples", type=int, default=256, help="sentences of one conversation")
    parser.add_argument("--orders", type=int, default=20, help="conversations for each axis")
    parser.add_argument("--control_examples", nargs="+", type=int, default=[64], help="0: nothing to go by, d is 0")
    parser.add_argument("--repeats", type=int, default=20, help="of each control task; 0 leaves control out")
    parser.add_argument("--explicit", action="store_true", help="let the model also write sentences of its own")
    parser.add_argument("--chat_template_kwargs", type=json_object, help="arguments of the chat template, as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for results.json and figures")
    options = parser.parse_args(arguments)
    for name, value, least in (("examples", options.examples, 4), ("orders", options.orders, 1),
                               ("control_examples", min(options.control_examples), 0)):  # fmt: skip
        if value < least:
            parser.error(f"--{name} must be at least {least}")
    if options.repeats < 0 or options.repeats == 1:
        parser.error("--repeats must be 0 or at least 2: an effect size has a spread")
    with clear_errors(ValueError, OSError):
        if Path(options.model).resolve() == Path(options.other).resolve():
            raise ValueError("--other is the model itself, which is no control: name another one")
        if options.out:  # before hours of work, not after
            options.out.mkdir(parents=True, exist_ok=True)
        results = score(options)
    show(results)


if __name__ == "__main__":
    main()
