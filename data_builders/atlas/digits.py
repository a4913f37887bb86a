"""The embedded image tasks: scikit-learn's real handwritten digits (1,797 of 8 x 8 pixels), changed in seven ways.

Every task is the same question, which digit this is, about images that are changed in one way: turned, mirrored,
inverted, sheared, shifted, noisy. A base that has only seen upright digits can do some of them in part, and one, the
inverted ones, not at all. Two tasks contradict each other where a changed digit looks like another one (a 6 that is
turned by 180 degrees, and a mirrored 9), as it is.

Which images are trained on, fitted on, chosen with and tested on is drawn once for all tasks, so that an image of one
task's training is in no other task's test. The unchanged digits are there, too, as the task `upright` of the splits
`base` (train images: what the tiny base is trained on) and `control` (test images: what composing does to them).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import DatasetDict

    from .images import AtlasImageArguments

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("a photo of the digit {}.", "a scan of a {}.", "the number {}.")
UPRIGHT = "upright"
SHARES = {"train": 0.55, "fit": 0.15, "dev": 0.10, "test": 0.20}
NOISE = 90.0  # standard deviation, of 255

Change = Callable[[np.ndarray], np.ndarray]  # image [8, 8] uint8 -> the same


def _noisy(image: np.ndarray) -> np.ndarray:
    """Noise that belongs to the image: the same one always gets the same."""
    seed = int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:8], "big")
    noise = np.random.default_rng(seed).normal(0.0, NOISE, image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)


def _moved(image: np.ndarray, matrix: tuple[float, ...]) -> np.ndarray:
    """Where pixels come from, as PIL's affine transform says; black where that is outside."""
    from PIL import Image

    picture = Image.fromarray(image)
    return np.array(picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))


CHANGES: dict[str, Change] = {
    "left": partial(np.rot90, k=1),
    "turned": partial(np.rot90, k=2),
    "mirrored": np.fliplr,
    "inverted": np.invert,
    "sheared": partial(_moved, matrix=(1, 0.5, -1.75, 0, 1, 0)),
    "shifted": partial(_moved, matrix=(1, 0, -1, 0, 1, 0)),
    "noisy": _noisy,
}
SMOKE = ("left", "mirrored", "inverted")  # of the smoke world


def build(args: AtlasImageArguments) -> DatasetDict:
    """All splits, and `base` and `control`."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
    from PIL import Image as Picture
    from sklearn.datasets import load_digits

    from ..splits import sample
    from .images import class_rows

    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    groups = [hashlib.sha256(image.tobytes()).hexdigest()[:16] for image in images]
    parts = cut(groups, args.rows_seed)
    tasks = SMOKE if args.world == "smoke" else tuple(CHANGES)
    features = Features({
        "id": Value("string"), "group": Value("string"), "task": Value("string"), "image": Image(),
        "label": ClassLabel(names=list(NAMES)),
    })  # fmt: skip

    def rows(task: str, places: list[int]) -> list[dict[str, Any]]:
        change = CHANGES.get(task, np.array)
        return [
            {"id": f"{task}-{place}-{groups[place]}", "group": groups[place], "task": task,
             "label": int(labels[place]), "image": Picture.fromarray(np.ascontiguousarray(change(images[place])))}
            for place in places
        ]  # fmt: skip

    found = {
        split: [row for task in tasks for row in rows(task, sample(parts[split], limit, args.rows_seed))]
        for split, limit in args.limits().items()
    }
    found["base"] = rows(UPRIGHT, parts["train"])
    found["control"] = rows(UPRIGHT, sample(parts["test"], args.max_eval_rows, args.rows_seed))
    data = {split: Dataset.from_list(content, features) for split, content in found.items()}
    classes = [row for task in (*tasks, UPRIGHT) for row in class_rows(task, NAMES, TEMPLATES)]
    return DatasetDict(data | {"classes": Dataset.from_list(classes)})


def cut(groups: list[str], seed: int) -> dict[str, list[int]]:
    """Split -> the places of its images; equal images stay together."""
    order = sorted(set(groups))
    random.Random(seed).shuffle(order)
    owner: dict[str, str] = {}
    start = 0
    for number, (split, share) in enumerate(SHARES.items(), 1):
        stop = len(order) if number == len(SHARES) else start + round(share * len(order))
        owner |= dict.fromkeys(order[start:stop], split)
        start = stop
    return {split: [place for place, group in enumerate(groups) if owner[group] == split] for split in SHARES}
