"""What a training step holds at most and what it moves, worked out from sizes: nothing is allocated or run.

All bytes are of one process. With W bytes of weights, P trained numbers, G bytes of their gradients and N processes:

| engine        | weights | gradients | optimiser (AdamW) | moved a step between processes       |
|---------------|---------|-----------|-------------------|--------------------------------------|
| none          | W       | G         | 2 G               | 0                                    |
| ddp           | W       | 2 G (a)   | 2 G               | 2 (N-1)/N G                          |
| zero2         | W       | G / N     | 12 P / N (b)      | 2 (N-1)/N G                          |
| zero3         | W / N   | G / N     | 12 P / N (b)      | (N-1)/N (2 W + G)                    |
| zero3_offload | (c)     | (c)       | (c)               | as zero3; to and from the host (d)   |
| fsdp2         | W / N   | G / N     | 2 G / N           | (N-1)/N (2 W + G)                    |

(a) The buckets that are reduced are a second copy. (b) Two moments and a copy of the weights, in fp32. (c) The shares
of zero3, in the host's memory. (d) The share of the gradients down, G / N; of the weights up, for the forward and for
the backward pass, 2 W / N. Engines that cut the weights hold the largest part beside that they put together at a time:
a layer, or embeddings and head; under an engine the recipes' whole model waits in the host's memory, another W, and
is put back to be measured. In a bf16 run DeepSpeed makes all weights bf16, FSDP2 the trained ones fp32. What
engines hold in buffers of their own, and CUDA outside of PyTorch, is not counted.

The peak is the highest of these moments: the head's forward and backward pass, when all layers' activations are kept;
the backward pass of each layer, with the gradients of those above it and the activations of those below; the end,
with all gradients. Under gradient checkpointing a layer keeps its input alone, and one layer at a time all the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Engine = Literal["none", "ddp", "fsdp2", "zero2", "zero3", "zero3_offload"]
CUT = ("zero3", "zero3_offload", "fsdp2")  # the weights, too
TILE = (4096, 32768)  # tokens and vocabulary entries that TRL's fused head works on at a time
CPU_COPIES = (3.25, 7.25)  # of a tile in fp32, that its forward and backward pass hold where there is no Triton


@dataclass(frozen=True)
class Launch:
    """How a step runs.

    Attributes:
        half: in bf16 (or fp16).
        checkpointing: with gradient checkpointing.
        accelerator: False on a CPU, where TRL's head needs more memory.
    """

    engine: Engine = "none"
    processes: int = 1
    half: bool = False
    checkpointing: bool = False
    accelerator: bool = True

    @property
    def autocast(self) -> bool:
        """Whether products are cast to bf16 one by one; the other engines compute with bf16 weights."""
        return self.half and self.engine in ("none", "ddp")


@dataclass(frozen=True)
class Weights:
    """Of some parameters: bytes as they are, numbers in all and trained, bytes of the gradients, of one at most."""

    bytes: int = 0
    numbers: int = 0
    trained: int = 0
    gradients: int = 0
    largest: int = 0

    def __add__(self, other: Weights) -> Weights:
        return Weights(
            self.bytes + other.bytes,
            self.numbers + other.numbers,
            self.trained + other.trained,
            self.gradients + other.gradients,
            max(self.largest, other.largest),
        )

    def under(self, launch: Launch) -> Weights:
        """In the types that the engine gives them."""
        if not launch.half or launch.engine in ("none", "ddp"):
            return self
        if launch.engine == "fsdp2":
            return replace(self, bytes=self.bytes - self.gradients + 4 * self.trained, gradients=4 * self.trained)
        return replace(self, bytes=min(self.bytes, 2 * self.numbers), gradients=2 * self.trained)


@dataclass(frozen=True)
class Layer:
    """One layer. Bytes per token: `kept` for the backward pass, `working` for a moment in it. `casts`: bytes of the
    narrower copies of its weights that autocast keeps for the backward pass."""

    weights: Weights
    kept: float
    working: float
    casts: int


@dataclass(frozen=True)
class Sizes:
    """What an estimate needs to know of a model.

    Attributes:
        outside: weights that belong to no layer: embeddings, last norm, head.
        width, stream: numbers, and bytes of one, of a token's residual stream.
        compute: bytes of a number in matrix products.
        last: bytes per token that the last norm keeps.
        vocabulary: rows of the head; 0 without one.
        head_bytes: of a number of the head.
        head_trained, tied: whether the head is trained, and is the embedding, too.
    """

    layers: tuple[Layer, ...]
    outside: Weights
    width: int
    stream: int
    compute: int
    last: float
    vocabulary: int
    head_bytes: int
    head_trained: bool
    tied: bool

    @property
    def weights(self) -> Weights:
        return sum((layer.weights for layer in self.layers), self.outside)


@dataclass(frozen=True)
class Composition:
    """Composing dense task vectors: `held` bytes by kind beside the model, `working` bytes for a moment. Weights get
    gradients, of which one is alive at a time, and no optimiser; `coefficients` numbers are trained, in fp32."""

    held: Mapping[str, int] = field(default_factory=dict)
    working: int = 0
    coefficients: int = 0


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process: by kind, at most at one time, moved a step between processes and to and from the host."""

    kinds: dict[str, int]
    peak: int
    moved: int
    moved_host: int
    host: int


def memory_estimate(
    sizes: Sizes, rows: int, tokens: int, launch: Launch, scored: float = 1.0, composition: Composition | None = None
) -> Estimate:
    """Bytes of a step on `rows` sequences of `tokens` tokens, of which the share `scored` carries loss."""
    loaded = sizes.weights.bytes
    layers = tuple(replace(layer, weights=layer.weights.under(launch)) for layer in sizes.layers)
    sizes = replace(sizes, layers=layers, outside=sizes.outside.under(launch))
    total, n = sizes.weights, launch.processes
    deepspeed, cut = launch.engine.startswith("zero"), launch.engine not in ("none", "ddp")
    weights = total.bytes / n if launch.engine in CUT else total.bytes
    gradients = total.largest if composition else total.gradients / n if cut else total.gradients
    if composition:
        optimiser = 8.0 * composition.coefficients
    else:
        optimiser = 12 * total.trained / n if deepspeed else 2 * total.gradients / (n if cut else 1)
    buckets = total.gradients if launch.engine == "ddp" and not composition else 0
    moved = 2 * (n - 1) / n * (4 * composition.coefficients if composition else total.gradients)
    if launch.engine in CUT:
        moved = (n - 1) / n * (2 * total.bytes + total.gradients)
    host, moved_host = float(loaded * cut), 0.0
    if launch.engine == "zero3_offload":
        host, moved_host = host + weights + gradients + optimiser, gradients + 2 * weights
        weights = gradients = optimiser = 0.0
    held = {name: size / (n if cut else 1) for name, size in (composition.held.items() if composition else ())}
    if launch.engine in CUT:
        held["weights put together at a time"] = max(
            part.bytes for part in (sizes.outside, *(layer.weights for layer in layers))
        )
    activations, head, highest = _moments(sizes, rows * tokens, launch, scored, composition is not None)
    beside = weights + optimiser + buckets + sum(held.values()) + (composition.working if composition else 0)
    kinds = {
        "weights": weights,
        "gradients": gradients + buckets,
        "optimiser (AdamW)": optimiser,
        "activations": activations,
        "output head, for a moment": head,
        **held,
    }
    whole = {name: round(value) for name, value in kinds.items()}
    peak = max(beside + highest, loaded * cut)  # put back, to be measured
    return Estimate(whole, round(peak), round(moved), round(moved_host), round(host))


def _moments(sizes: Sizes, count: int, launch: Launch, scored: float, composed: bool) -> tuple[float, float, float]:
    """Bytes of all layers' activations, of the head's backward pass, and of activations and gradients together at the
    highest of a step's moments."""
    cut, again = launch.engine not in ("none", "ddp"), launch.checkpointing
    kept = [count * (sizes.stream * sizes.width if again and layer.kept else layer.kept)
            + (0 if again else layer.casts) for layer in sizes.layers]  # fmt: skip
    head = _head(sizes, count, launch, scored)
    kept.append(count * sizes.last + head.kept)
    # Of gradients, the share that stays until the step's end.
    share = 0.0 if composed or launch.engine == "zero3_offload" else 1 / launch.processes if cut else 1.0
    moments = [sum(kept) + head.forward, sum(kept) + head.backward + head.gradient]
    grown = share * head.gradient
    for number in reversed(range(len(sizes.layers))):
        layer = sizes.layers[number]
        own: float = layer.weights.gradients if cut else layer.weights.largest if composed else 0
        own += count * layer.kept + layer.casts if again else 0
        moments.append(sum(kept[: number + 1]) + grown + count * layer.working + own)
        grown += share * layer.weights.gradients
    moments.append(share * sizes.weights.gradients + (head.gradient if sizes.tied else 0))
    return sum(kept), head.backward, max(moments)


@dataclass(frozen=True)
class _Head:
    """Bytes that TRL's fused head keeps, that its two passes hold for a moment, and of its weight's gradient."""

    kept: float
    forward: float
    backward: float
    gradient: float


def _head(sizes: Sizes, count: int, launch: Launch, scored: float) -> _Head:
    """It scores the tokens with loss, on a CPU all, in tiles: it keeps their hidden states; holds a tile of logits,
    and for the backward pass the gradients of hidden states and weight in fp32."""
    if not sizes.vocabulary:
        return _Head(0.0, 0.0, 0.0, 0.0)
    tokens = count * scored if launch.accelerator else count
    rows, columns = min(tokens, TILE[0]), min(sizes.vocabulary, TILE[1])
    tile = rows * TILE[1] * sizes.compute
    copies = (0.0, 0.0) if launch.accelerator else tuple(4 * rows * columns * times for times in CPU_COPIES)
    casts = columns * sizes.width * sizes.compute if sizes.head_bytes != sizes.compute else 0
    numbers = sizes.vocabulary * sizes.width if sizes.head_trained else 0
    wide = 4 * numbers if sizes.head_bytes != 4 else 0  # of the gradient in fp32, before it gets the weight's type
    return _Head(
        tokens * sizes.width * sizes.stream, tile + copies[0] + casts,
        tile + copies[1] + casts + 4 * tokens * sizes.width + wide, numbers * sizes.head_bytes,
    )  # fmt: skip


def largest_batch(
    sizes: Sizes, tokens: int, launch: Launch, memory: int, scored: float = 1.0, composition: Composition | None = None
) -> int:
    """The most rows of `tokens` tokens whose step needs at most `memory` bytes; 0 if one row needs more."""

    def fits(rows: int) -> bool:
        return memory_estimate(sizes, rows, tokens, launch, scored, composition).peak <= memory

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
