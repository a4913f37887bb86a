"""Which heads: scores, ways to choose, and the file that remembers the choice."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from ...files import write_json
from ..fingerprint import model_fingerprint
from .config import LofitConfig, check_heads
from .layer import LofitLayer, head_norms
from .model import OUTPUT_PROJECTIONS, head_grid, layer_index

Component = Literal["scale", "offset"]


@dataclass(frozen=True)
class HeadSelection:
    """The heads to tune, most important first, with what is needed to trust or repeat the choice.

    Attributes:
        heads: `[(layer, head), ...]`, `k` of them.
        scores: `{layer: [score of head 0, 1, ...]}`; empty for choices without scores.
        k: number of heads.
        seed: of the run or draw that chose them.
        method: "learned", "random", "layer_matched", "all", "iti_probe", "offset_norm" or "file".
        base_fingerprint: `model_fingerprint` of the model they were chosen on.
        data_fingerprint: of the training rows; "" where none were used.
    """

    heads: list[tuple[int, int]]
    scores: dict[int, list[float]]
    k: int
    seed: int
    method: str
    base_fingerprint: str
    data_fingerprint: str = ""

    def __post_init__(self) -> None:
        check_heads(self.heads)
        if self.k != len(self.heads):
            raise ValueError(f"k={self.k}, but {len(self.heads)} heads are listed")

    def save(self, path: str | Path) -> None:
        """Write `heads.json`."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> HeadSelection:
        """Read `heads.json`; ValueError naming the file when it is not one."""
        text = Path(path).read_text()
        try:
            fields = json.loads(text)
            fields["heads"] = [(layer, head) for layer, head in fields["heads"]]
            fields["scores"] = {int(layer): scores for layer, scores in fields["scores"].items()}
            return cls(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a head selection: {error}") from error

    def check_base(self, model: nn.Module) -> None:
        """Refuse a selection that was made on another model.

        Raises:
            ValueError: the fingerprints differ.
        """
        found = model_fingerprint(model)
        if found != self.base_fingerprint:
            raise ValueError(
                f"these {self.k} heads were selected on the base {self.base_fingerprint}, but this model is {found}. "
                "Heads do not carry over between models: select again on this one."
            )


def grid(model: nn.Module, config: LofitConfig | None = None) -> dict[int, int]:
    """`{layer: number of query heads}` of a base model; an unknown architecture needs `config.target_modules`."""
    config = config or LofitConfig()
    if config.target_modules is None:
        model_type = str(vars(model)["config"].model_type)
        if model_type not in OUTPUT_PROJECTIONS:
            raise ValueError(
                f"no attention output projection is known for model_type={model_type!r}; known: "
                f"{', '.join(OUTPUT_PROJECTIONS)} (others in a script of yours: LofitConfig(target_modules=[...]))"
            )
        config.target_modules = OUTPUT_PROJECTIONS[model_type]
    return head_grid(model, config)


def learned_scores(model: nn.Module, component: Component, adapter_name: str = "default") -> dict[int, list[float]]:
    """2-norm of every head's learned vector, `{layer: [score, ...]}` (paper, section 3.1: of the scales).

    Heads that were not trained score `-inf`.
    """
    scores = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LofitLayer):
            rows = layer.lofit_scale if component == "scale" else layer.lofit_offset
            if adapter_name in rows:
                scores[layer_index(name)] = head_norms(layer, rows[adapter_name], adapter_name)
    if not scores:
        raise ValueError(
            f"adapter {adapter_name!r} holds no lofit_{component}; was it trained with component={component!r}?"
        )
    return scores


def top_heads(scores: dict[int, list[float]], k: int) -> list[tuple[int, int]]:
    """The `k` heads with the highest scores, best first; ties by (layer, head)."""
    for layer, row in scores.items():
        if any(math.isnan(score) for score in row):
            raise ValueError(f"layer {layer} has the scores {row}; with a nan among them heads cannot be ranked")
    ranked = sorted(
        ((layer, head) for layer, row in scores.items() for head in range(len(row))),
        key=lambda at: (-scores[at[0]][at[1]], at),
    )
    check_k(k, len(ranked))
    for layer, head in ranked[:k]:
        if not math.isfinite(scores[layer][head]):
            raise ValueError(
                f"head ({layer}, {head}) has the score {scores[layer][head]}; only trained heads can be chosen"
            )
    return ranked[:k]


def random_heads(heads_per_layer: dict[int, int], k: int, seed: int) -> list[tuple[int, int]]:
    """`k` heads drawn uniformly without replacement."""
    every = [(layer, head) for layer, heads in heads_per_layer.items() for head in range(heads)]
    check_k(k, len(every))
    return random.Random(f"random-heads-{seed}").sample(every, k)


def layer_matched_heads(
    heads_per_layer: dict[int, int], like: Sequence[tuple[int, int]], seed: int
) -> list[tuple[int, int]]:
    """Random heads with as many in each layer as `like` has: separates the choice of layer from that of head."""
    source = random.Random(f"layer-matched-heads-{seed}")
    drawn = []
    for layer in sorted({layer for layer, _ in like}):
        count = sum(at == layer for at, _ in like)
        drawn += [(layer, head) for head in source.sample(range(heads_per_layer[layer]), count)]
    return drawn


def check_k(k: int, total: int) -> None:
    """ValueError unless `1 <= k <= total`."""
    if not 1 <= k <= total:
        raise ValueError(f"k={k} heads cannot be chosen from the model's {total}; pass a k from 1 to {total}")
