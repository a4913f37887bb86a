"""The command line of a recipe: the flags all recipes have, and a parser with errors for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NoReturn

import yaml
from transformers import TrainingArguments
from trl import ModelConfig, TrlParser


@dataclass
class RecipeArguments:
    """Flags that every recipe has; those of its methods, data, trainer and TRL's ModelConfig stand beside them."""

    preset: Literal["default", "smoke"] = field(default="default", metadata={"help": "Sizes; other flags override."})
    dry_run: bool = field(default=False, metadata={"help": "Show rows, masks, parameters, memory; train nothing."})
    seeds: list[int] = field(default_factory=lambda: [42], metadata={"help": "From three on, claims are judged."})
    dry_engine: Literal["none", "ddp", "fsdp2", "zero2", "zero3", "zero3_offload"] | None = field(
        default=None, metadata={"help": "With --dry_run: the engine to plan for; unset: that of this launch."}
    )
    dry_processes: int | None = field(
        default=None,
        metadata={"help": "With --dry_engine: how many processes to plan for; unset: those of this launch."},
    )
    dry_memory: float | None = field(
        default=None,
        metadata={"help": "With --dry_run: GiB a process, for the largest batch; unset: the accelerator's."},
    )
    eval_batch_size: int = field(default=16, metadata={"help": "Rows of a forward pass in evaluation (memory)."})

    def __post_init__(self) -> None:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"--seeds {self.seeds} names a seed twice; give each once")
        for name in ("dry_engine", "dry_processes", "dry_memory"):
            if getattr(self, name) is not None and not self.dry_run:
                raise ValueError(f"--{name} {getattr(self, name)} is for --dry_run, which trains nothing: give both")
        if self.dry_processes is not None and self.dry_processes < 1:
            raise ValueError(f"--dry_processes {self.dry_processes}: at least 1")
        if (self.dry_processes or 1) > 1 and self.dry_engine in (None, "none"):
            raise ValueError(
                f"--dry_processes {self.dry_processes}: say how they share the work: --dry_engine ddp, ..."
            )
        if self.dry_memory is not None and not 0 < self.dry_memory < float("inf"):
            raise ValueError(f"--dry_memory {self.dry_memory}: GiB above 0")

    @property
    def plan(self) -> dict[str, Any]:
        """What `show_dry_run` is to plan for."""
        return {"engine": self.dry_engine, "processes": self.dry_processes, "memory": self.dry_memory}


class RecipeParser(TrlParser):
    """TrlParser for people: bad values raise ValueError (argparse would print some 250 flags first), abbreviations are
    errors (a mistyped flag would pass for another one), and YAML may give one value where a list is expected."""

    def __init__(self, dataclass_types: Any, **kwargs: Any) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help lists all flags)")

    def parse_args_and_config(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().parse_args_and_config(*args, **kwargs)
        except yaml.YAMLError as error:
            raise ValueError(f"--config is not YAML: {error}") from error

    def set_defaults_with_config(self, **values: Any) -> Any:
        lists = {action.dest for action in self._actions if action.nargs == "+"}
        for name in lists & values.keys():
            if values[name] is not None and not isinstance(values[name], list):
                values[name] = [values[name]]
        return super().set_defaults_with_config(**values)


def check_unused(training: TrainingArguments, model: ModelConfig | None = None) -> None:
    """ValueError for flags of the libraries underneath that would have no effect in a recipe, with what to do instead.

    A recipe measures every arm itself, in one process after the other or under DDP.
    """
    instead = {
        "resume_from_checkpoint": "the same command continues an interrupted run",
        "push_to_hub": "push the finished folder with huggingface-cli",
        "load_best_model_at_end": "the last step counts, as in the paper",
        "do_eval": "every arm is measured when it is trained",
    }
    for name, way in instead.items():
        if getattr(training, name):
            raise ValueError(f"--{name} has no effect here: {way}")
    if training.seed != 42:
        raise ValueError(f"--seed {training.seed} has no effect; use --seeds {training.seed}")
    if model is None:
        return
    usual = ModelConfig()
    for name, value in asdict(model).items():
        if name.startswith("lora_") and value != getattr(usual, name):
            raise ValueError(f"--{name} has no effect: the LoRA baseline is the paper's (rank 8, queries and values)")
    if model.use_peft:
        raise ValueError("--use_peft has no effect: --arms says what is tuned (the LoRA baseline is the arm lora)")


def refuse(part: Any, names: Iterable[str], why: str) -> None:
    """ValueError for the first of these flags that differs from its default."""
    for name in names:
        if getattr(part, name) != getattr(type(part)(), name):
            raise ValueError(f"--{name} {why}")


def json_object(name: str, value: Any) -> dict[str, Any] | None:
    """The value of a flag that takes a JSON object; ValueError for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"--{name} {value}: no JSON ({error})") from error
    if not isinstance(value, dict | None):
        raise ValueError(f"--{name} {value}: a JSON object")
    return value


def flags_and_defaults(parts: Iterable[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The flags of parsed dataclasses, and what each is where nobody gives it (for a run's report)."""
    parts = list(parts)
    usual = [type(p)(output_dir=p.output_dir) if isinstance(p, TrainingArguments) else type(p)() for p in parts]
    return _merged(parts), _merged(usual)


def _merged(parts: Sequence[Any]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in asdict(part).items()}
