"""The PEFT configuration of LoFiT (Yin, Ye and Durrett, 2024, arXiv 2406.01563)."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from peft import PeftConfig

Component = Literal["offset", "scale", "both"]


class SteerbookPeftType(str, enum.Enum):  # noqa: UP042  (PEFT keys its tables by str-enums, `StrEnum` would hash alike)
    """PEFT's own `PeftType` is closed, so our methods are keyed by an enum of ours that hashes like its strings."""

    LOFIT = "LOFIT"


@dataclass
class LofitConfig(PeftConfig):
    """Edit the input of the attention output projection, head by head: `z <- (1 + scale) * z + offset`.

    `z` is the output of one *query* head (`head_dim` numbers per token), before the output projection; every token
    position is edited alike. Published use: fit `scale` on all heads to choose some, then fit `offset` on those
    (sections 3.1 and 3.2 of the paper).

    Args:
        component: what is learned. `"offset"` (`lofit_offset`), `"scale"` (`lofit_scale`) or `"both"`.
        heads: `[(layer, head), ...]`, or None for every head of every layer. Kept sorted; layers without a selected
            head own no parameter, so autograd stops at the lowest selected layer.
        target_modules: names (or a regular expression) of the attention output projections. None: by architecture.
        head_dim: width of one head. None: read from the attention module; never `hidden_size / heads`.
        init_std: standard deviation of the normal initial values (the paper's 1e-3). 0 starts as the exact identity.
        modules_to_save, exclude_modules, layers_to_transform, layers_pattern: as in PEFT's other tuners.

    Raises:
        ValueError: an unknown component, an empty or repeated head list, negative numbers.
    """

    component: Component = field(default="offset", metadata={"help": "offset, scale or both."})
    heads: list[tuple[int, int]] | None = field(
        default=None, metadata={"help": "[(layer, head), ...]; None selects every head."}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "The attention output projections; None: by architecture."}
    )
    head_dim: int | None = field(default=None, metadata={"help": "Width of one head; None: from the model."})
    init_std: float = field(default=1e-3, metadata={"help": "Standard deviation of the initial values."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save in full."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave alone."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Only these layers."})
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the layer list, with `layers_to_transform`."}
    )
    # SFTTrainer(chat_template_path=...) reads this field of whatever config it gets; LoFiT never trains tokens.
    trainable_token_indices: list[int] | None = field(default=None, metadata={"help": "Not used by LoFiT."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SteerbookPeftType.LOFIT  # type: ignore[assignment]
        if self.component not in get_args(Component):
            raise ValueError(f"component={self.component!r} is not one of {', '.join(get_args(Component))}")
        if not (math.isfinite(self.init_std) and self.init_std >= 0):
            raise ValueError(f"init_std={self.init_std!r} must be a finite number >= 0 (0 is the exact identity)")
        if self.head_dim is not None and self.head_dim < 1:
            raise ValueError(f"head_dim={self.head_dim!r} must be positive, or None to read it from the model")
        if self.heads is not None:
            self.heads = check_heads(self.heads)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform: say which of those layers to edit")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform cannot be used when target_modules is a regular expression")


def check_heads(heads: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The heads as sorted `(layer, head)` tuples; ValueError when empty, repeated, or not pairs of numbers >= 0."""
    if len(heads) == 0:
        raise ValueError("heads=[] selects no head; leave heads out (None) to edit every head")
    pairs = []
    for entry in heads:
        if not isinstance(entry, list | tuple) or [isinstance(n, int) and n >= 0 for n in entry] != [True, True]:
            raise ValueError(f"heads holds {entry!r}; each entry must be a pair (layer, head) of numbers >= 0")
        pairs.append((entry[0], entry[1]))
    repeated = sorted({pair for pair in pairs if pairs.count(pair) > 1})
    if repeated:
        raise ValueError(f"heads names {repeated[0]} more than once; each head has one vector")
    return sorted(pairs)
