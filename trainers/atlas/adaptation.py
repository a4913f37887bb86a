"""Test-time adaptation of classifiers from unlabelled images: what is trusted, and the loss of each row (spec 2.4).

UFM is the paper's unsupervised FixMatch with trusted samples. We follow its text; the released code differs from it in
every step (all images count as trusted, the sharpening cancels out, the threshold is fixed).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, nll_loss

TRUSTED_SHARE = 4  # one in four rows of a batch is a trusted one
TRUSTED_MOST = 100  # of a class
THRESHOLD = (0.9, 1.0)  # at the start and at the end


def trusted_set(probabilities: Tensor) -> Tensor:
    """Pseudo-labels `[n]`, -1 where there is none, from zero-shot probabilities `[n, classes]`.

    Of each class the min(n / classes, 100) images (at least one) in which it is most probable are trusted to be of it.
    One that two classes pick belongs to the one that is more probable in it.
    """
    count, classes = probabilities.shape
    size = max(1, min(count // classes, TRUSTED_MOST))
    picked = torch.full_like(probabilities, -math.inf)
    best = probabilities.topk(min(size, count), dim=0).indices  # [size, classes]
    picked.scatter_(0, best, probabilities.gather(0, best))
    value, label = picked.max(1)
    return torch.where(value > -math.inf, label, torch.full_like(label, -1))


def sharpened(probabilities: Tensor) -> Tensor:
    """`p ** 0.5`, of sum 1 again (the paper's sigma)."""
    roots = probabilities.sqrt()
    return roots / roots.sum(-1, keepdim=True)


def threshold(progress: float) -> float:
    """How certain a pseudo-label must be; `progress` runs from 0 to 1."""
    return THRESHOLD[0] + (THRESHOLD[1] - THRESHOLD[0]) * progress


def ufm_losses(weak: Tensor, strong: Tensor, trusted: Tensor, certain: float) -> Tensor:
    """Nats `[n]` of the strong views' logits `[n, classes]`.

    Trusted rows (`trusted` `[n]` their labels, else -1): the cross entropy. Others: that with the sharpened
    probabilities of the weak view where the largest of them exceeds `certain`, else 0. No gradient reaches the weak
    view.
    """
    logs = strong.log_softmax(-1)
    target = sharpened(weak.detach().softmax(-1))
    soft = -(target * logs.masked_fill(target == 0, 0.0)).sum(-1)  # 0 * -inf where a task lacks a class
    soft = soft * (target.max(-1).values > certain)
    return torch.where(trusted >= 0, nll_loss(logs, trusted.clamp(min=0), reduction="none"), soft)


def entropy_losses(logits: Tensor, below: float) -> Tensor:
    """Entropy `[n]` in nats where it is below this share of the largest possible one, else 0 (SAR's filter)."""
    logs = logits.log_softmax(-1)
    entropies = -(logs.exp() * logs.masked_fill(logs == -math.inf, 0.0)).sum(-1)
    most = (logits > -math.inf).sum(-1).log()
    return torch.where(entropies.detach() < below * most, entropies, torch.zeros_like(entropies))


def random_crops(pixels: Tensor, smallest: float, flip: bool) -> Tensor:
    """Views of images `[n, channels, height, width]`: a random part of at least this share of the area, with sides in
    the proportion 3:4 to 4:3, scaled back (bilinear), and with `flip` mirrored half of the time. torch's global
    generator draws."""
    count = len(pixels)
    area = smallest + (1 - smallest) * torch.rand(count)
    ratio = torch.exp((2 * torch.rand(count) - 1) * math.log(4 / 3))
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1.0)
    centre = (2 * torch.rand(count, 2) - 1) * (1 - sides)
    mirror = torch.where(torch.rand(count) < 0.5, -1.0, 1.0) if flip else torch.ones(count)
    place = torch.zeros(count, 2, 3)
    place[:, 0, 0], place[:, 1, 1], place[:, :, 2] = sides[:, 0] * mirror, sides[:, 1], centre
    grid = affine_grid(place.to(pixels), list(pixels.shape), align_corners=False)
    return grid_sample(pixels, grid, padding_mode="border", align_corners=False)


class TrustedBatches:
    """A batch sampler over rows, a quarter of each batch trusted ones, over and over where they are few.

    An epoch has as many batches as the rows fill.

    Args:
        select: gives the trusted set's labels `[rows]` (-1: not trusted); asked at the start of every epoch.
    """

    drop_last = False

    def __init__(self, rows: int, batch_size: int, seed: int, select: Callable[[], Tensor]) -> None:
        if batch_size < TRUSTED_SHARE:
            raise ValueError(f"a batch of {batch_size} has no room for a quarter of trusted images: take at least 4")
        self.rows, self.batch_size, self.seed, self.select = rows, batch_size, seed, select
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        labels = self.select()
        trusted, rest = (_forever(places.flatten(), generator) for places in (
            (labels >= 0).nonzero(), (labels < 0).nonzero() if (labels < 0).any() else (labels >= 0).nonzero(),
        ))  # fmt: skip
        share = self.batch_size // TRUSTED_SHARE
        for _ in range(len(self)):
            yield [next(trusted) for _ in range(share)] + [next(rest) for _ in range(self.batch_size - share)]


def _forever(places: Tensor, generator: torch.Generator) -> Iterator[int]:
    """Shuffled anew each time they are through."""
    while True:
        yield from places[torch.randperm(len(places), generator=generator)].tolist()
