"""Train on an endless stream of rows of tokens: `MultiTaskTrainer` without a data set, tokenising or padding."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from ..files import write_json
from .multitask import MultiTaskTrainer, row_of_each

Batch = dict[str, Tensor]
STREAM = "stream.json"
FUSED = 4096  # tokens of a vocabulary from which on a stream's rows go through TRL's fused head


class Stream(Protocol):
    """Endless rows of tokens, step by step, each step a function of its number alone."""

    tasks: Sequence[Any]  # each with a `name` and `rows`
    rows: int  # of an optimiser step
    identity: dict[str, Any]  # what its rows follow from, for checkpoints

    def step(self, number: int) -> tuple[Any, Any, Any, Any]:
        """Tokens [rows, width], which carry loss [rows, width], items of the problem and number of the task [rows]."""


class StreamTrainer(MultiTaskTrainer):
    """`MultiTaskTrainer` on rows of text or on a stream of rows of tokens.

    A stream gives all rows of an optimiser step at once. They are cut into micro-batches and over processes, so that
    8 x 1, 2 x 4 and two processes see the same rows; what a step sees hangs on its number alone, so that a resumed run
    goes on with the rows it would have had. TRL's fused head saves the memory of a large vocabulary's logits; with a
    small one the model's own forward reads the rows, for the head costs more than a small model's step.

    Args: as `MultiTaskTrainer`, and
        train_dataset: rows of text, or nothing, with
        stream: rows of tokens; `max_steps` says how many steps. `per_device_train_batch_size` times accumulation times
            processes must be its rows.

    Checkpoints keep what the stream's rows follow from (`stream.json`).

    Raises:
        ValueError: counts that do not make up the stream's rows; a stream without `max_steps`; both or neither of rows
            and stream; at `train` a checkpoint of another stream.
    """

    def __init__(
        self,
        model: Any,
        args: Any,
        train_dataset: Dataset | None = None,
        *,
        stream: Stream | None = None,
        **kwargs: Any,
    ) -> None:
        if (train_dataset is None) == (stream is None):
            raise ValueError("give either train_dataset (rows of text) or stream (rows of tokens)")
        if stream is not None:
            _check_rows(stream, args)
            train_dataset = first_rows(stream)
        assert train_dataset is not None
        self.stream = stream
        super().__init__(model, args, train_dataset, **kwargs)
        self._parameters = self.model.num_parameters(exclude_embeddings=True)
        if find_spec("lomo_optim") is None:  # accelerate looks for it on disk twice a step: 4 % of a small model's
            sys.modules.setdefault("lomo_optim", None)  # type: ignore[arg-type]  # "not there", as import knows it
        self._fused = self.model.get_output_embeddings().weight.shape[0] > FUSED

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.stream is not None:
            write_json(Path(output_dir or self.args.output_dir) / STREAM, self.stream.identity)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        file = Path(resume_from_checkpoint) / STREAM
        if self.stream is not None and file.exists():
            before, now = json.loads(file.read_text()), json.loads(json.dumps(self.stream.identity))
            changed = [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]
            if changed:
                name = "seed" if "seed" in changed else min(changed)
                raise ValueError(
                    f"{resume_from_checkpoint} was trained on another stream of rows: its {name} was "
                    f"{before.get(name)}, now it is {now.get(name)}. Make the stream that it had, or start in another "
                    "folder"
                )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def get_train_dataloader(self) -> DataLoader:
        if self.stream is None:
            return super().get_train_dataloader()
        return DataLoader(
            _MicroBatches(self.stream, self.tasks, self.args),  # type: ignore[arg-type]
            batch_size=1,
            collate_fn=lambda batches: batches[0],
            num_workers=self.args.dataloader_num_workers,
        )

    def token_nats(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if self.stream is None:
            return super().token_nats(model, inputs)
        labels = inputs["labels"][:, 1:]
        inputs.pop("items", None)
        seen = labels != -100
        if self._fused:
            return super().token_nats(model, inputs)
        logits = model(input_ids=inputs["input_ids"], use_cache=False).logits
        nats = cross_entropy(logits[:, :-1][seen].float(), labels[seen], reduction="none")
        return nats, row_of_each(seen)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As transformers' estimate; but counting the parameters anew at each step takes 4 % of a small model's."""
        if self.stream is None:
            return super().floating_point_ops(inputs)
        return 6 * inputs["input_ids"].numel() * self._parameters


class _MicroBatches(torch.utils.data.Dataset):
    """Micro-batch i of this process: a step's rows are cut over micro-batches, and these over processes."""

    def __init__(self, stream: Stream, tasks: Sequence[str], args: Any) -> None:
        self.stream, self.steps = stream, args.max_steps
        self.numbers = torch.tensor([tasks.index(task.name) for task in stream.tasks])  # the stream's -> the trainer's
        self.batch, self.accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        self.place, self.processes = args.process_index, args.world_size
        self._known: tuple[int, list[Tensor]] = (-1, [])

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __getitem__(self, number: int) -> Batch:
        step, micro = divmod(number, self.accumulation)
        if self._known[0] != step:
            self._known = step, [torch.as_tensor(part) for part in self.stream.step(step)]
        start = (micro * self.processes + self.place) * self.batch
        ids, targets, lengths, tasks = (part[start : start + self.batch] for part in self._known[1])
        numbers = self.numbers.to(tasks.device)[tasks]
        return {"input_ids": ids, "labels": ids.masked_fill(~targets, -100), "items": lengths, "task_id": numbers}


def _check_rows(stream: Stream, args: Any) -> None:
    if args.max_steps < 1:
        raise ValueError(f"a stream has no end: say how many steps with --max_steps (now {args.max_steps})")
    batch, accumulation, processes = (
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.world_size,
    )
    if batch * accumulation * processes != stream.rows:
        counts = " + ".join(f"{task.rows} {task.name}" for task in stream.tasks)
        raise ValueError(
            f"--per_device_train_batch_size {batch} x --gradient_accumulation_steps {accumulation} x {processes} "
            f"processes are {batch * accumulation * processes} rows, but a step has {stream.rows} ({counts})"
        )


def first_rows(stream: Stream) -> Dataset:
    """The first rows of each task, as TRL would have tokenised them: what the trainer knows of a stream's rows."""
    names, number = [task.name for task in stream.tasks], 0
    rows: list[dict[str, Any]] = []
    while {row["task"] for row in rows} < set(names):  # a step may lack a task (mix alternate, random)
        ids, targets, _, tasks = (torch.as_tensor(part) for part in stream.step(number))
        labels = ids.masked_fill(~targets, -100)
        for row in zip(ids.tolist(), labels.tolist(), tasks.tolist(), strict=True):
            rows.append({"input_ids": row[0], "labels": row[1], "task": names[row[2]]})
        number += 1
    return Dataset.from_list(rows)
