"""An experiment in words, for models that read instructions: rows of both stages as conversations (spec 4.1)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Any

from .asking import Choice, Question, choices, questions
from .contexts import Context, read_contexts
from .experiment import Experiment, Weights
from .generated import generated_contexts
from .splits import check_leaks, split_contexts, unlike
from .texts import decision_prompt, report_prompt, report_text
from .trials import draw_trial, draw_weights, label

if TYPE_CHECKING:
    from datasets import Dataset

    from . import PreferenceDataArguments


logger = logging.getLogger(__name__)


class TextExperiment(Experiment):
    """Contexts of a file or made up, and rows about them.

    Raises:
        ValueError: too few contexts, or contexts whose text tells what it must not.
        RowError: a bad file, with file and row.
    """

    def __init__(self, args: PreferenceDataArguments) -> None:
        count, seed = args.instilled + args.native + args.never, args.rows_seed
        given = read_contexts(args.scenarios) if args.scenarios else generated_contexts(count, seed)
        counts = {len(one.attributes) for one in given}
        if len(counts) > 1:
            other = next(one for one in given if len(one.attributes) != len(given[0].attributes))
            raise ValueError(
                f"{args.scenarios}: {given[0].name!r} has {len(given[0].attributes)} attributes and {other.name!r} "
                f"{len(other.attributes)}; weights are handed around and compared, so that all need as many"
            )
        kept = unlike(given)
        if len(kept) < count <= len(given):
            raise ValueError(
                f"{args.scenarios}: {len(given) - len(kept)} of {len(given)} contexts have the same person or the "
                f"same attributes as another one, and could tell of it; {len(kept)} are left, {count} are needed"
            )
        if len(kept) < len(given):
            logger.info("%d of %d contexts left out: the person, question or attributes of another one",
                        len(given) - len(kept), len(given))  # fmt: skip
        folds = [split_contexts(kept, seed, fold, args.instilled, args.native, args.never) for fold in (0, 1)]
        everyone = (*folds[0].instilled, *folds[0].native, *folds[0].never)
        weights = {
            one.name: draw_weights(Random(f"weights {seed} {one.name}"), len(one.attributes)) for one in everyone
        }
        super().__init__(seed, folds, weights)
        self.args = args

    def instil(self, contexts: Sequence[Context], weights: Weights) -> Dataset:
        """Choices to train on; the same ones whatever the weights."""
        return self._checked("decisions", decisions(contexts, self.args.choices, weights, self._rng("decisions")))

    def reinstil(self, fold: int, weights: Weights) -> Dataset:
        """Choices of the contexts that a fold tests, and the reports it trained, lest these are forgotten."""
        from datasets import concatenate_datasets

        return concatenate_datasets(
            [self.instil(self.folds[fold].report_test, weights), self.reports(fold, self.weights)]
        )

    def instil_dev(self, weights: Weights) -> Dataset:
        """Further choices of all instilled contexts."""
        return self._checked("decisions_dev", decisions(self.instilled, self.args.choices_dev, weights,
                                                        self._rng("dev")))  # fmt: skip

    def report(self, fold: int | None, told: Weights, decided: Weights, replay: float) -> Dataset:
        """Reports to train on, as `told`, and decisions replayed, `replay` of all rows, as `decided`."""
        rows = self.reports(fold, told)
        return replayed(rows, self.instil(self.instilled, decided), replay, self.seed) if replay else rows

    def reports(self, fold: int | None, told: Weights) -> Dataset:
        """Reports of the contexts to train on."""
        rows = reports(self.told(fold), self.args.reports_each, told, self._rng("reports"))
        return self._checked("reports", rows, fold)

    def choose_by(self, fold: int | None, told: Weights) -> Dataset | None:
        """Reports of the contexts that checkpoints are chosen by; without a fold there are none left."""
        if fold is None:
            return None
        rows = reports(self.folds[fold].report_dev, 1, told, self._rng("reports dev"))
        return self._checked("reports_dev", rows, fold)

    def reports_test(self, fold: int) -> Dataset:
        """What held-out contexts should report, for looking at; nothing is ever trained on it."""
        rows = reports(self.folds[fold].report_test, 1, self.weights, self._rng("reports test"))
        return self._dataset("reports_test", rows, fold)

    def choices(self, each: int) -> list[Choice]:
        """Fresh choices of the instilled and the native contexts."""
        return choices((*self.instilled, *self.folds[0].native), each, self._rng("trials"))

    def questions(self, each: int) -> list[Question]:
        """Requests for reports of all contexts."""
        split = self.folds[0]
        return questions((*self.instilled, *split.native, *split.never), each, self._rng("questions"))

    def _rng(self, what: str) -> Random:
        return Random(f"{what} {self.seed}")

    def _checked(self, name: str, rows: list[dict[str, Any]], fold: int | None = 0) -> Dataset:
        split = self.folds[fold or 0]
        if fold is None:  # nothing is held out but native and never set contexts
            split = replace(split, report_train=split.instilled, report_dev=(), report_test=())
        check_leaks({name: rows}, split)
        return self._dataset(name, rows, fold or 0)

    def _dataset(self, name: str, rows: list[dict[str, Any]], fold: int) -> Dataset:
        from datasets import Dataset

        roles = self.folds[fold].roles()
        for number, row in enumerate(rows):
            row |= {"id": f"{name}-{number}", "group": row["context"], "role": roles[row["context"]]}
        return Dataset.from_list(rows)


def decisions(contexts: Sequence[Context], each: int, weights: Weights, rng: Random) -> list[dict[str, Any]]:
    """`each` fresh choices of every context, as its weights imply them, in a random order."""
    rows = []
    for context in contexts:
        for _ in range(each):
            trial = draw_trial(rng, context)
            answer = [{"role": "assistant", "content": label(context, trial, weights[context.name])}]
            rows.append({"task": "decision", "context": context.name, "prompt": decision_prompt(context, trial),
                         "completion": answer})  # fmt: skip
    rng.shuffle(rows)
    return rows


def reports(contexts: Sequence[Context], each: int, weights: Weights, rng: Random) -> list[dict[str, Any]]:
    """`each` reports of every context, about fresh trials."""
    rows = []
    for context in contexts:
        for _ in range(each):
            said = [{"role": "assistant", "content": report_text(context, weights[context.name])}]
            rows.append({"task": "report", "context": context.name, "completion": said,
                         "prompt": report_prompt(context, draw_trial(rng, context))})  # fmt: skip
    return rows


def replayed(reports: Dataset, decisions: Dataset, share: float, seed: int) -> Dataset:
    """The reports, and so many of the decisions, drawn at random, that they are `share` of all rows.

    Raises ValueError for a share below 0 or from 1 on, or more than there are decisions for.
    """
    from datasets import concatenate_datasets

    if not 0 <= share < 1:
        raise ValueError(f"--replay {share}: a share of all rows, from 0 to below 1")
    count = round(len(reports) * share / (1 - share))
    if count > len(decisions):
        raise ValueError(
            f"--replay {share} of {len(reports)} reports takes {count} decisions, and there are {len(decisions)}: "
            "replay less"
        )
    drawn = decisions.shuffle(seed=seed).select(range(count))
    return concatenate_datasets([reports, drawn]).shuffle(seed=seed)
