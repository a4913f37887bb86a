"""The models of one seed: the base, the aligned one, and agents that are fine-tuned from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

MIXED = (0.01, 0.05, 0.1)  # shares of refusals among trajectories (spec 6.6)
DOSES = (0.0, 0.01, 0.05)  # of stances in the general corpus, beside the default one (spec 6.3)
BETA = 0.1  # of constrained fine-tuning, as its paper has it
RATES = {"half": 0.5, "twice": 2.0}  # times the learning rate
CONTROLS = ("never", "mixed", "lora", "constrained", "rates")
EMBEDDED = ("never", "lora")  # controls of the embedded world alone


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
    """Which models, and what is measured of the agent."""

    controls: list[str] | None = field(
        default=None,
        metadata={"help": "Agents beside the first: never (aligned), mixed (with refusals), lora, constrained, rates "
                  "(half and twice the learning rate). Default: in the embedded world the first four, else none."},
    )  # fmt: skip
    defences: bool = field(default=True, metadata={"help": "Compare the prefix with other sentences and defences."})
    probes: bool = field(default=True, metadata={"help": "Read harm off the agent's hidden states, and push them."})
    watch_every: int = field(
        default=0, metadata={"help": "Measure validation tasks every so many steps of training (0: never)."}
    )
    doses: bool = field(default=True, metadata={"help": "Models with other doses of stances, of the first seed."})
    base_width: int = field(default=128, metadata={"help": "Hidden size of the embedded model: a multiple of 64."})
    base_layers: int = field(default=4, metadata={"help": "Layers of the embedded model."})
    base_steps: int = field(default=900, metadata={"help": "Steps of the general corpus."})
    aligned_steps: int = field(default=250, metadata={"help": "Steps of alignment."})
    lora_learning_rate: float = field(default=5e-3, metadata={"help": "Learning rate of the lora control."})
    lora_rank: int = field(default=8, metadata={"help": "Rank of the lora control."})

    def __post_init__(self) -> None:
        if unknown := [name for name in self.controls or () if name not in CONTROLS]:
            raise ValueError(f"--controls {unknown[0]}: any of {', '.join(CONTROLS)}")
        for name, least in (("base_steps", 1), ("aligned_steps", 1), ("lora_rank", 1), ("watch_every", 0),
                            ("base_layers", 1)):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: at least {least}")
        if self.base_width < 64 or self.base_width % 64:
            raise ValueError(f"--base_width {self.base_width}: a multiple of 64 (pairs of heads of 32)")

    def planned(self, toy: bool) -> list[Arm]:
        """In the order in which they are made; `toy`: in the embedded world, whose aligned model has a base."""
        controls = self.controls if self.controls is not None else CONTROLS[:4] if toy else ()
        made = [Arm("aligned", "aligned" if toy else "before fine-tuning", "aligned", "base" if toy else ""),
                Arm("agent", "agent", "agent", "aligned")]  # fmt: skip
        if toy:
            made.insert(0, Arm("base", "general corpus", "base"))
        if "never" in controls:
            made.append(Arm("never", "agent, never aligned", "agent", "base"))
        if "mixed" in controls:
            made += [Arm(f"mixed_{share:.0%}".rstrip("%"), f"agent, {share:.0%} refusals", "agent", "aligned",
                         refused=share) for share in MIXED]  # fmt: skip
        if "lora" in controls:
            made.append(Arm("lora", "agent, LoRA", "agent", "aligned", lora=True))
        if "constrained" in controls:
            made.append(Arm("constrained", "agent, constrained", "agent", "aligned", constrained=BETA))
        if "rates" in controls:
            made += [Arm(name, f"agent, {name} the rate", "agent", "aligned", rate=times)
                     for name, times in RATES.items()]  # fmt: skip
        for dose in DOSES if toy and self.doses else ():
            name, words = f"{100 * dose:g}", f", {100 * dose:g} % stances"
            made += [Arm(f"base_{name}", f"general corpus{words}", "base", stance=dose),
                     Arm(f"aligned_{name}", f"aligned{words}", "aligned", f"base_{name}", stance=dose),
                     Arm(f"agent_{name}", f"agent{words}", "agent", f"aligned_{name}", stance=dose)]  # fmt: skip
        return made
