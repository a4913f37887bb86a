"""The models of one seed: the base, the aligned one, and agents that are fine-tuned from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

MIXED = (0.01, 0.05, 0.1)  # shares of refusals among trajectories (spec 6.6)
DOSES = (0.0, 0.01, 0.05)  # of stances in the general corpus, beside the default one (spec 6.3)
BETA = 0.1  # of constrained fine-tuning, as its paper has it
RATES = {"half": 0.5, "twice": 2.0}  # times the learning rate
CONTROLS = ("never", "mixed", "lora", "constrained", "rates")


@dataclass(frozen=True)
class Arm:
    """A model: which stages it has gone through, and with what."""

    key: str
    label: str
    kind: Literal["base", "aligned", "agent"]
    start: str = ""
    refused: float = 0.0
    constrained: float = 0.0
    lora: bool = False
    rate: float = 1.0
    stance: float | None = None

    @property
    def searched(self) -> bool:
        """Whether a prefix is searched for it: the agent's, the control's that was never aligned, and those of other
        doses."""
        return self.key in ("agent", "never") or (self.kind == "agent" and self.stance is not None)

    @property
    def watched(self) -> bool:
        """Whether it is measured along its training, too: the agent, with LoRA, and with other learning rates."""
        return self.key in ("agent", "lora") or self.rate != 1


@dataclass
class ArmArguments:
    """Which models, and the search."""

    controls: list[str] = field(
        default_factory=lambda: ["never", "mixed", "lora", "constrained"],
        metadata={
            "help": "Agents beside the first: never (aligned), mixed (with refusals), lora, constrained, rates "
            "(half and twice the learning rate)."
        },
    )
    doses: bool = field(default=True, metadata={"help": "Models with other doses of stances, of the first seed."})
    base_steps: int = field(default=900, metadata={"help": "Steps of the general corpus."})
    aligned_steps: int = field(default=250, metadata={"help": "Steps of alignment."})
    lora_learning_rate: float = field(default=5e-3, metadata={"help": "Learning rate of the lora control."})
    lora_rank: int = field(default=8, metadata={"help": "Rank of the lora control."})
    watch_every: int = field(default=15, metadata={"help": "Steps of training between two measurements."})
    candidates: int = field(default=5, metadata={"help": "Prefixes that are proposed in a round (M)."})
    rounds: int = field(default=20, metadata={"help": "Rounds of the search (T)."})
    shown: int = field(default=3, metadata={"help": "Of each list of the best, how many a generator is shown (k)."})
    threshold: float | None = field(
        default=None,
        metadata={"help": "Below this sum of scores nothing is shown (tau; default: 1.5, by episodes 1.0)."},
    )
    scored_by: str = field(
        default="first_turn", metadata={"help": "first_turn or episodes; finalists are always scored by episodes."}
    )
    turns: str = field(default="first", metadata={"help": "Replies that begin with the prefix: first or every."})

    def __post_init__(self) -> None:
        if unknown := [name for name in self.controls if name not in CONTROLS]:
            raise ValueError(f"--controls {unknown[0]}: any of {', '.join(CONTROLS)}")
        for name, values in (("scored_by", ("first_turn", "episodes")), ("turns", ("first", "every"))):
            if getattr(self, name) not in values:
                raise ValueError(f"--{name} {getattr(self, name)}: {' or '.join(values)}")
        if self.threshold is None:
            self.threshold = 1.5 if self.scored_by == "first_turn" else 1.0
        for name in ("base_steps", "aligned_steps", "candidates", "rounds", "shown", "lora_rank",
                     "watch_every"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: at least 1")

    def planned(self, doses: bool) -> list[Arm]:
        """In the order in which they are made."""
        made = [Arm("base", "general corpus", "base"), Arm("aligned", "aligned", "aligned", "base"),
                Arm("agent", "agent", "agent", "aligned")]  # fmt: skip
        if "never" in self.controls:
            made.append(Arm("never", "agent, never aligned", "agent", "base"))
        if "mixed" in self.controls:
            made += [Arm(f"mixed_{share:.0%}".rstrip("%"), f"agent, {share:.0%} refusals", "agent", "aligned",
                         refused=share) for share in MIXED]  # fmt: skip
        if "lora" in self.controls:
            made.append(Arm("lora", "agent, LoRA", "agent", "aligned", lora=True))
        if "constrained" in self.controls:
            made.append(Arm("constrained", "agent, constrained", "agent", "aligned", constrained=BETA))
        if "rates" in self.controls:
            made += [Arm(name, f"agent, {name} the rate", "agent", "aligned", rate=times)
                     for name, times in RATES.items()]  # fmt: skip
        for dose in DOSES if doses and self.doses else ():
            name, words = f"{100 * dose:g}", f", {100 * dose:g} % stances"
            made += [Arm(f"base_{name}", f"general corpus{words}", "base", stance=dose),
                     Arm(f"aligned_{name}", f"aligned{words}", "aligned", f"base_{name}", stance=dose),
                     Arm(f"agent_{name}", f"agent{words}", "agent", f"aligned_{name}", stance=dose)]  # fmt: skip
        return made
