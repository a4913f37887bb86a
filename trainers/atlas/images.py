"""transformers' Trainer for CLIP as a zero-shot classifier: of its weights, or of a composer's coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers import CLIPModel, Trainer, TrainingArguments

from ..training import FiniteTrainer, HouseArguments
from .adaptation import TrustedBatches, entropy_losses, random_crops, threshold, trusted_set, ufm_losses
from .coefficient_trainer import CoefficientArguments, CoefficientTrainer
from .composer import Composer
from .zero_shot import ZeroShot, task_numbers


@dataclass
class AtlasImageConfig(CoefficientArguments, HouseArguments, TrainingArguments):  # type: ignore[misc]
    """`TrainingArguments` with the paper's few-shot values where transformers' differ."""

    trust_remote_code = False  # no flag: an image model never brings code

    per_device_train_batch_size: int = field(default=128, metadata={"help": "Images of a micro-batch (paper: 128)."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Batches are made here, with what they need."}
    )
    crop_scale: float = field(
        default=0.5,
        metadata={"help": "Training sees random crops of at least this share of the area (the paper's 0.5); 1: none."},
    )
    flip: bool = field(default=True, metadata={"help": "Training mirrors half of the images (the paper does)."})
    entropy_below: float | None = field(
        default=None,
        metadata={
            "help": "Test-time adaptation without labels: lower the entropy, on images where it is below this share "
            "of the largest possible one (SAR: 0.4)."
        },
    )
    ufm: bool = field(
        default=False,
        metadata={"help": "Test-time adaptation without labels: FixMatch with trusted samples (the paper's UFM)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.crop_scale <= 1:
            raise ValueError(f"crop_scale={self.crop_scale!r} is a share of the area, above 0 and at most 1")


class ImageRows(TorchDataset):
    """Rows (`id`, `task`, `image`, `label`) as a Trainer's dataset; `index` is a row's place."""

    def __init__(self, rows: Dataset, zero_shot: ZeroShot) -> None:
        self.rows, self.reader = rows, zero_shot.reader
        self.ids, self.labels = rows["id"][:], rows["label"][:]
        self.task_ids = task_numbers(rows["task"][:], list(zero_shot.heads)).tolist()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[dict[str, Any]]:
        pixels = self.reader.read(self.rows, self.ids, places)
        return [
            {"pixel_values": one, "labels": self.labels[place], "task_id": self.task_ids[place], "index": place}
            for place, one in zip(places, pixels, strict=True)
        ]


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """`pixel_values` [n, 3, height, width]; `labels`, `task_id` and `index` [n]."""
    batch = {key: torch.tensor([item[key] for item in items]) for key in ("labels", "task_id", "index")}
    return {"pixel_values": torch.stack([item["pixel_values"] for item in items]), **batch}


class ImageTrainer(FiniteTrainer, Trainer):
    """Train those parameters of a CLIP that require gradients; its text features stay what they are.

    The loss is the sum over tasks of each task's mean over all its rows in the optimiser step, whatever the
    micro-batches and processes they lie in. A row's loss is the cross entropy with its label, on a random crop; with
    `args.entropy_below` its entropy (labels are not looked at); with `args.ufm` see `adaptation.ufm_losses`: the weak
    view is the image, the strong one a random crop, and what is trusted is chosen anew at the start of every epoch.

    Args:
        clip: trained in place.
        rows: with `id`, `task`, `image`, and `label` where that is learned from.

    Raises:
        NonFiniteError: loss or gradient became NaN or infinite.
        ValueError: rows of a task without a head; UFM for several tasks, or with checkpoints within epochs.
    """

    def __init__(
        self, clip: CLIPModel, args: AtlasImageConfig, rows: Dataset, zero_shot: ZeroShot,
        callbacks: Sequence[Any] | None = None,
    ) -> None:  # fmt: skip
        if args.ufm and len(set(rows["task"][:])) > 1:
            raise ValueError(f"UFM adapts to one task at a time; the rows are of {sorted(set(rows['task'][:]))}")
        if args.ufm and args.entropy_below is not None:
            raise ValueError("ufm and entropy_below are two objectives: choose one")
        if args.ufm and args.save_strategy == "steps":
            raise ValueError(
                "UFM's trusted set belongs to an epoch's start: a run that continues within one would choose another; "
                "use --save_strategy epoch or no"
            )
        self.source, self.zero_shot = rows, zero_shot
        super().__init__(
            zero_shot.classifier(clip),
            args,
            data_collator=collate,
            train_dataset=ImageRows(rows, zero_shot),
            callbacks=None if callbacks is None else list(callbacks),
        )
        self.loss_is_scaled_for_ga = True  # compute_loss divides by what the whole step holds
        self._step_rows: Tensor | None = None
        self._trusted = torch.full((len(rows),), -1)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        losses, tasks = self.row_losses(model, inputs), inputs["task_id"]
        here = torch.bincount(tasks, minlength=len(self.zero_shot.heads))
        whole = here if self._step_rows is None or not model.training else self._step_rows.to(here)
        sums = losses.new_zeros(len(here)).index_add(0, tasks, losses)
        loss = (sums / whole.clamp(min=1)).sum()
        if model.training:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def row_losses(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Nats of every row of the batch, [rows]."""
        pixels, tasks = inputs["pixel_values"], inputs["task_id"]
        if self.args.entropy_below is not None:
            return entropy_losses(model(pixels, tasks), self.args.entropy_below)
        crops = pixels
        if model.training and (self.args.crop_scale < 1 or self.args.flip):
            crops = random_crops(pixels, self.args.crop_scale, self.args.flip)
        if not self.args.ufm:
            return cross_entropy(model(crops, tasks), inputs["labels"], reduction="none")
        with torch.no_grad():
            weak = model(pixels, tasks)
        certain = threshold(self.state.global_step / max(1, self.state.max_steps))
        trusted = self._trusted[inputs["index"].cpu()].to(tasks)
        return ufm_losses(weak, model(crops, tasks), trusted, certain)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.zeros(len(self.zero_shot.heads), dtype=torch.long, device=device)
        for batch in batches:
            counts += torch.bincount(batch["task_id"].to(device), minlength=len(counts))
        self._step_rows = self.accelerator.reduce(counts, "sum")
        return batches, items

    def get_train_dataloader(self) -> DataLoader:
        if not self.args.ufm:
            return super().get_train_dataloader()
        size = self.args.per_device_train_batch_size
        batches = TrustedBatches(len(self.source), size, self.args.seed, self._select)
        loader = DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=collate)  # type: ignore[arg-type]
        return self.accelerator.prepare(loader)

    def _select(self) -> Tensor:
        """Trust what the model, as it now is, is most certain of."""
        logits = self.zero_shot.logits(self._clip(), self.source, 2 * self.args.per_device_train_batch_size)
        kept = torch.from_numpy(logits)
        self._trusted = trusted_set(kept[:, kept[0] > -torch.inf].softmax(-1))
        return self._trusted

    def _clip(self) -> CLIPModel:
        classifier: Any = self.accelerator.unwrap_model(self.model)
        return classifier.clip


class AtlasImageTrainer(CoefficientTrainer, ImageTrainer):
    """Learn the coefficients of a `Composer` over a CLIP, as `ImageTrainer` does weights.

    Args:
        composer: over a `CLIPModel`, whose text tower it leaves alone; trained in place.
    """

    def __init__(
        self, composer: Composer, args: AtlasImageConfig, rows: Dataset, zero_shot: ZeroShot,
        callbacks: Sequence[Any] | None = None,
    ) -> None:  # fmt: skip
        self.composer = composer
        clip: Any = composer.model
        super().__init__(clip, args, rows, zero_shot, callbacks)
        self._take_over_engines()

    def _composed_part(self) -> nn.Module:
        return self._clip()
