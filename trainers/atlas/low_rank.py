"""Composition of LoRA task vectors without weight gradients: a frozen PEFT LoRA branch with learned coefficients."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..fingerprint import model_fingerprint, sampled
from ..quantised import keep_4bit
from .composer import MARK
from .entries import Entry, LowRank
from .matching import listed
from .sources import refuse_zero
from .task_vector import TaskVector

ADAPTER = "atlas"


class LowRankComposer:
    """`y = W x + sum_i coefficients[i, j] * s_i,j B_i,j (A_i,j x)` in each target matrix j, with gradients for
    `coefficients` alone (spec 5.4).

    All vectors are one frozen PEFT LoRA adapter: `lora_A` holds the A_i one below the other, `lora_B` the B_i side by
    side, and what flows between them, P = X A^T, is multiplied by the coefficients (a PEFT `LoraVariant`). Autograd
    then has their exact gradient from P alone: no weight gets a gradient, the base may be quantised (bitsandbytes),
    and nothing is composed after a step. Used like `Composer`:

        composer = LowRankComposer(model, vectors)
        optimizer = torch.optim.AdamW([composer.coefficients], lr=0.1)
        for batch in batches:
            composer.model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    Args:
        model: a transformers model; it is changed in place until `remove`. All its parameters are frozen.
        task_vectors: `TaskVector`s (or mappings) whose entries are all `LowRank`. Their targets may differ: a vector
            does nothing to a matrix that it does not name.
        mode: "per_product" gives each vector one coefficient a matrix, "per_factor" one for A and one for B, whose
            product counts.
        dtype: of the coefficients; fp32 (fp64 for a model with fp64 weights) unless given. Factors take the type of
            the base's weights (quantised: of its other weights).

    Attributes:
        coefficients: parameter [n, m], zero at the start; "per_factor" [n, m, 2], (1, 0) at the start, as (0, 0) has
            no gradient.
        block_names: the names of the m target matrices, in the model's order.
        model: the `PeftModel`.
        layers: PEFT's m layers.
        vector_ids: of each task vector what tells it from others.
        base: fingerprint of the base (of a quantised one: the fingerprint that the vectors name, or its own).

    Raises:
        ValueError: vectors of another base, dense entries, matrices that the model lacks or that have other shapes or
            are not linear layers, NaN, a zero vector, 4-bit weights that are packed (`keep_4bit`); all before the
            model is changed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        task_vectors: Sequence[TaskVector | Mapping[str, Entry]],
        mode: Literal["per_product", "per_factor"] = "per_product",
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        vectors = [v if isinstance(v, TaskVector) else TaskVector(v) for v in task_vectors]
        if not vectors:
            raise ValueError("no task vectors to compose; give at least one")
        if mode not in ("per_product", "per_factor"):
            raise ValueError(f"unknown mode {mode!r}; known: per_product, per_factor")
        if any(hasattr(parameter, MARK) for parameter in model.parameters()):
            raise ValueError("a Composer holds this model; call its remove() (or remove(keep=True)) first")
        keep_4bit(model)
        self.base, self.mode = base_of(vectors, model), mode
        self.vector_ids = [vector_id(vector) for vector in vectors]
        matrices = check_targets(vectors, model)
        self.block_names = list(matrices)
        entries = read_factors(vectors, matrices)
        self._trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.model, self.layers = _cat_adapter(model, matrices, entries)
        shape = (len(vectors), len(matrices)) + ((2,) if mode == "per_factor" else ())
        wide = torch.promote_types(_other_type(model), torch.float32)
        start = torch.zeros(shape, dtype=dtype or wide, device=next(iter(matrices.values())).weight.device)
        if mode == "per_factor":
            start[..., 0] = 1
        self.coefficients = nn.Parameter(start)
        self._owners: list[Tensor] = []  # for each row of lora_A: the vector that it belongs to,
        self._scales: list[Tensor] = []  # and that one's s
        for block, parts in enumerate(entries.values()):
            numbers = [number for number, part in enumerate(parts) if part is not None for _ in range(len(part.a))]
            scales = [part.scale for part in parts if part is not None for _ in range(len(part.a))]
            self._owners.append(torch.tensor(numbers, device=start.device))
            self._scales.append(torch.tensor(scales, device=start.device, dtype=start.dtype))
            self.layers[block].lora_variant[ADAPTER] = _Branch(partial(self._row_factors, block))

    @property
    def weights(self) -> Tensor:
        """[n, m], what each product `s_i B_i A_i` is multiplied by."""
        return self._products(self.coefficients)

    def compose(self) -> None:
        """Nothing to do: every forward pass reads the coefficients. Here so that trainers need not ask."""

    def remove(self, keep: bool = False) -> None:
        """Take the branch out; the model is the base again. With `keep` it stays, as an ordinary LoRA adapter whose
        `lora_B` holds the present coefficients."""
        held = any(ADAPTER in layer.lora_variant for layer in self.layers)
        if keep:
            with torch.no_grad():
                for block, layer in enumerate(self.layers):
                    layer.lora_B[ADAPTER].weight.copy_(self.folded(block).b)
        elif held:
            self.model = self.model.unload()
        for layer in self.layers:
            layer.lora_variant.pop(ADAPTER, None)
        for parameter, trained in self._trained:
            parameter.requires_grad_(trained)

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Average the coefficients' gradients over processes (n * m numbers)."""
        if dist.is_available() and dist.is_initialized() and self.coefficients.grad is not None:
            dist.all_reduce(self.coefficients.grad)
            self.coefficients.grad /= dist.get_world_size()

    @torch.no_grad()
    def folded(self, block: int) -> LowRank:
        """What is added to target matrix `block`, as [out, in] factors in fp32 (or wider), the coefficients in `b`."""
        a, b = (getattr(self.layers[block], f"lora_{letter}")[ADAPTER].weight for letter in "AB")
        wide = torch.promote_types(b.dtype, torch.float32)
        return LowRank(a.to(wide), b.to(wide) * self._row_factors(block).to(b.device, wide))

    def _row_factors(self, block: int) -> Tensor:
        """[sum of ranks], one factor for each row of lora_A."""
        return self._products(self.coefficients[:, block])[self._owners[block]] * self._scales[block]

    def _products(self, coefficients: Tensor) -> Tensor:
        return coefficients if self.mode == "per_product" else coefficients[..., 0] * coefficients[..., 1]


class _Branch(LoraVariant):
    """PEFT's branch with factors between A and B: `result + ((X A^T) * factors) B^T`, the sum within one product."""

    def __init__(self, factors: Callable[[], Tensor]) -> None:
        self.factors = factors

    def forward(  # type: ignore[override]  # PEFT's are static: they keep what they need on the module
        self, module: Any, *, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        a, b = (getattr(module, f"lora_{letter}")[active_adapter].weight for letter in "AB")
        middle = linear(x, a)
        # A bf16 P times fp32 factors is computed, and differentiated, in fp32; autograd keeps P in bf16.
        scaled = (middle * self.factors().to(middle.device)).to(middle.dtype)
        whole = torch.addmm(result.flatten(0, -2).to(scaled.dtype), scaled.flatten(0, -2), b.T)
        return whole.reshape(result.shape)  # PEFT gives it the type of the result again


def vector_id(vector: TaskVector) -> str:
    """16 hex digits that tell a vector of factors from others."""
    digest = hashlib.sha256()
    for name in sorted(vector):
        entry = vector[name]
        if isinstance(entry, LowRank):
            for part in (entry.a, entry.b * entry.scale):
                digest.update(sampled(name, part))
    return "factors " + digest.hexdigest()[:16]


def base_of(vectors: Sequence[TaskVector], model: nn.Module) -> str:
    """The fingerprint of the vectors' base; ValueError if this model is another (a quantised one cannot tell)."""
    named = {vector.base: vector.source for vector in vectors if vector.base is not None}
    found = model_fingerprint(model)
    quantised = any(not parameter.is_floating_point() for parameter in model.parameters())
    others = [base for base in named if base != found]
    if len(named) > 1 or (others and not quantised):
        made = ", ".join(f"{source or 'one'} from {base}" for base, source in named.items())
        raise ValueError(f"task vectors are of the base they were made from ({made}), but this model is {found}")
    return next(iter(named), found)


def check_targets(vectors: Sequence[TaskVector], model: nn.Module) -> dict[str, Any]:
    """Parameter name -> linear layer of every matrix that a vector changes, in the model's order; or ValueError."""
    wanted = {name for vector in vectors for name in vector}
    order = [name for name, _ in model.named_parameters() if name in wanted]
    if missing := sorted(wanted - set(order)):
        raise ValueError(f"task vectors change {listed(missing)}, which the model does not have")
    modules: dict[str, Any] = {name: model.get_submodule(name.rpartition(".")[0]) for name in order}
    odd = [
        name for name, module in modules.items()
        if not (isinstance(module, nn.Linear | Conv1D) and name.endswith(".weight"))
    ]  # fmt: skip
    if odd:
        raise ValueError(f"{listed(odd)}: not the weight of a linear layer; compose these vectors with Composer")
    sizes = {name: _matrix(module) for name, module in modules.items()}
    for number, vector in enumerate(vectors, 1):
        odd = [f"{n} {list(shape)} and {list(sizes[n])}" for n, shape in vector.shapes.items() if shape != sizes[n]]
        if odd:
            raise ValueError(f"task vector {number} ({vector.source}) and the model differ in shape: {listed(odd)}")
    return modules


def read_factors(vectors: Sequence[TaskVector], targets: Mapping[str, Any]) -> dict[str, list[LowRank | None]]:
    """For each target every vector's factors as [out, in] matrices, None where it has none; ValueError for dense
    entries, NaN and zero vectors."""
    sizes = [0.0] * len(vectors)
    found: dict[str, list[LowRank | None]] = {}
    for name, module in targets.items():
        parts: list[LowRank | None] = []
        for number, vector in enumerate(vectors):
            entry = vector[name] if name in vector else None
            if entry is not None:
                who = f"task vector {number + 1} ({vector.source}): {name}"
                if not isinstance(entry, LowRank):
                    raise ValueError(f"{who} is dense; Composer takes dense vectors, this one LoRA factors alone")
                if not (torch.isfinite(entry.a).all() and torch.isfinite(entry.b).all()):
                    raise ValueError(f"{who} holds NaN or infinite values")
                sizes[number] += entry.dot(entry)
                if isinstance(module, Conv1D):  # its weight is [in, out]
                    entry = LowRank(entry.b.T, entry.a.T, entry.scale)
            parts.append(entry)
        found[name] = parts
    refuse_zero(vectors, sizes)
    return found


def lora_config(ranks: Mapping[str, int], transposed: bool) -> LoraConfig:
    """PEFT's settings for an adapter with scaling 1 everywhere.

    Args:
        ranks: module name -> rank.
        transposed: whether they are `Conv1D` (GPT-2).
    """
    most = max(ranks.values())
    pattern = {} if set(ranks.values()) == {most} else dict(ranks)
    return LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=dict(pattern),
        alpha_pattern=dict(pattern),
        target_modules=list(ranks),
        fan_in_fan_out=transposed,
    )


def _cat_adapter(
    model: PreTrainedModel, matrices: Mapping[str, Any], entries: Mapping[str, list[LowRank | None]]
) -> tuple[PeftModel, list[Any]]:
    """The model with all factors in one frozen adapter, and the adapted layers."""
    parts = {module_name(name): [p for p in column if p is not None] for name, column in entries.items()}
    ranks = {module: sum(len(part.a) for part in column) for module, column in parts.items()}
    config = lora_config(ranks, any(isinstance(module, Conv1D) for module in matrices.values()))
    # On the meta device: no memory, no random numbers drawn.
    tuned = get_peft_model(model, config, ADAPTER, low_cpu_mem_usage=True)
    layers = {name: m for name, m in tuned.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    if layers.keys() != parts.keys():
        tuned.unload()
        raise ValueError(f"PEFT would adapt {listed(sorted(layers))} for the targets {listed(list(parts))}")
    for module, column in parts.items():
        weight = layers[module].get_base_layer().weight
        dtype = weight.dtype if weight.is_floating_point() else _other_type(tuned)
        a = torch.cat([part.a for part in column]).to(weight.device, dtype)
        b = torch.cat([part.b for part in column], dim=1).to(weight.device, dtype)
        layers[module].lora_A[ADAPTER].weight = nn.Parameter(a.contiguous(), requires_grad=False)
        layers[module].lora_B[ADAPTER].weight = nn.Parameter(b.contiguous(), requires_grad=False)
    return tuned, [layers[module] for module in parts]


def module_name(parameter: str) -> str:
    """The layer whose weight it is."""
    return parameter.removesuffix(".weight")


def _other_type(model: nn.Module) -> torch.dtype:
    """The type of a model's floating-point weights; of a quantised one, of those that are not."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def _matrix(module: Any) -> torch.Size:
    """Shape of a linear layer's weight; a quantised one's tensor has another."""
    conv = isinstance(module, Conv1D)
    return torch.Size((module.nx, module.nf) if conv else (module.out_features, module.in_features))
