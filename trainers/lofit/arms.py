"""LoFiT and the methods a user would try instead, each tuned on the same base with the same rows and loss."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .arguments import ArmArguments, arm_key, lora_targets
from .config import LofitConfig
from .iti import ItiProbe, iti_adapter, iti_probe
from .red import red_model, unload_red
from .selection import HeadSelection, grid, layer_matched_heads, learned_scores, random_heads, top_heads
from .stages import FINISHED, fit, fit_scales
from .trainer import LofitDPOConfig, LofitSFTConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arm:
    """One tuned model, valid until the iterator moves on.

    Attributes:
        name: "lofit", "random", ... ; with `k` and `draw` (0 where there is only one) it names the arm.
        seconds: of training, selection included.
    """

    name: str
    model: PeftModel
    trained: int
    seconds: float
    k: int | None = None
    draw: int = 0
    heads: list[tuple[int, int]] | None = None
    log: list[dict[str, float]] = field(default_factory=list)
    heads_again: list[tuple[int, int]] | None = None  # selected with another seed on the same base


def train_arms(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    args: LofitSFTConfig | LofitDPOConfig,
    arguments: ArmArguments,
    out_dir: Path,
    *,
    data_fingerprint: str,
    score: Callable[[PeftModel], float],
    other: tuple[Dataset, LofitSFTConfig | LofitDPOConfig] | None = None,
    done: Collection[str] = (),
) -> Iterator[Arm]:
    """Tune every arm in turn on one base.

    Args:
        base: wrapped for each arm and bare again after it.
        rows: training rows of the loss that `args` stands for.
        args: the trainer's arguments; `seed` also draws random heads.
        out_dir: one folder per arm; finished ones are loaded, interrupted ones continued.
        score: dev score of a model, higher is better; ITI chooses its strength by it.
        other: rows and arguments of the other loss, for the arm "other": the same heads, tuned with that loss.
        done: keys (`arm_key`) whose arms need not be made again.
    """
    seed = args.seed
    heads_per_layer = grid(base)

    def wanted(name: str, k: int | None = None, draw: int = 0) -> bool:
        return name in arguments.arms and arm_key(name, k, draw) not in done

    def offsets(heads: list[tuple[int, int]] | None) -> LofitConfig:
        return LofitConfig(heads=heads, init_std=arguments.init_std, task_type="CAUSAL_LM")

    def tune(
        name: str,
        config: PeftConfig | None,
        k: int | None = None,
        draw: int = 0,
        selected: float = 0.0,
        **changes: float,
    ) -> Iterator[Arm]:
        train_rows, train_args = other if name == "other" and other is not None else (rows, args)
        model = red_model(base) if name == "red" else base
        changes = {"l1_lambda": 0.0, "seed": seed, "learning_rate": args.learning_rate, **changes}
        result = fit(
            model, tokenizer, train_rows, train_args, out_dir / arm_key(name, k, draw), peft_config=config, **changes
        )
        heads = config.heads if isinstance(config, LofitConfig) else None
        yield Arm(name, result.model, result.trained, result.seconds + selected, k, draw, heads, result.log)
        if name == "red":
            unload_red(result.model)
        else:
            result.model.unload()

    selection_seconds = 0.0
    repeated: dict[int, list[float]] = {}
    arguments.check(base, sum(heads_per_layer.values()))
    ks = arguments.ks(sum(heads_per_layer.values()))
    if arguments.heads_file is not None:
        given = HeadSelection.load(arguments.heads_file)
        chosen = {given.k: given.heads}
    elif not {"lofit", "layer_matched", "other"} & set(arguments.arms):
        chosen = {k: [] for k in ks}  # no arm asks which heads were learned
    else:
        select = partial(
            fit_scales,
            base,
            tokenizer,
            rows,
            args,
            k=max(ks),
            data_fingerprint=data_fingerprint,
            init_std=arguments.init_std,
            learning_rate=arguments.selection_learning_rate,
            l1_lambda=args.l1_lambda,
        )
        selection = select(out_dir / "selection")
        if arguments.repeat_selection:
            repeated = select(out_dir / "selection_again", seed=seed + 10_000).scores
        selection_seconds = json.loads((out_dir / "selection" / FINISHED).read_text())["seconds"]
        chosen = {k: top_heads(selection.scores, k) for k in ks}

    for k, heads in chosen.items():
        if wanted("lofit", k):
            for arm in tune("lofit", offsets(heads), k, selected=selection_seconds):
                yield replace(arm, heads_again=top_heads(repeated, k)) if repeated else arm
    for k, heads in chosen.items():
        for draw in range(1, arguments.draws + 1):
            number = 1000 * seed + draw
            if wanted("random", k, draw):
                yield from tune("random", offsets(random_heads(heads_per_layer, k, number)), k, draw)
            if wanted("layer_matched", k, draw):
                yield from tune("layer_matched", offsets(layer_matched_heads(heads_per_layer, heads, number)), k, draw)

    main_k, main_heads = next(iter(chosen.items()))
    all_rate = arguments.all_heads_learning_rate or args.learning_rate
    if wanted("all"):
        yield from tune("all", offsets(None), learning_rate=all_rate)
    if wanted("offset_norm", main_k):
        everything = fit(
            base,
            tokenizer,
            rows,
            args,
            out_dir / arm_key("all"),
            peft_config=offsets(None),
            l1_lambda=0.0,
            seed=seed,
            learning_rate=all_rate,
        )  # loaded, where the arm "all" has just run
        norms = learned_scores(everything.model, "offset")
        everything.model.unload()
        yield from tune("offset_norm", offsets(top_heads(norms, main_k)), main_k, selected=everything.seconds)
    if other is not None and wanted("other", main_k):
        yield from tune("other", offsets(main_heads), main_k, selected=selection_seconds)
    if wanted("lora"):
        lora = LoraConfig(
            r=8, lora_alpha=16, target_modules=lora_targets(base.config.model_type), task_type="CAUSAL_LM"
        )
        yield from tune("lora", lora, learning_rate=arguments.lora_learning_rate)
    if wanted("red"):
        yield from tune("red", None, learning_rate=arguments.red_learning_rate)
    if wanted("iti_heads", main_k) or wanted("iti", main_k):
        pairs = [
            candidate for candidate in (rows, other[0] if other else rows) if "rejected" in candidate.column_names
        ]
        if not pairs:
            logger.warning("the ITI arms are left out: they need false answers, and these rows have none")
            return
        start = time.perf_counter()
        probe = probe_answers(base, tokenizer, pairs[0], seed)
        probe_seconds = time.perf_counter() - start
        heads = top_heads(probe.accuracy, main_k)
        if wanted("iti_heads", main_k):
            yield from tune("iti_heads", offsets(heads), main_k, selected=probe_seconds)
        if wanted("iti", main_k):
            yield from iti_arm(base, probe, heads, arguments.iti_alphas, score, probe_seconds)


def probe_answers(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Dataset, seed: int) -> ItiProbe:
    """ITI's probes on the right and the wrong answer of every question."""
    texts = [f"{row['prompt']}{row[column]}" for row in pairs for column in ("chosen", "rejected")]
    groups = [row["group"] for row in pairs for _ in range(2)]
    return iti_probe(base, tokenizer, texts, [1, 0] * len(pairs), groups, seed=seed)


def iti_arm(
    base: PreTrainedModel,
    probe: ItiProbe,
    heads: list[tuple[int, int]],
    alphas: list[float],
    score: Callable[[PeftModel], float],
    probe_seconds: float,
) -> Iterator[Arm]:
    """ITI on these heads, at the strength that scores best on dev."""
    start = time.perf_counter()
    results = {}
    for alpha in alphas:
        model = iti_adapter(base, probe, heads, alpha)
        results[alpha] = score(model)
        model.unload()
    model = iti_adapter(base, probe, heads, max(results, key=lambda alpha: results[alpha]))
    seconds = time.perf_counter() - start + probe_seconds
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log = [{"alpha": alpha, "dev": value} for alpha, value in results.items()]
    yield Arm("iti", model, trained, seconds, len(heads), 0, sorted(heads), log)
    model.unload()
