"""Which arms a run has, on how many heads, with which settings: the flags of `arms.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel

from .red import MLP_OUTPUTS
from .selection import HeadSelection, check_k

DRAWN = ("random", "layer_matched")
ARMS = ("lofit", "random", "layer_matched", "offset_norm", "iti_heads", "all", "other", "iti", "lora", "red")


@dataclass
class ArmArguments:
    """Which arms to run, on how many heads, with which arguments. The trainer's `learning_rate` is the offsets'."""

    arms: list[str] = field(
        default_factory=lambda: list(ARMS), metadata={"help": f"Which methods to run: {', '.join(ARMS)}."}
    )
    heads_percent: list[float] = field(
        default_factory=lambda: [10.0, 2.0],
        metadata={"help": "How many heads, in per cent; the first is the main one."},
    )
    k: list[int] | None = field(default=None, metadata={"help": "How many heads, as numbers instead of per cent."})
    heads_file: str | None = field(default=None, metadata={"help": "A heads.json to use; nothing is selected then."})
    draws: int = field(default=3, metadata={"help": "Random choices of heads, for each number of heads."})
    init_std: float = field(default=1e-3, metadata={"help": "Standard deviation of initial scales and offsets."})
    selection_learning_rate: float = field(
        default=5e-3, metadata={"help": "Learning rate of the scales (stage 1; --l1_lambda is their penalty)."}
    )
    all_heads_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of offsets on all heads; default: that of the few."}
    )
    repeat_selection: bool = field(
        default=False,
        metadata={"help": "Select again with another seed on the same base, to compare."},
    )
    lora_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the LoRA baseline."})
    red_learning_rate: float = field(default=1e-2, metadata={"help": "Learning rate of the RED baseline."})
    iti_alphas: list[float] = field(
        default_factory=lambda: [2.0, 5.0, 10.0, 15.0, 20.0], metadata={"help": "ITI's strengths, chosen on dev."}
    )

    def __post_init__(self) -> None:
        unknown = sorted(set(self.arms) - set(ARMS))
        if unknown:
            raise ValueError(f"unknown arm {unknown[0]!r} in --arms; known: {', '.join(ARMS)}")
        if self.draws < 1:
            raise ValueError(f"--draws {self.draws}: random heads need at least one draw")
        if not self.heads_percent or not all(0 < percent <= 100 for percent in self.heads_percent):
            raise ValueError(f"--heads_percent {self.heads_percent}: give percentages above 0 and up to 100")
        if self.heads_file is not None and not Path(self.heads_file).is_file():
            raise FileNotFoundError(
                f"--heads_file {self.heads_file}: no such file; a run writes seed_N/selection/heads.json"
            )
        if self.heads_file is not None:
            HeadSelection.load(self.heads_file)

    def ks(self, total: int) -> list[int]:
        """Numbers of heads for a model with `total` heads; ValueError where there are not that many."""
        ks = self.k or [max(1, round(total * percent / 100)) for percent in self.heads_percent]
        if self.heads_file is not None:
            ks = [HeadSelection.load(self.heads_file).k]
        for k in ks:
            check_k(k, total)
        return list(dict.fromkeys(ks))

    def check(self, base: PreTrainedModel, total: int) -> None:
        """Before anything is measured: enough heads, given ones selected on this base, baselines that can be built.

        Raises:
            ValueError: something of this does not hold, with the way out.
        """
        self.ks(total)
        model_type = base.config.model_type
        known = {"lora": lora_targets(model_type) is not None, "red": model_type in MLP_OUTPUTS}
        for name, possible in known.items():
            if name in self.arms and not possible:
                rest = " ".join(arm for arm in self.arms if known.get(arm, True))
                raise ValueError(f"the arm {name} does not know {model_type!r} models; leave it out: --arms {rest}")
        if self.heads_file is not None:
            HeadSelection.load(self.heads_file).check_base(base)

    def keys(self, wrong_answers: bool = True) -> list[str]:
        """The keys (`arm_key`) of all arms, with placeholders for the numbers of heads.

        Rows without wrong answers have no other loss and train no ITI probe.
        """
        numbers = list(range(len(self.k or self.heads_percent))) if self.heads_file is None else [0]
        keys = []
        for name in self.arms:
            if name in ("other", "iti", "iti_heads") and not wrong_answers:
                continue
            for k in numbers if name in ("lofit", *DRAWN) else numbers[:1]:
                keys += [arm_key(name, k, draw + 1) for draw in range(self.draws if name in DRAWN else 1)]
        return keys


def lora_targets(model_type: str) -> list[str] | None:
    """The query and value projections (the paper's LoRA), or None where they are not known."""
    fused = {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"], "phi3": ["qkv_proj"]}
    known = model_type in MLP_OUTPUTS or model_type in ("gemma3", "granite")
    return fused.get(model_type) or (["q_proj", "v_proj"] if known else None)


def arm_key(name: str, k: int | None = None, draw: int = 0) -> str:
    """`random_k5_draw1`: the arm's folder and its key in the results."""
    return name + (f"_k{k}" if k is not None else "") + (f"_draw{draw}" if draw else "")
