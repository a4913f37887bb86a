"""CLIP as a classifier: the frozen head of prompt texts, images as tensors, and their logits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import CLIPModel, PreTrainedTokenizerBase

CACHE_BYTES = 2 << 30  # of processed images: 3,500 of 224 x 224 in fp32, or all the digits


class ZeroShotClassifier(nn.Module):
    """Logits `exp(logit_scale) * <image feature, text feature>`, both of norm 1; the text features are constants.

    Args:
        clip: the model; which of its parameters train is the caller's business.
        heads: task -> text features `[classes, width]` of norm 1.
    """

    weights: Tensor
    there: Tensor

    def __init__(self, clip: CLIPModel, heads: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.clip, self.tasks = clip, list(heads)
        most = max(len(head) for head in heads.values())
        padded = torch.zeros(len(heads), most, next(iter(heads.values())).shape[1])
        there = torch.zeros(len(heads), most, dtype=torch.bool)
        for number, head in enumerate(heads.values()):
            padded[number, : len(head)], there[number, : len(head)] = head.detach().float(), True
        device = clip.logit_scale.device
        self.register_buffer("weights", padded.to(device), persistent=False)
        self.register_buffer("there", there.to(device), persistent=False)

    def forward(self, pixel_values: Tensor, task_id: Tensor) -> Tensor:
        """Pixels `[n, 3, height, width]` and the numbers of their tasks `[n]` to logits `[n, most classes]`; -inf for
        classes that a task does not have."""
        features = self.clip.get_image_features(pixel_values=pixel_values.to(self.clip.dtype)).pooler_output.float()
        features = features / features.norm(dim=-1, keepdim=True)
        every = torch.einsum("nd,tcd->ntc", features, self.weights) * self.clip.logit_scale.float().exp()
        own = every[torch.arange(len(features), device=features.device), task_id]
        return own.masked_fill(~self.there[task_id], -math.inf)


@torch.no_grad()
def text_head(clip: CLIPModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[str]]) -> Tensor:
    """Text features `[classes, width]`: of each class the mean over its prompts (each of norm 1), of norm 1 again.

    Raises ValueError for a class without a prompt, and for one that is cut off by the text tower's length.
    """
    longest = clip.config.text_config.max_position_embeddings
    features = []
    for number, own in enumerate(prompts):
        if not own:
            raise ValueError(f"class {number} has no prompt")
        tokens = tokenizer(list(own), padding=True, return_tensors="pt").to(clip.device)
        if tokens["input_ids"].shape[1] > longest:
            raise ValueError(f"a prompt like {own[0]!r} has more than the {longest} tokens the text tower reads")
        embedded = clip.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output.float()
        mean = (embedded / embedded.norm(dim=-1, keepdim=True)).mean(0)
        features.append(mean / mean.norm())
    return torch.stack(features)


@dataclass
class ImageReader:
    """Images of rows as a model's input; those read before are kept, up to `cache_bytes` in all.

    processor: an image processor of transformers. Rows are told apart by their `id`.
    """

    processor: Any
    cache_bytes: int = CACHE_BYTES
    _kept: dict[str, Tensor] = field(default_factory=dict)
    _bytes: int = 0

    def read(self, rows: Dataset, ids: Sequence[str], places: Sequence[int]) -> list[Tensor]:
        """Pixels `[3, height, width]` of the rows at `places`; `ids`: of all rows.

        Raises ValueError, naming the row, for an image that cannot be decoded.
        """
        missing = [place for place in dict.fromkeys(places) if ids[place] not in self._kept]
        read = {}
        if missing:
            try:
                images = rows.select_columns("image")[missing]["image"]
                pixels = self.processor([image.convert("RGB") for image in images], return_tensors="pt")[
                    "pixel_values"
                ]
            except (OSError, SyntaxError) as error:  # what PIL raises for broken files
                names = ", ".join(ids[place] for place in missing[:5])
                raise ValueError(f"an image among rows {names} (of {len(missing)}) cannot be read: {error}") from error
            for place, one in zip(missing, pixels, strict=True):
                read[place] = one
                if self._bytes + one.nbytes <= self.cache_bytes:
                    self._kept[ids[place]] = one.clone()
                    self._bytes += one.nbytes
        return [read[place] if place in read else self._kept[ids[place]] for place in places]


@dataclass
class ZeroShot:
    """What turns a CLIP into the classifier of some tasks.

    Attributes:
        heads: task -> text features `[classes, width]`.
    """

    heads: Mapping[str, Tensor]
    reader: ImageReader

    @classmethod
    def from_prompts(
        cls, clip: CLIPModel, tokenizer: PreTrainedTokenizerBase, processor: Any,
        prompts: Mapping[str, Sequence[Sequence[str]]],
    ) -> ZeroShot:  # fmt: skip
        """prompts: task -> for each class its texts."""
        heads = {task: text_head(clip, tokenizer, own) for task, own in prompts.items()}
        return cls(heads, ImageReader(processor))

    def classifier(self, clip: CLIPModel) -> ZeroShotClassifier:
        return ZeroShotClassifier(clip, self.heads)

    @torch.no_grad()
    def logits(self, clip: CLIPModel, rows: Dataset, batch_size: int = 256) -> np.ndarray:
        """Logits `[rows, most classes]` (-inf where a task has fewer) in fp32; the model's mode is restored."""
        classifier, ids = self.classifier(clip), rows["id"][:]
        tasks = task_numbers(rows["task"][:], classifier.tasks)
        training = clip.training
        clip.eval()
        try:
            found = []
            for start in range(0, len(ids), batch_size):
                places = range(start, min(start + batch_size, len(ids)))
                pixels = torch.stack(self.reader.read(rows, ids, places)).to(clip.device)
                found.append(classifier(pixels, tasks[list(places)].to(clip.device)).cpu())
        finally:
            clip.train(training)
        return torch.cat(found).numpy()


def task_numbers(names: Sequence[str], tasks: Sequence[str]) -> Tensor:
    """Numbers `[rows]` of the rows' tasks. ValueError for a task without a head."""
    places = {task: number for number, task in enumerate(tasks)}
    if unknown := sorted(set(names) - set(tasks)):
        raise ValueError(f"rows are of {unknown[0]!r}, for which there is no head; there are {list(tasks)}")
    return torch.tensor([places[name] for name in names])
