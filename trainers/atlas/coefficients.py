"""`coefficients.json`: learned coefficients with what is needed to apply them elsewhere, or to see that they are not
meant for there."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...files import write_json
from .blocks import BLOCKS, split_blocks
from .composer import Composer
from .low_rank import LowRankComposer
from .matching import listed
from .task_vector import TaskVector

FORMAT = "steerbook coefficients 1"


@dataclass(frozen=True)
class SavedCoefficients:
    """The content of a `coefficients.json`.

    Attributes:
        base: fingerprint of the base model.
        vectors: of each of the n task vectors what tells it from others (`Composer.vector_ids`).
        sources: where each of the n task vectors came from, for people.
        kind: `blocks` of the `Composer`; of a `LowRankComposer` "tensor", or "per_factor".
        blocks: block name -> its parameters, in the order of the columns.
        partitions, seed: of the partition; 1 and 0 without one.
        values: [n][m], [n][m][K] with partitions, [n][m][2] per factor.
    """

    base: str
    vectors: list[str]
    sources: list[str]
    kind: str
    blocks: dict[str, list[str]]
    partitions: int
    seed: int
    values: list

    @property
    def tensor(self) -> Tensor:
        """The values in fp64."""
        return torch.tensor(self.values, dtype=torch.float64)


def save_coefficients(path: str | Path, composer: Composer | LowRankComposer, *, sources: Sequence[str]) -> None:
    """Write `coefficients.json`, whole or not at all. Numbers read back to the same bits.

    Raises:
        ValueError: another number of sources than of task vectors, or coefficients that are not finite.
    """
    if len(sources) != len(composer.coefficients):
        raise ValueError(f"{len(sources)} sources {list(sources)} for {len(composer.coefficients)} task vectors")
    check_finite(composer.coefficients)
    saved = _described(composer, list(sources), composer.coefficients.detach().cpu().tolist())
    write_json(Path(path), {"format": FORMAT, **asdict(saved)})


def load_coefficients(path: str | Path) -> SavedCoefficients:
    """Read what `save_coefficients` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, cut short, or values that do not fit its own blocks and sources.
    """
    try:
        content = json.loads(Path(path).read_text())
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        saved = SavedCoefficients(**content)
        shape, expected = tuple(saved.tensor.shape), _shape(saved)
        check_finite(saved.tensor)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no file of coefficients of ours ({type(error).__name__}: {error})") from error
    if shape != expected:
        raise ValueError(f"{path}: values of shape {list(shape)} for blocks and sources of {list(expected)}")
    return saved


@torch.no_grad()
def apply_coefficients(composer: Composer | LowRankComposer, saved: SavedCoefficients) -> None:
    """Set a composer's coefficients to saved ones, and compose.

    Coefficients per product of LoRA vectors also fit a `Composer` of the same vectors with blocks="tensor", and the
    other way round.

    Raises:
        ValueError: another base, number of vectors, kind of coefficients, blocks or partition; nothing was changed.
    """
    here = _described(composer, saved.sources, [])
    problems = []
    if here.base != saved.base:
        problems.append(f"they were learned on the base {saved.base}, this one is {here.base}")
    if len(composer.coefficients) != len(saved.sources):
        problems.append(
            f"they are for {len(saved.sources)} task vectors ({', '.join(saved.sources)}), here are "
            f"{len(composer.coefficients)}"
        )
    if (here.kind == "per_factor") != (saved.kind == "per_factor"):
        problems.append(f"they are {saved.kind!r}, these {here.kind!r}")
    if list(here.blocks.items()) != list(saved.blocks.items()):
        problems.append(_other_blocks(here, saved))
    elif others := _other_vectors(here, saved):
        problems.append(f"they were learned for other task vectors than {', '.join(others)}, or in another order")
    if here.partitions != saved.partitions or (saved.partitions > 1 and here.seed != saved.seed):
        problems.append(
            f"they are for partitions={saved.partitions}, seed={saved.seed}; here are partitions={here.partitions}, "
            f"seed={here.seed}"
        )
    if problems:
        raise ValueError("these coefficients do not fit: " + "; ".join(problems))
    composer.coefficients.copy_(saved.tensor)
    composer.compose()


def saved_composer(saved: SavedCoefficients, model: nn.Module, vectors: Sequence[TaskVector]) -> Composer:
    """A composer with the blocks and partitions of these coefficients; `apply_coefficients` sets them."""
    names = [f"^{re.escape(name)}$" for members in saved.blocks.values() for name in members]
    return Composer(model, vectors, saved.kind, (), include=names, partitions=saved.partitions, seed=saved.seed)


def members(composer: Composer | LowRankComposer) -> dict[str, list[str]]:
    """Block name -> the names of its parameters, in the order of the columns."""
    if isinstance(composer, LowRankComposer):
        return {name: [name] for name in composer.block_names}
    found: dict[str, list[str]] = {name: [] for name in composer.block_names}
    for slot in composer._slots:
        found[composer.block_names[slot.block]].append(slot.name)
    return found


def check_finite(coefficients: Tensor) -> None:
    if not torch.isfinite(coefficients).all():
        raise ValueError("some coefficients are NaN or infinite")


def _described(composer: Composer | LowRankComposer, sources: list[str], values: list) -> SavedCoefficients:
    blocks = members(composer)
    if isinstance(composer, LowRankComposer):
        kind, partitions, seed = ("tensor" if composer.mode == "per_product" else "per_factor"), 1, 0
    else:
        kind, partitions = _kind(composer, blocks), composer.partitions
        seed = composer.seed if partitions > 1 else 0
    return SavedCoefficients(composer.base, list(composer.vector_ids), sources, kind, blocks, partitions, seed, values)


def _kind(composer: Composer, blocks: dict[str, list[str]]) -> str:
    """The first kind that cuts the composed parameters into these blocks, the narrowest first."""
    names = [name for group in blocks.values() for name in group]
    kinds = ["matrices", *BLOCKS]
    return next(kind for kind in kinds if split_blocks(composer.model, names, kind, exclude=()) == blocks)


def _other_vectors(here: SavedCoefficients, saved: SavedCoefficients) -> list[str]:
    """The sources of vectors that are others here. Factors cannot be told from what they multiply out to."""
    pairs = zip(saved.sources, saved.vectors, here.vectors, strict=False)  # their number is a problem of its own
    return [source for source, one, other in pairs if one != other and (" " in one) == (" " in other)]


def _shape(saved: SavedCoefficients) -> tuple[int, ...]:
    last = 2 if saved.kind == "per_factor" else saved.partitions
    return (len(saved.sources), len(saved.blocks)) + ((last,) if last > 1 else ())


def _other_blocks(here: SavedCoefficients, saved: SavedCoefficients) -> str:
    only_here, only_there = list(here.blocks.keys() - saved.blocks.keys()), list(saved.blocks.keys() - here.blocks)
    parts = [f"they are for {len(saved.blocks)} {saved.kind} blocks, here are {len(here.blocks)} {here.kind} blocks"]
    parts += [f"only they have {listed(sorted(only_there))}"] if only_there else []
    parts += [f"only here are {listed(sorted(only_here))}"] if only_here else []
    return ", ".join(parts if only_here or only_there else [*parts, "of other parameters or in another order"])
