"""Task vectors: the named difference of two checkpoints of one base (spec 1.1), dense or as LoRA factors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..fingerprint import model_fingerprint
from .storage import write_safetensors

FORMAT = "steerbook task vector 1"


@dataclass(frozen=True)
class LowRank:
    """The matrix `scale * b @ a`, kept as factors: `a` [rank, columns], `b` [rows, rank]."""

    a: Tensor
    b: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.b.shape[0], self.a.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        return self.b.dtype

    def dense(self) -> Tensor:
        """The product [rows, columns], computed in fp32 (fp64 for fp64 factors)."""
        wide = torch.promote_types(self.b.dtype, torch.float32)
        return self.scale * (self.b.to(wide) @ self.a.to(wide))

    def dot(self, other: LowRank) -> float:
        """Inner product of the two matrices without either: sum((b.T @ b') * (a @ a'.T))."""
        b = self.b.double().T @ other.b.double()
        a = self.a.double() @ other.a.double().T
        return self.scale * other.scale * float((a * b).sum())

    def plus(self, other: LowRank) -> LowRank:
        """The sum of the two matrices: the ranks add up."""
        return LowRank(torch.cat([self.a, other.a]), torch.cat([self.scale * self.b, other.scale * other.b], dim=1))


Entry = Tensor | LowRank


class LazyTensors(Mapping[str, Entry]):
    """Entries that are read when asked for; `shapes` is known before."""

    shapes: dict[str, torch.Size]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


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

    def __repr__(self) -> str:
        return f"TaskVector({len(self)} tensors, base={self.base}, source={self.source!r})"

    @classmethod
    def from_state_dicts(
        cls, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], *, dtype: torch.dtype | None = None
    ) -> TaskVector:
        """`tuned - base`, computed in fp32 (fp64 for fp64) and kept in `dtype` (default: that of `tuned`).

        Raises:
            ValueError: names or shapes differ; it lists them. Integer and boolean entries are left out.
        """
        check_same({k: v.shape for k, v in base.items()}, {k: v.shape for k, v in tuned.items()}, "base", "tuned")
        floating = [name for name, tensor in tuned.items() if tensor.is_floating_point()]
        return cls({name: difference(base[name], tuned[name], dtype) for name in floating})

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
        """Write one safetensors file, whole or not at all, with base fingerprint, dtypes and source in its header."""
        parts: dict[str, Tensor | None] = {}
        scales = {}
        for name, entry in self.items():
            if isinstance(entry, LowRank):
                parts |= {f"{name}::a": entry.a, f"{name}::b": entry.b}
                scales[name] = entry.scale
            else:
                parts[name] = entry
        about = {"base": self.base, "source": self.source, "scales": scales}
        write_safetensors(Path(path), parts, {"format": FORMAT, "about": json.dumps(about)})

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Name -> shape, without reading what is read lazily."""
        if isinstance(self.tensors, LazyTensors):
            return self.tensors.shapes
        return {name: torch.Size(entry.shape) for name, entry in self.items()}

    def dense(self, name: str) -> Tensor:
        """One entry as a tensor; a low-rank one is multiplied out."""
        entry = self[name]
        return entry.dense() if isinstance(entry, LowRank) else entry

    def __mul__(self, factor: float) -> TaskVector:
        return _combine(self, factor, None, 0.0)

    __rmul__ = __mul__

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def __add__(self, other: TaskVector) -> TaskVector:
        return _combine(self, 1.0, other, 1.0)

    def __sub__(self, other: TaskVector) -> TaskVector:
        return _combine(self, 1.0, other, -1.0)

    def dot(self, other: TaskVector) -> float:
        """Inner product over the entries both have, summed in fp64."""
        total = 0.0
        for name in self.keys() & other.keys():
            mine, theirs = self[name], other[name]
            if isinstance(mine, LowRank) and isinstance(theirs, LowRank):
                total += mine.dot(theirs)
            else:
                total += float(self.dense(name).double().flatten() @ other.dense(name).double().flatten())
        return total

    def norm(self) -> float:
        """Euclidean norm over all entries."""
        return self.dot(self) ** 0.5

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
            delta = self.dense(name).to(parameter.device, wide)
            parameter.copy_(parameter.to(wide) + scale * delta)
        return model


def difference(base: Tensor, tuned: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`tuned - base` in fp32 (fp64 where one of them is), in `dtype` (default: the tuned tensor's)."""
    wide = torch.promote_types(torch.promote_types(base.dtype, tuned.dtype), torch.float32)
    return (tuned.to(wide) - base.to(wide)).to(dtype or tuned.dtype)


def matched(vector: TaskVector, model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters that the vector changes, by the vector's names; tied ones once.

    Raises:
        ValueError: another base, names the model does not have, other shapes, or tied tensors that differ; with lists.
    """
    if vector.base is not None and vector.base != (found := model_fingerprint(model)):
        raise ValueError(
            f"the task vector {vector.source or vector!r} was made from the base {vector.base}, but this model is "
            f"{found}; extract it again from the checkpoint that was fine-tuned and this base"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = vector.keys() - {name for name, _ in model.named_buffers()}
    wanted = {name: vector.shapes[name] for name in sorted(names)}
    there = {name: parameters[name].shape for name in wanted if name in parameters}
    check_same(there, wanted, "the model", vector.source or "the task vector")
    found_parameters: dict[str, nn.Parameter] = {}
    first: dict[int, str] = {}
    for name in wanted:
        parameter = parameters[name]
        twin = first.setdefault(id(parameter), name)
        if twin == name:
            found_parameters[name] = parameter
        elif not torch.equal(vector.dense(twin), vector.dense(name)):
            raise ValueError(
                f"{twin} and {name} are one tensor in this model, but the task vector changes them differently: it "
                "comes from a model in which they are not tied"
            )
    return found_parameters


def check_same(left: Mapping[str, torch.Size], right: Mapping[str, torch.Size], one: str, other: str) -> None:
    """ValueError that lists (the first five of each) missing names and differing shapes of two sets of tensors."""
    lines = []
    for missing, owner in ((sorted(right.keys() - left.keys()), one), (sorted(left.keys() - right.keys()), other)):
        if missing:
            lines.append(f"{owner} has no {_listed(missing)}")
    shapes = [
        f"{name} {list(left[name])} and {list(right[name])}"
        for name in sorted(left.keys() & right.keys())
        if left[name] != right[name]
    ]
    if shapes:
        lines.append(f"shapes differ ({one}, {other}): {_listed(shapes)}")
        if any("embed" in line or "lm_head" in line or "wte" in line for line in shapes):
            lines.append("the vocabularies differ: give both models the same one, or leave these tensors out")
    if lines:
        raise ValueError("; ".join(lines))


def _listed(items: list[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def _combine(one: TaskVector, weight: float, other: TaskVector | None, other_weight: float) -> TaskVector:
    if other is None:
        return TaskVector(_Combination((one, weight)), base=one.base, source=one.source)
    if None not in (one.base, other.base) and one.base != other.base:
        raise ValueError(f"task vectors of two bases ({one.base} and {other.base}) cannot be combined")
    tensors = _Combination((one, weight), (other, other_weight))
    return TaskVector(tensors, base=one.base or other.base, source=f"{one.source} and {other.source}")


class _Combination(LazyTensors):
    """A weighted sum, computed tensor by tensor. Only low-rank entries may be in one vector alone (absent is zero)."""

    def __init__(self, *parts: tuple[TaskVector, float]) -> None:
        self.parts = parts
        everywhere = [vector.shapes for vector, _ in parts]
        self.shapes = {name: size for shapes in everywhere for name, size in shapes.items()}
        alone = [name for name in self.shapes if not all(name in shapes for shapes in everywhere)]
        owners = {name: next(vector for vector, _ in parts if name in vector) for name in alone}
        dense = [name for name, vector in owners.items() if not isinstance(vector[name], LowRank)]
        if dense:
            raise ValueError(f"only one of two task vectors has {_listed(dense)}; they cannot be combined")

    def __getitem__(self, name: str) -> Entry:
        terms = [_times(vector[name], weight) for vector, weight in self.parts if name in vector]
        if not terms:
            raise KeyError(name)
        return terms[0] if len(terms) == 1 else _plus(name, *terms)


class _Saved(LazyTensors):
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
        self.shapes = {name: size for name, size in sizes.items() if "::" not in name}
        self.shapes |= {name: torch.Size((sizes[f"{name}::b"][0], sizes[f"{name}::a"][1])) for name in scales}

    def __getitem__(self, name: str) -> Entry:
        with safe_open(self.path, framework="pt") as file:
            if name in self.about["scales"]:
                return LowRank(
                    file.get_tensor(f"{name}::a"), file.get_tensor(f"{name}::b"), self.about["scales"][name]
                )
            return file.get_tensor(name)


def _times(entry: Entry, weight: float) -> Entry:
    return replace(entry, scale=weight * entry.scale) if isinstance(entry, LowRank) else weight * entry


def _plus(name: str, one: Entry, other: Entry) -> Entry:
    if one.shape != other.shape:
        raise ValueError(f"{name} has the shapes {list(one.shape)} and {list(other.shape)} in the two vectors")
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return one.plus(other)
    left, right = (entry.dense() if isinstance(entry, LowRank) else entry for entry in (one, other))
    return left + right
