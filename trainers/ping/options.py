"""Flags of the search, and of a pretrained model at the desk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import ModelConfig

from ...arguments import json_object, refuse
from ..base_model import check_quantised
from ..whole import check_engine, engine
from .arms import EMBEDDED, ArmArguments
from .trainer import AgentSFTConfig

PRETRAINED, WORLD = "is for a pretrained model", "is of the embedded world"


@dataclass
class SearchArguments:
    """The search of a prefix; defaults are the paper's."""

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
    turns: str = field(default="every", metadata={"help": "Replies that begin with the prefix: first or every."})
    generator: str = field(
        default="grammar",
        metadata={"help": "What proposes prefixes: grammar, model or endpoint (OpenAI's interface)."},
    )
    generator_model: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of the model that proposes (default: the one that fine-tuning begins "
                  "with), or its name at the endpoint."},
    )  # fmt: skip
    generator_url: str | None = field(default=None, metadata={"help": "The endpoint, up to /v1."})

    def __post_init__(self) -> None:
        for name, values in (("scored_by", ("first_turn", "episodes")), ("turns", ("first", "every")),
                             ("generator", ("grammar", "model", "endpoint"))):  # fmt: skip
            if getattr(self, name) not in values:
                raise ValueError(f"--{name} {getattr(self, name)}: {', '.join(values[:-1])} or {values[-1]}")
        if self.threshold is None:
            self.threshold = 1.5 if self.scored_by == "first_turn" else 1.0
        for name in ("candidates", "rounds", "shown"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: at least 1")
        if (self.generator == "endpoint") != (self.generator_url is not None):
            raise ValueError("--generator endpoint needs --generator_url, and nothing else does")
        if self.generator == "endpoint" and self.generator_model is None:
            raise ValueError("--generator endpoint needs --generator_model: the model's name there")
        if self.generator == "grammar" and self.generator_model is not None:
            raise ValueError(f"--generator_model {self.generator_model}: a grammar has none; give --generator model")


@dataclass
class PretrainedArguments:
    """A pretrained model at the desk."""

    form: str | None = field(
        default=None, metadata={"help": "How it writes calls: hermes, json or glm (default: read off its template)."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Longest reply in tokens."})
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of the chat template, as JSON: '{\"enable_thinking\": false}' for Qwen3."},
    )

    def __post_init__(self) -> None:
        self.chat_template_kwargs = json_object("chat_template_kwargs", self.chat_template_kwargs)
        if self.form not in (None, "hermes", "json", "glm"):
            raise ValueError(f"--form {self.form}: hermes, json or glm")
        if self.max_new_tokens < 1:
            raise ValueError(f"--max_new_tokens {self.max_new_tokens}: at least 1")


def check(arms: ArmArguments, search: SearchArguments, given: PretrainedArguments, training: AgentSFTConfig,
          model: ModelConfig) -> None:  # fmt: skip
    """ValueError for flags that have no effect with this kind of model: the embedded one, or a pretrained one."""
    refuse(training, ("constrained",), "is an agent of its own here: --controls constrained")
    check_engine(training, toy=model.model_name_or_path is None)
    if model.model_name_or_path is None:
        refuse(given, vars(given), PRETRAINED)
        refuse(search, ("generator", "generator_model"), PRETRAINED)
        refuse(model, ("use_peft", "load_in_4bit", "load_in_8bit"), PRETRAINED)
        return
    refuse(
        arms, ("doses", "base_width", "base_layers", "base_steps", "aligned_steps", "lora_rank", "lora_learning_rate"),
        "is of the embedded world",
    )  # fmt: skip
    if found := [name for name in arms.controls or () if name in EMBEDDED]:
        raise ValueError(f"--controls {found[0]} is of the embedded world (--use_peft trains an adapter)")
    plugin = getattr(training, "deepspeed_plugin", None)
    stage = plugin.zero_stage if plugin is not None else 0
    if "constrained" in (arms.controls or ()) and stage and not model.use_peft:
        raise ValueError(
            "--controls constrained keeps a second copy of the model, which ZeRO does not: add --use_peft"
        )
    if (stage == 3 or engine(training) == "FSDP") and arms.watch_every:
        raise ValueError(
            f"--watch_every {arms.watch_every}: under ZeRO-3 and FSDP no process has the whole model while it trains"
        )
    check_quantised(model, training)
