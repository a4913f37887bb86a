"""What is compared with what: from the records of one seed's arms to the rows of the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .agreement import pooled_r

Record: TypeAlias = Mapping[str, Any]
Array = NDArray[np.float64]
INSTILLED = ("report_train", "report_dev", "report_test")
TEST = ("report_test",)
LEARNED, AFTER, HELD_OUT = "learned against target", "1: reports after instilling", "2: reports on held-out contexts"
BEFORE, SHUFFLED = "1: the same, on the contexts of 2", "control: trained on shuffled reports"
OTHER, NATIVE = "control: another model's reports", "3: native, after report training"
NATIVE_BEFORE = "native, before report training"
NEW, OLD = (f"new preferences: reports against {which} choices" for which in ("new", "old"))


class Row(NamedTuple):
    """Weights of the same contexts, `[contexts, attributes]` each: reported or learned, and what they should be; which
    contexts; and of those that were asked, how many replies were written freely, and how many of these are valid."""

    found: Array
    true: Array
    names: tuple[str, ...]
    replies: int = 0
    valid: int = 0

    def only(self, names: Sequence[str]) -> Row:
        """The row of these contexts, in their order."""
        places = [self.names.index(name) for name in names]
        return self._replace(found=self.found[places], true=self.true[places], names=tuple(names))


def learned_against_target(record: Record, estimator: str = "paper") -> Row | None:
    return _row(record, lambda one: _learned(one, estimator), record, lambda one: one["target"], INSTILLED)


def reports_against(record: Record, learned: Record, roles: Sequence[str], said: str = "reported") -> Row | None:
    """Reports of one model (`said`: "reported" or "written") against the weights behind the choices of another, or of
    the same one."""
    row = _row(record, lambda one: one.get(said), learned, lambda one: _learned(one, "paper"), roles)
    return _counted(row, record, roles)


def reports_against_target(record: Record, roles: Sequence[str]) -> Row | None:
    row = _row(record, lambda one: one.get("reported"), record, lambda one: one["target"], roles)
    return _counted(row, record, roles)


def instilled_r(record: Record) -> float:
    """Pooled r of learned and target weights of the instilled contexts; 0 where none could be fitted."""
    row = learned_against_target(record)
    return 0.0 if row is None else float(pooled_r(row.found, row.true))


def instilled_agreement(record: Record) -> float:
    """Share of choices of the instilled contexts that are as their target weights would have them."""
    found = [
        one["agreement"] for one in record["contexts"].values() if one["role"] in INSTILLED and "agreement" in one
    ]
    return float(np.mean(found)) if found else 0.0


def took(record: Record, gate: float) -> bool:
    """Whether instilling did: r of learned and target weights, and the share of choices that are as targets have
    them (spec 4.6)."""
    return min(instilled_r(record), instilled_agreement(record)) >= gate


def trained_to_report(arms: Mapping[str, Record]) -> list[Record]:
    """Of the first level, those that were trained to report true weights: one for each fold."""
    level = next(iter(arms.values()))["level"]
    return [record for record in arms.values() if record["kind"] == "reported" and record["level"] == level]


def on_held_out(record: Record, learned: Record, folds: Sequence[Record]) -> Row | None:
    """Reports of a model that knows no folds, on the contexts that each of them holds out."""
    return joined([reports_against(_as_fold(record, fold), learned, TEST) for fold in folds])


def comparisons(arms: Mapping[str, Record]) -> dict[str, Row]:
    """The table's rows, of one seed; held-out contexts of several folds are taken together."""
    base, instilled = arms["base"], arms.get("instilled")
    if instilled is None:
        return {}
    folds, made = trained_to_report(arms), dict[str, Row | None]()
    made[LEARNED] = learned_against_target(instilled)
    made["base model's reports"] = reports_against(base, instilled, INSTILLED)
    made[AFTER] = reports_against(instilled, instilled, INSTILLED)
    made["1: the same, written freely"] = reports_against(instilled, instilled, INSTILLED, "written")
    made[BEFORE] = on_held_out(instilled, instilled, folds)
    made[HELD_OUT] = joined([reports_against(one, instilled, TEST) for one in folds])
    made["2: the same, written freely"] = joined([reports_against(one, instilled, TEST, "written") for one in folds])
    made["2: the same, against choices measured again"] = joined([reports_against(one, one, TEST) for one in folds])
    made[NATIVE_BEFORE] = reports_against(instilled, instilled, ("native",))
    made["native, base model's reports"] = reports_against(base, instilled, ("native",))
    # Native contexts are the same in every fold. Of experiment 3's model all instilled contexts were reported.
    for one in [arms["reported_all"]] if "reported_all" in arms else folds[:1]:
        made["choices measured again against target"] = learned_against_target(one)
        made[NATIVE] = reports_against(one, instilled, ("native",))
        made["never set (dummy weights)"] = reports_against_target(one, ("never",))
    if "shuffled" in arms:
        made[SHUFFLED] = reports_against(arms["shuffled"], instilled, TEST)
    if "other" in arms:
        made["control: another model, learned against its target"] = learned_against_target(arms["other"])
        made[OTHER] = reports_against(arms["other"], instilled, TEST)
        made["native, another model's reports"] = reports_against(arms["other"], instilled, ("native",))
    if "reinstil" in arms:
        made["new preferences: learned against new target"] = _row(
            arms["reinstil"], lambda one: _learned(one, "paper"), arms["reinstil"], lambda one: one["target"], TEST
        )
        made[NEW] = reports_against(arms["reinstil"], arms["reinstil"], TEST)
        made[OLD] = reports_against(arms["reinstil"], instilled, TEST)
    for record in arms.values():
        level = record["level"]
        if level == base["level"] or record["kind"] not in ("instilled", "reported"):
            continue
        if record["kind"] == "instilled":
            made[f"{level}: learned against target"] = learned_against_target(record)
            made[f"{level}: reports after instilling"] = reports_against(record, record, INSTILLED)
        else:
            own = arms[f"instilled_{level}"]
            made[f"{level}: reports on held-out contexts"] = reports_against(record, own, TEST)
    return {name: row for name, row in made.items() if row is not None}


def joined(rows: Sequence[Row | None]) -> Row | None:
    there = [row for row in rows if row is not None]
    if not there:
        return None
    return Row(
        np.concatenate([row.found for row in there]),
        np.concatenate([row.true for row in there]),
        tuple(name for row in there for name in row.names),
        sum(row.replies for row in there),
        sum(row.valid for row in there),
    )


def _learned(one: Record, estimator: str) -> Sequence[float] | None:
    return one["learned"][estimator] if "learned" in one else None


def _row(
    left: Record, first: Callable[[Record], Any], right: Record, second: Callable[[Record], Any], roles: Sequence[str]
) -> Row | None:
    """Both sides of the contexts of these roles (those of `left`) that both have; None for fewer than two."""
    names = [name for name, one in left["contexts"].items() if one["role"] in roles and name in right["contexts"]]
    pairs = {name: (first(left["contexts"][name]), second(right["contexts"][name])) for name in names}
    kept = {name: pair for name, pair in pairs.items() if pair[0] is not None and pair[1] is not None}
    if len(kept) < 2:
        return None
    found, true = (np.array([pair[side] for pair in kept.values()], dtype=float) for side in (0, 1))
    return Row(found, true, tuple(kept))


def _counted(row: Row | None, record: Record, roles: Sequence[str]) -> Row | None:
    asked = [one for one in record["contexts"].values() if one["role"] in roles]
    replies, valid = (sum(one.get(name, 0) for one in asked) for name in ("replies", "valid"))
    return None if row is None else row._replace(replies=replies, valid=valid)


def _as_fold(record: Record, fold: Record) -> Record:
    """A record with the roles that contexts have in a fold."""
    roles = {name: one["role"] for name, one in fold["contexts"].items()}
    return {**record, "contexts": {name: {**one, "role": roles[name]} for name, one in record["contexts"].items()}}
