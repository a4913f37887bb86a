"""aTLAS on CLIP, where it comes from: one coefficient per parameter block and task vector (arXiv 2407.02880).

    accelerate launch recipes/atlas_clip.py                              # real digits, tiny CLIP, CPU, offline
    accelerate launch recipes/atlas_clip.py --preset smoke               # the same in miniature
    accelerate launch recipes/atlas_clip.py --config recipes/configs/atlas/clip_vit_b32.yaml
    accelerate launch --num_processes 8 recipes/atlas_clip.py --base openai/clip-vit-base-patch32 \\
        --task_vectors cars=FOLDER_OR_HUB_ID mnist=FOLDER_OR_HUB_ID --tasks cars=FOLDER mnist=owner/name

Composes image towers that were fine-tuned from one CLIP, each against the frozen text features of its classes, and
beside that runs what one would try instead (--arms), on these questions (--sections): all tasks at once, few images a
class, new tasks (whose own vector is left out) from few images, and from images without labels. Prints a table for
each with intervals, and the claims that hold or do not. The trainer's flags are transformers'; --config FILE.yaml
holds the same flags, --dry_run shows data, memory and what a step moves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from transformers import set_seed

from steerbook.arguments import RecipeArguments, RecipeParser, flags_and_defaults
from steerbook.console import clear_errors, quiet_libraries, run_main
from steerbook.data_builders.atlas import images
from steerbook.data_builders.atlas.images import AtlasImageArguments
from steerbook.data_builders.rows import fingerprint
from steerbook.eval.atlas import classify, disentanglement, predicted
from steerbook.eval.atlas.images import image_claims
from steerbook.eval.atlas.report import read_records, show, write_report
from steerbook.eval.atlas.summary import Results
from steerbook.eval.environment import peak_memory
from steerbook.eval.report import RunFolder
from steerbook.eval.sharding import shared_out
from steerbook.trainers.atlas.arguments import arm_key
from steerbook.trainers.atlas.checks import check_launch, check_vectors
from steerbook.trainers.atlas.dry_run import check_engine, dense_composing, show_composing
from steerbook.trainers.atlas.image_arms import SECTIONS, ImageArmArguments, ImageBench
from steerbook.trainers.atlas.image_stages import (
    fine_tune,
    fit_coefficients,
    given_image_vectors,
    image_vectors,
    load_clip,
)
from steerbook.trainers.atlas.images import AtlasImageConfig
from steerbook.trainers.atlas.zero_shot import ZeroShot
from steerbook.trainers.dry_run import launch_of, show_memory
from steerbook.trainers.processes import of_main
from steerbook.trainers.seeds import run_seeds
from steerbook.trainers.tiny_clip import TinyClipConfig, tiny_clip
from steerbook.trainers.training import anew

# Chosen on dev images with the seeds 10 to 12; those reported are 0 to 2. Crops are for photographs: of a digit of
# 8 x 8 pixels, a part is another digit, as is its mirror image.
DIGITS = {
    "max_steps": 150, "per_device_train_batch_size": 128, "crop_scale": 1.0, "flip": False, "save_strategy": "no",
    "joint_learning_rate": 3e-3, "shot_learning_rate": 1e-3, "adamerging_learning_rate": 1e-2, "shot_steps": 30,
    "isotropic_learning_rate": 0.03, "targets": ["mirrored", "sheared", "noisy"],
    "adaptation_steps": 30, "adaptation_learning_rate": 3e-3, "norms_learning_rate": 1e-3, "strong_crop": 0.7,
    "logging_steps": 10, "eval_batch_size": 512,
}  # fmt: skip
PRESETS: dict[tuple[bool, str], dict[str, Any]] = {  # (embedded digits?, preset)
    (True, "default"): DIGITS | {"seeds": [0, 1, 2]},
    (True, "smoke"): DIGITS | {
        "world": "smoke", "max_steps": 30, "sections": ["addition", "adaptation"], "targets": ["mirrored"],
        "adaptation_steps": 10, "arms": ["tuned", "alpha", "isotropic", "atlas", "joint", "ufm"]},
    (False, "default"): {"save_strategy": "epoch", "save_total_limit": 2},
    (False, "smoke"): {"max_steps": 2, "shot_steps": 2, "adaptation_steps": 2, "max_fit_rows": 16, "max_eval_rows": 8,
                       "per_device_train_batch_size": 8, "save_strategy": "no"},
}  # fmt: skip
TINY_STEPS = {"default": 200, "smoke": 120}
MAKING = {"default": 100, "smoke": 60}  # steps of a task vector
PRELOAD = ["steerbook.trainers.atlas.image_arms", "steerbook.eval.atlas.report", "steerbook.trainers.tiny_clip"]


@dataclass
class BaseArguments:
    """Where base and task vectors come from. Without them: a tiny CLIP, whose vectors are made here."""

    base: str | None = field(default=None, metadata={"help": "The base CLIP, a folder or Hub id (safetensors)."})
    base_revision: str | None = field(default=None, metadata={"help": "Its branch, tag or commit on the Hub."})
    task_vectors: list[str] | None = field(
        default=None,
        metadata={"help": "Fine-tuned image towers or CLIPs (folders, Hub ids), saved vectors, as name=PATH; where "
                  "the name is that of a task, the vector counts as that task's."},
    )  # fmt: skip


class Settings(NamedTuple):
    """The parsed command line."""

    recipe: RecipeArguments
    arms: ImageArmArguments
    data: AtlasImageArguments
    base: BaseArguments
    training: AtlasImageConfig


def parse(argv: list[str]) -> Settings:
    """Defaults, then the preset, then --config, then the command line."""
    first = RecipeParser((RecipeArguments, AtlasImageArguments), add_help=False)
    recipe, data, *_ = first.parse_args_and_config(argv, return_remaining_strings=True)
    parser = RecipeParser((RecipeArguments, ImageArmArguments, AtlasImageArguments, BaseArguments, AtlasImageConfig))
    name = "atlas-clip" + ("-digits" if data.tasks is None else "") + ("-smoke" if recipe.preset == "smoke" else "")
    parser.set_defaults_with_config(output_dir=f"runs/{name}", **PRESETS[data.tasks is None, recipe.preset])
    settings = Settings(*parser.parse_args_and_config(argv))
    given = [settings.base.base, settings.base.task_vectors, settings.data.tasks]
    if any(value is None for value in given) and not all(value is None for value in given):
        raise ValueError("--base, --task_vectors and --tasks go together; without any of them it is about the digits")
    for flag in ("ufm", "entropy_below", "resume_from_checkpoint"):
        if getattr(settings.training, flag):
            raise ValueError(f"--{flag} has no effect here: --arms says what is learned, and how")
    if settings.training.seed != 42:
        raise ValueError(f"--seed {settings.training.seed} has no effect; use --seeds {settings.training.seed}")
    check_launch(settings.training, toy=settings.base.base is None)
    return settings


def load(settings: Settings, data: Any, seed: int, keep_in: Path | None = None) -> Any:
    """The base, and what makes a classifier of it."""
    prompts = images.prompts(data["classes"])

    def tiny() -> Path:
        rows = data["base"]
        texts = [prompts[task][label] for task, label in zip(rows["task"][:], rows["label"][:], strict=True)]
        steps = 0 if settings.recipe.dry_run else TINY_STEPS[settings.data.world]
        bar = len(settings.recipe.seeds) == 1  # several seeds train theirs side by side
        return tiny_clip(rows["image"][:], texts, seed=seed, config=TinyClipConfig(steps=steps), progress=bar)

    set_seed(seed)
    where = settings.base
    clip, tokenizer, processor = load_clip(where.base, where.base_revision, tiny, keep_in, settings.training.device)
    return clip, ZeroShot.from_prompts(clip, tokenizer, processor, prompts)


def load_vectors(settings: Settings, data: Any, clip: Any, zero_shot: ZeroShot, seed: int, report: Any) -> Any:
    """Name -> vector."""
    if settings.base.task_vectors is not None:
        return given_image_vectors(clip, settings.base.task_vectors)
    dry = settings.recipe.dry_run  # one step, without warm-up: a vector of zeros would be refused
    steps, warmup = (1, 0) if dry else (MAKING[settings.data.world], 10)
    args = anew(settings.training, max_steps=steps, warmup_steps=warmup, weight_decay=0.05, seed=seed)
    content = fingerprint(images.without_images(data)["train"])
    return image_vectors(clip, zero_shot, data["train"], content, args, 2e-3, lambda task: report(f"vector {task}"))


def run_seed(argv: list[str], seed: int, report: Any) -> None:
    """Everything for one seed: base, vectors, arms, and what each scores, written as soon as it is there."""
    settings = parse(argv)
    training, toy = settings.training, settings.base.base is None
    training.seed = seed
    if toy:  # one bar stands for all arms and seeds
        quiet_libraries()
        training.disable_tqdm = True
    folder = Path(training.output_dir) / f"seed_{seed}"
    data = images.build(images.of_seed(settings.data, seed))
    clip, zero_shot = load(settings, data, seed, folder)
    vectors = load_vectors(settings, data, clip, zero_shot, seed, report)
    tasks = list(dict.fromkeys(data["test"]["task"][:]))
    known = [task for task in tasks if task in vectors]
    if not known:
        raise ValueError(f"no task vector is called like a task: {', '.join(vectors)} and {', '.join(tasks)}")

    def measured(model: Any, rows: Any) -> Any:
        def work(places: Any) -> list[Any]:
            return list(zero_shot.logits(model, rows.select(places), settings.recipe.eval_batch_size))

        return classify(rows.remove_columns("image"), shared_out(range(len(rows)), work))

    def score(model: Any, rows: Any) -> tuple[float, float]:
        metrics = measured(model, rows)["metrics"]
        return metrics["accuracy"]["value"], metrics["nats_per_token"]["value"]

    bench = ImageBench(
        clip, zero_shot, known, vectors, {}, data["fit"], data["dev"], training,
        anew(training, weight_decay=0.05), settings.arms, folder, score,
        of_main(lambda: {file.parent.name for file in folder.glob("*/measured.json")}), fit_coefficients, fine_tune,
        unlabelled=data["test"], few_shot=partial(images.few_shot, seed=seed),
    )  # fmt: skip
    for key in sorted(bench.done):
        report(f"{key} (measured before)")
    for section in settings.arms.sections:
        for arm in SECTIONS[section](bench):
            splits = {
                "test": measured(arm.model, bench.tasks(data["test"], [arm.task] if arm.task else known))["samples"]
            }
            if "control" in data and arm.name != "tuned" and section in ("addition", "adaptation"):
                splits["upright"] = measured(arm.model, data["control"])["samples"]
            facts = {"peak_memory_bytes": peak_memory(), "splits": splits}
            if arm.key == arm_key("addition", "atlas") and len(known) > 1:
                own = {task: bench.tasks(data["dev"], [task]) for task in known}
                pairs = arm.pairs(known, lambda model, task: predicted(measured(model, own[task])["samples"]))  # noqa: B023
                facts |= {"disentanglement": disentanglement(pairs)["matrix"], "disentanglement_tasks": known}
            arm.record(folder, **facts)
            report(arm.key)


def main(argv: list[str]) -> None:
    with clear_errors(ValueError, OSError):
        settings = parse(argv)
        training, seeds = settings.training, settings.recipe.seeds
        toy = settings.base.base is None
        if toy:
            quiet_libraries()
            training.disable_tqdm = True
        data = [images.build(images.of_seed(settings.data, seed)) for seed in seeds]
        counts = {split: len(rows) for split, rows in data[0].items()}
        if settings.recipe.dry_run:
            check_engine(launch_of(training, settings.recipe.dry_engine).engine, low_rank=False)
            clip, zero_shot = load(settings, data[0], seeds[0])
            vectors = load_vectors(settings, data[0], clip, zero_shot, seeds[0], lambda text: None)
            print(", ".join(f"{split} {count}" for split, count in counts.items()))
            for row in data[0]["classes"].select(range(3)):
                print(f"  {row['task']} {row['label']}: {' | '.join(row['prompts'])}")
            composing = dense_composing(clip, list(vectors.values()), settings.arms)
            tokens = clip.vision_model.embeddings.num_positions
            show_memory(clip, training, training.per_device_train_batch_size, tokens, composition=composing.memory,
                        **settings.recipe.plan)  # fmt: skip
            return show_composing(composing)
        contents = "embedded"
        if not toy:  # NaN and zero vectors are found before any time is spent
            clip, *_ = load_clip(settings.base.base, settings.base.base_revision, Path)
            vectors = given_image_vectors(clip, settings.base.task_vectors or [])
            contents = check_vectors(settings.arms, vectors, quantised=False)
        flags, defaults = flags_and_defaults(settings)
        run = RunFolder(training.output_dir, recipe="atlas_clip", toy=toy, arguments=flags, defaults=defaults)
    with clear_errors(ValueError, OSError, FloatingPointError), run:
        rows = [fingerprint(images.without_images(one))[:12] for one in data]
        run.data("-".join([*rows, contents[:12]]), counts)
        if run.finished:
            print(f"{run.path} is finished; these are its results. Another --output_dir runs it again.")
        else:
            if toy:
                print(
                    "A toy: tiny CLIPs on 8 x 8 digits, trained here and cached. It shows nothing about large models."
                )
            run_seeds(run_seed, argv, seeds, None, PRELOAD, parallel=toy and training.world_size == 1)
            base = {"name": "tiny_clip", "folder": f"seed_{seeds[0]}/base_model"} if toy else {
                "name": settings.base.base, "revision": settings.base.base_revision}  # fmt: skip
            records = read_records(run.path, seeds)
            write_report(run, records, base)
            run.update(claims=image_claims(Results(records)))
    show(run)


if __name__ == "__main__":
    run_main(main)
