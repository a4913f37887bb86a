"""Train a main task beside its hints (Awasthi and Gupta, 2023, arXiv 2310.00726; spec 2.1, 2.2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor
from trl import SFTConfig

from ..multitask import MultiTaskArguments
from ..stream import Stream, StreamTrainer
from .schedules import parse_weights
from .softmax import items


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


class HintingTrainer(StreamTrainer):
    """`StreamTrainer` whose weights may follow schedules, on rows of text or on a stream of rows of tokens.

    Args: as `StreamTrainer`, and
        main: name of the main task (a stream's first).

    Logs `loss/<task>`, `tokens/<task>`, `rows/<task>`, `weight/<task>` and, if asked for, `cosine/<hint>`.

    Raises:
        ValueError: as `StreamTrainer`; packing; a weight below 0, not finite or of no task, or none for the main task.
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
        names: list[str] = []
        if stream is not None:
            names = [task.name for task in stream.tasks]
            main = names[0]
        elif train_dataset is not None and "task" in train_dataset.column_names:
            names = sorted(set(train_dataset["task"]))
        if train_dataset is not None and main not in names:
            raise ValueError(f"main={main!r} is the task of no row; there are {', '.join(names) or 'none'}")
        ordered = [str(main), *(name for name in names if name != main)]
        schedules = parse_weights(args.weights, ordered, args.max_steps)
        super().__init__(model, args, train_dataset, stream=stream, **kwargs)
        self.main, self._ordered = main, ordered
        self.schedules = [schedules[task] for task in self.tasks]
        self._gradients: dict[str, Tensor] = {}  # of an unfinished step, for `gradient_cosine`

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
        with items(inputs.pop("items")):
            return super().token_nats(model, inputs)

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
