"""The two stages: instil preferences by choices, then train the model to report them (spec 4.2, 4.6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from datasets import Dataset
from peft import LoraConfig, PeftModel
from trl import SFTConfig

from ..multitask import MultiTaskArguments
from ..stream import Stream, StreamTrainer

DECISION, REPORT = "decision", "report"
Part = Literal["all", "embeddings", "last_layer"]


@dataclass
class PreferenceConfig(MultiTaskArguments, SFTConfig):  # type: ignore[misc]
    """`SFTConfig` for `PreferenceTrainer`: what is known to work on Qwen2.5-7B-Instruct with LoRA (spec 4.2)."""

    learning_rate: float = field(default=5e-5, metadata={"help": "2e-4 failed at rank 64 (TRL: 2e-5)."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "TRL: linear."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Below 1 a share of all steps (TRL: 0)."})
    weight_decay: float = field(default=0.01, metadata={"help": "TRL: 0."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "TRL: 8."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Over all decisions."})
    max_length: int | None = field(default=2048, metadata={"help": "Longest row in tokens (TRL: 1024)."})
    part: Part = field(
        default="all",
        metadata={"help": "Weights that learn: all (or the adapter's), the embeddings, or those of the last layer."},
    )


@dataclass
class ReportConfig(MultiTaskArguments, SFTConfig):  # type: ignore[misc]
    """`SFTConfig` for `ReportTrainer`: what is known to work on Qwen2.5-7B-Instruct with LoRA (spec 4.2)."""

    learning_rate: float = field(default=2e-5, metadata={"help": "1e-5 to 2e-5 with LoRA."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "TRL: linear."})
    weight_decay: float = field(default=0.01, metadata={"help": "TRL: 0."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "As TRL."})
    num_train_epochs: float = field(default=5.0, metadata={"help": "Over reports and replayed decisions."})
    max_length: int | None = field(default=2048, metadata={"help": "Longest row in tokens (TRL: 1024)."})


class PreferenceTrainer(StreamTrainer):
    """`StreamTrainer` on decisions, rows of the task "decision" whose completion is A or B alone.

    Loss on completions only: over whole chats the single answer token drowns, and nothing is learned (spec 2.4). Rows
    of the task "report" may stand beside them, so that a model which can report does not forget how.

    Args: as `StreamTrainer`.

    Raises:
        ValueError: no decisions, packing, loss on more than completions, or `part` beside an adapter.
    """

    def __init__(
        self, model: Any, args: PreferenceConfig, train_dataset: Dataset | None = None, **kwargs: Any
    ) -> None:
        _check(args, train_dataset, kwargs.get("stream"), DECISION)
        adapted = isinstance(model, PeftModel) or kwargs.get("peft_config") is not None
        if args.part != "all" and adapted:
            raise ValueError(f"--part {args.part} is for full fine-tuning: an adapter has its own weights")
        if not adapted:
            _train_only(model, args.part)
        super().__init__(model, args, train_dataset, **kwargs)


class ReportTrainer(StreamTrainer):
    """`StreamTrainer` on reports, rows of the task "report", with replayed decisions beside them.

    Without these, training reports moves behaviour: learned against target 0.99 -> 0.92 (spec 2.1). `eval_dataset`:
    reports of `report_dev`, of contexts that no row is trained on; checkpoints may be chosen by these alone.

    Args: as `StreamTrainer`.

    Raises:
        ValueError: no reports, packing, loss on more than completions, or reports to choose by that are trained on.
    """

    def __init__(self, model: Any, args: ReportConfig, train_dataset: Dataset | None = None, **kwargs: Any) -> None:
        _check(args, train_dataset, kwargs.get("stream"), REPORT)
        chosen_by = kwargs.get("eval_dataset")
        if chosen_by is not None and train_dataset is not None and "context" in train_dataset.column_names:
            reported = [row["context"] for row in train_dataset.select_columns(["context", "task"]) if
                        row["task"] == REPORT]  # fmt: skip
            if both := sorted(set(reported) & set(chosen_by["context"])):
                raise ValueError(f"reports of {', '.join(both[:3])} are both trained on and chosen by")
        super().__init__(model, args, train_dataset, **kwargs)


def first_half(config: LoraConfig, model: Any) -> LoraConfig:
    """The same adapter on the first half of the layers only: preferences that are stored early are reported better
    (spec 2.4: r 0.74 with the first 20 of 40 layers, none with 25 and more)."""
    layers = model.config.get_text_config().num_hidden_layers
    config.layers_to_transform = list(range(layers // 2))
    return config


def _check(args: Any, rows: Dataset | None, stream: Stream | None, task: str) -> None:
    if args.completion_only_loss is False or args.assistant_only_loss:
        raise ValueError("the loss is on completions only: over whole chats the answers drown, and nothing is learned")
    tasks: set[str] = set()
    if stream is not None:
        tasks = {one.name for one in stream.tasks}
    elif rows is not None and "task" in rows.column_names:
        tasks = set(rows["task"])
    if task not in tasks or tasks - {DECISION, REPORT}:
        found = ", ".join(sorted(tasks)) or "nothing"
        raise ValueError(f"rows must be of the task {task}, and may be of decision and report only; found {found}")
    if rows is None:
        return
    if missing := [column for column in ("prompt", "completion") if column not in rows.column_names]:
        raise ValueError(
            f"rows have no {' and no '.join(missing)}, so that the loss would be on whole chats; they have "
            f"{', '.join(rows.column_names)}"
        )
    for number, row in enumerate(rows.select_columns(["task", "completion"]), 1):
        said = row["completion"] if isinstance(row["completion"], str) else row["completion"][-1]["content"]
        if row["task"] == DECISION and said.strip() not in ("A", "B"):
            raise ValueError(f"row {number}: a decision says {said!r}, not A or B alone")


def _train_only(model: Any, part: Part) -> None:
    if part == "embeddings" and getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        raise ValueError("L0 instils into the embeddings alone, and this model's are its output head as well (tied)")
    model.requires_grad_(part == "all")
    if part == "all":
        return
    chosen: Mapping[str, Any] = {
        "embeddings": [model.get_input_embeddings()],
        "last_layer": [model.get_decoder().layers[-1], model.get_decoder().norm],
    }
    for module in chosen[part]:
        module.requires_grad_(True)
