"""Train a main task beside its hints (Awasthi and Gupta, 2023, arXiv 2310.00726; spec 2.1, 2.2)."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from trl import SFTConfig

from ...files import write_json
from ..multitask import MultiTaskArguments, MultiTaskTrainer, row_of_each
from .schedules import parse_weights
from .softmax import items

Batch = dict[str, Tensor]
STREAM = "stream.json"
FUSED = 4096  # tokens of a vocabulary from which on a stream's rows go through TRL's fused head


class Stream(Protocol):
    """Endless rows of tokens, as `data_builders.task_hinting.make_stream` makes them."""

    tasks: Sequence[Any]  # each with a `name`; the main task first
    rows: int  # of an optimiser step
    identity: dict[str, Any]  # what its rows follow from, for checkpoints

    def step(self, number: int) -> tuple[Any, Any, Any, Any]:
        """Tokens [rows, width], which carry loss [rows, width], items of the problem and number of the task [rows]."""


@dataclass
class HintingConfig(MultiTaskArguments, SFTConfig):  # type: ignore[misc]
    """`SFTConfig` for `HintingTrainer`."""

    max_length: int | None = field(default=512, metadata={"help": "Longest sequence in tokens (TRL: 1024)."})
    weights: list[str] | None = field(
        default=None,
        metadata={
            "help": "Weights of tasks that are not 1, as task=V, or by the step: task=linear:T0:T1:V0:V1, "
            "cosine:T0:T1:V0:V1, step:T:V0:V1, first:T (0 before step T), anneal:T (1 to 0)."
        },
    )
    normalise: Literal["task_token", "task_row", "global_token"] = field(
        default="task_token",
        metadata={
            "help": "A task's loss is the mean over its tokens, or over its rows of their tokens' mean; global_token: "
            "one mean over all tokens, in which short hints hardly count."
        },
    )
    gradient_cosine: int = field(
        default=0, metadata={"help": "Every so many steps, the cosine of each hint's gradient and the main task's."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradient_cosine < 0:
            raise ValueError(f"--gradient_cosine {self.gradient_cosine}: every so many steps, or 0 for never")


class HintingTrainer(MultiTaskTrainer):
    """`MultiTaskTrainer` whose weights may follow schedules, on rows of text or on a stream of rows of tokens.

    A stream gives all rows of an optimiser step at once. They are cut into micro-batches and over processes, so that
    8 x 1, 2 x 4 and two processes see the same rows; what a step sees hangs on its number alone, so that a resumed run
    goes on with the rows it would have had. TRL's fused head saves the memory of a large vocabulary's logits; with a
    small one the model's own forward reads the rows, for the head costs more than a small model's step.

    Args: as `MultiTaskTrainer`, and
        train_dataset: rows of text with `prompt`, `completion` and `task`, or nothing, with
        stream: rows of tokens; `max_steps` says how many steps. `per_device_train_batch_size` times accumulation times
            processes must be its rows.
        main: name of the main task (a stream's first).

    Logs `loss/<task>`, `tokens/<task>`, `rows/<task>`, `weight/<task>` and, if asked for, `cosine/<hint>`.

    Checkpoints keep what the stream's rows follow from (`stream.json`).

    Raises:
        ValueError: packing; a weight below 0, not finite or of no task, or none for the main task; counts that do not
            make up the stream's rows; a stream without `max_steps`; both or neither of rows and stream; at `train` a
            checkpoint of another stream.
    """

    def __init__(
        self,
        model: Any,
        args: HintingConfig,
        train_dataset: Dataset | None = None,
        *,
        stream: Stream | None = None,
        main: str | None = None,
        **kwargs: Any,
    ) -> None:
        if (train_dataset is None) == (stream is None):
            raise ValueError("give either train_dataset (rows of text) or stream (rows of tokens)")
        if stream is not None:
            _check_rows(stream, args)
            main = stream.tasks[0].name
            train_dataset = _first_rows(stream)
        assert train_dataset is not None
        names = sorted(set(train_dataset["task"])) if "task" in train_dataset.column_names else []
        if main is None or main not in names:
            raise ValueError(f"main={main!r} is the task of no row; there are {', '.join(names) or 'none'}")
        schedules = parse_weights(args.weights, [main, *(name for name in names if name != main)], args.max_steps)
        self.stream, self.main = stream, main
        super().__init__(model, args, train_dataset, **kwargs)
        self.schedules = [schedules[task] for task in self.tasks]
        self._ordered = [main, *(task for task in self.tasks if task != main)]
        self._gradients: dict[str, Tensor] = {}  # of an unfinished step, for `gradient_cosine`
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

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        step = self.state.global_step
        weights = [schedule(step) for schedule in self.schedules]
        self.task_weights = torch.tensor(weights)
        batches, items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.zeros(len(self.tasks), dtype=torch.long, device=device)
        for batch in batches:
            counts += torch.bincount(batch["task_id"].to(device), minlength=len(self.tasks))
        self._step_rows = self.summed(counts)
        for task, weight, rows in zip(self.tasks, weights, self._step_rows.tolist(), strict=True):
            self._metrics["train"][f"weight/{task}"].append(weight)
            self._metrics["train"][f"rows/{task}"].append(float(rows))
        return batches, items_in_batch

    def token_nats(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if self.stream is None:
            return super().token_nats(model, inputs)
        labels = inputs["labels"][:, 1:]
        seen = labels != -100
        with items(inputs.pop("items")):
            if self._fused:
                return super().token_nats(model, inputs)
            logits = model(input_ids=inputs["input_ids"], use_cache=False).logits
        nats = cross_entropy(logits[:, :-1][seen].float(), labels[seen], reduction="none")
        return nats, row_of_each(seen)

    def mean_losses(self, nats: Tensor, tasks: Tensor, rows: Tensor, whole: Tensor) -> Tensor:
        if self.args.normalise == "task_token":
            return super().mean_losses(nats, tasks, rows, whole)
        sums = nats.new_zeros(len(self.tasks))
        if self.args.normalise == "global_token":
            return sums.index_add(0, tasks, nats) / whole.sum()
        nats = nats / torch.bincount(rows)[rows]
        here = torch.bincount(tasks[torch.unique(rows, return_inverse=True)[1]], minlength=len(self.tasks))
        counts = self._step_rows if self.model.training else here
        return sums.index_add(0, tasks, nats) / counts.clamp(min=1)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        every = self.args.gradient_cosine
        if every and self.state.global_step % every == 0:
            self._add_gradients(self._prepare_inputs(dict(inputs)))
            if self.accelerator.sync_gradients:
                self._log_cosines()
        return super().training_step(model, inputs, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As transformers' estimate; but counting the parameters anew at each step takes 4 % of a small model's."""
        if self.stream is None:
            return super().floating_point_ops(inputs)
        return 6 * inputs["input_ids"].numel() * self._parameters

    def _add_gradients(self, inputs: dict[str, Any]) -> None:
        """Of this micro-batch, to each task's gradient of its summed loss over all weights."""
        tasks = inputs.pop("task_id")
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with self.compute_loss_context_manager():
            nats, rows = self.token_nats(self.model, inputs)
        of_token = tasks[rows]
        for number, task in enumerate(self.tasks):
            if (of_token == number).any():
                found = torch.autograd.grad(nats[of_token == number].sum(), parameters, retain_graph=True)
                gradient = torch.cat([part.flatten().float() for part in found])
                self._gradients[task] = self._gradients.get(task, 0) + gradient

    def _log_cosines(self) -> None:
        """Of the whole step: the cosine of each hint's gradient and the main task's."""
        size = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        nothing = torch.zeros(size, device=self.accelerator.device)
        main, *hints = (self.summed(self._gradients.pop(task, nothing)) for task in self._ordered)
        for task, gradient in zip(self._ordered[1:], hints, strict=True):
            if main.any() and gradient.any():  # a step may lack a task (mix alternate, random)
                cosine = torch.nn.functional.cosine_similarity(main, gradient, dim=0)
                self._metrics["train"][f"cosine/{task}"].append(float(cosine))


class _MicroBatches(torch.utils.data.Dataset):
    """Micro-batch i of this process: a step's rows are cut over micro-batches, and these over processes."""

    def __init__(self, stream: Stream, tasks: Sequence[str], args: HintingConfig) -> None:
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


def _check_rows(stream: Stream, args: HintingConfig) -> None:
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


def _first_rows(stream: Stream) -> Dataset:
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
