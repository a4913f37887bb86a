"""Task vectors: the named difference of two checkpoints of one base (spec 1.1), dense or as LoRA factors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..fingerprint import once, tensors_fingerprint
from .entries import Entry, LazyTensors, LowRank, dense, plus, times
from .matching import check_same, listed, matched
from .storage import write_blocks

FORMAT = "steerbook task vector 1"
# The neighbours' names are part of this module.
__all__ = ["Entry", "LazyTensors", "LowRank", "TaskVector", "check_same", "difference", "matched"]


class TaskVector(Mapping[str, Entry]):
    """What fine-tuning changed: parameter name -> difference, a tensor or `LowRank`.

    Values may be read lazily (`extract.py`): each access reads its tensor anew, so go through them one at a time.
    Arithmetic is entry by entry: `a + b`, `a - b`, `2 * a`, `-a`; `apply(model)` adds it to a model in place.

    Args:
        tensors: any mapping from the names of `model.named_parameters()` to differences.
        base: `model_fingerprint` of the base, or None if unknown; vectors of different bases do not mix.
        source: where it comes from, for people.
    """

    def __init__(self, tensors: Mapping[str, Entry], *, base: str | None = None, source: str = "") -> None:
        self.tensors, self.base, self.source = tensors, base, source

    def __getitem__(self, name: str) -> Entry:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __repr__(self) -> str:
        return f"TaskVector({len(self)} tensors, base={self.base}, source={self.source!r})"

    @classmethod
    def from_state_dicts(
        cls, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], *, dtype: torch.dtype | None = None
    ) -> TaskVector:
        """`tuned - base` of two models' `state_dict()`, computed in fp32 (fp64 for fp64) and kept in `dtype` (default:
        that of `tuned`). Tied tensors count once, under their first name; integers and booleans are left out.

        Raises:
            ValueError: names or shapes differ, or weights are quantised; it lists them.
        """
        weights = ((name, one.dtype) for state in (base, tuned) for name, one in state.items() if "weight" in name)
        if odd := [name for name, dtype in weights if dtype in (torch.int8, torch.uint8)]:
            raise ValueError(f"{listed(odd)}: quantised weights; give the states of models in 16 or 32 bits")
        before, after = once(base), once(tuned)
        check_same({k: v.shape for k, v in before.items()}, {k: v.shape for k, v in after.items()}, "base", "tuned")
        return cls(
            {name: difference(before[name], tensor, dtype) for name, tensor in after.items()},
            base=tensors_fingerprint(before),
        )

    @classmethod
    def load(cls, path: str | Path) -> TaskVector:
        """A vector written by `save`, read lazily.

        Raises:
            ValueError: the file is cut short or holds something else.
        """
        try:
            tensors = _Saved(Path(path))
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a readable task vector ({type(error).__name__}: {error})") from error
        return cls(tensors, base=tensors.about["base"], source=tensors.about["source"])

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all, with base fingerprint, dtypes and source in its header.

        Lazy entries are read twice, once to check them and once to write them, one at a time.

        Raises:
            ValueError: a tensor holds NaN or infinity, or all are zero; nothing was written.
            OSError: no room for the file.
        """
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        scales = {}
        changed = False
        for name in self:
            entry = self[name]
            parts = {f"{name}::a": entry.a, f"{name}::b": entry.b} if isinstance(entry, LowRank) else {name: entry}
            if isinstance(entry, LowRank):
                scales[name] = entry.scale
            for key, tensor in parts.items():
                refuse_non_finite(tensor, f"the task vector {self.source}: {name}")
                layout[key] = (tensor.dtype, tuple(tensor.shape))
            changed |= all(bool(tensor.any()) for tensor in parts.values())
            del entry, parts, tensor  # before the next one is read
        if not changed:
            raise ValueError(f"the task vector {self.source} is zero everywhere: base and tuned model are the same")

        def fill(key: str, write: Callable[[Tensor], None]) -> None:
            name, _, part = key.partition("::")
            write(getattr(self[name], part) if part else self.dense(name))

        about = {"base": self.base, "source": self.source, "scales": scales}
        write_blocks(Path(path), layout, fill, {"format": FORMAT, "about": json.dumps(about)})

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Name -> shape, without reading what is read lazily."""
        if isinstance(self.tensors, LazyTensors):
            return self.tensors.shapes
        return {name: torch.Size(entry.shape) for name, entry in self.items()}

    @property
    def low_rank(self) -> frozenset[str]:
        """Names of the entries that are factors, without reading what is read lazily."""
        if isinstance(self.tensors, LazyTensors):
            return self.tensors.low_rank
        return frozenset(name for name, entry in self.items() if isinstance(entry, LowRank))

    def dense(self, name: str) -> Tensor:
        """One entry as a tensor; a low-rank one is multiplied out."""
        return dense(self[name])

    __eq__ = object.__eq__  # as a mapping it would compare tensors, which have no single truth value
    __hash__ = object.__hash__

    def __mul__(self, factor: float) -> TaskVector:
        return _combine(self, factor, None, 0.0) if isinstance(factor, int | float) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def __add__(self, other: TaskVector) -> TaskVector:
        return _combine(self, 1.0, other, 1.0) if isinstance(other, TaskVector) else NotImplemented

    def __radd__(self, other: int) -> TaskVector:
        return self if other == 0 else NotImplemented  # what `sum` starts with

    def __sub__(self, other: TaskVector) -> TaskVector:
        return _combine(self, 1.0, other, -1.0) if isinstance(other, TaskVector) else NotImplemented

    def dot(self, other: TaskVector) -> float:
        """Inner product over the entries both have, summed in fp64."""
        total = 0.0
        for name in self:
            if name in other:
                total += _dot(self[name], other[name])
        return total

    def norm(self) -> float:
        """Euclidean norm over all entries."""
        return sum(_square(self[name]) for name in self) ** 0.5

    def cosine(self, other: TaskVector) -> float:
        """Cosine of the angle between two vectors; ValueError if one is zero."""
        norms = self.norm() * other.norm()
        if norms == 0:
            raise ValueError("the cosine with a zero task vector is not defined")
        return self.dot(other) / norms

    @torch.no_grad()
    def apply(self, model: nn.Module, scale: float = 1.0) -> nn.Module:
        """Add `scale` times the vector to the model's weights in place, in fp32, rounded once.

        Raises:
            ValueError: the model is another base, or lacks one of the tensors.
        """
        for name, parameter in matched(self, model).items():
            wide = torch.promote_types(parameter.dtype, torch.float32)
            parameter.copy_(parameter.to(wide) + scale * self.dense(name).to(parameter.device, wide))
        return model


def difference(base: Tensor, tuned: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`tuned - base` in fp32 (fp64 where one of them is), in `dtype` (default: the tuned tensor's)."""
    wide = torch.promote_types(torch.promote_types(base.dtype, tuned.dtype), torch.float32)
    return (tuned.to(wide) - base.to(wide)).to(dtype or tuned.dtype)


def refuse_non_finite(tensor: Tensor, what: str) -> None:
    """ValueError if it holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(f"{what} holds {bad} NaN or infinite values")


def _dot(one: Entry, other: Entry) -> float:
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return one.dot(other)
    return float(dense(one).double().flatten() @ dense(other).double().flatten())


def _square(entry: Entry) -> float:
    return max(0.0, _dot(entry, entry))  # factors that cancel may come out below zero by rounding


def _combine(one: TaskVector, weight: float, other: TaskVector | None, other_weight: float) -> TaskVector:
    if other is None:
        return TaskVector(_Combination((one, weight)), base=one.base, source=one.source)
    if None not in (one.base, other.base) and one.base != other.base:
        raise ValueError(f"task vectors of two bases ({one.base} and {other.base}) cannot be combined")
    tensors = _Combination((one, weight), (other, other_weight))
    return TaskVector(tensors, base=one.base or other.base, source=f"{one.source} and {other.source}")


class _Combination(LazyTensors[Entry]):
    """A weighted sum, computed tensor by tensor. Only low-rank entries may be in one vector alone (absent is zero)."""

    def __init__(self, *parts: tuple[TaskVector, float]) -> None:
        self.parts = parts
        everywhere = [vector.shapes for vector, _ in parts]
        factors = [vector.low_rank for vector, _ in parts]
        self.shapes = {name: shape for shapes in everywhere for name, shape in shapes.items()}
        dense_somewhere = {
            name for shapes, low in zip(everywhere, factors, strict=True) for name in shapes if name not in low
        }
        self.low_rank = frozenset(self.shapes) - dense_somewhere
        alone = [name for name in self.shapes if not all(name in shapes for shapes in everywhere)]
        if refused := [name for name in alone if name in dense_somewhere]:
            raise ValueError(f"only one of two task vectors has {listed(refused)}; they cannot be combined")
        for shapes in everywhere:
            common = {name: self.shapes[name] for name in shapes}
            check_same(common, shapes, "one task vector", "the other")

    def __getitem__(self, name: str) -> Entry:
        terms = [times(vector[name], weight) for vector, weight in self.parts if name in vector]
        if not terms:
            raise KeyError(name)
        return terms[0] if len(terms) == 1 else plus(*terms)


class _Saved(LazyTensors[Entry]):
    """The entries of a file that `TaskVector.save` wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(f"{path} is no task vector of ours (format {header.get('format')!r})")
            self.about = json.loads(header["about"])
            sizes = {key: torch.Size(file.get_slice(key).get_shape()) for key in file.keys()}
        scales = self.about["scales"]
        self.low_rank = frozenset(scales)
        self.shapes = {name: size for name, size in sizes.items() if "::" not in name}
        self.shapes |= {name: torch.Size((sizes[f"{name}::b"][0], sizes[f"{name}::a"][1])) for name in scales}

    def __getitem__(self, name: str) -> Entry:
        if name not in self.shapes:
            raise KeyError(name)
        with safe_open(self.path, framework="pt") as file:
            if name in self.low_rank:
                return LowRank(
                    file.get_tensor(f"{name}::a"), file.get_tensor(f"{name}::b"), self.about["scales"][name]
                )
            return file.get_tensor(name)
