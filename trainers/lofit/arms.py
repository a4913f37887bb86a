"""LoFiT and the methods a user would try instead, each tuned on the same base with the same rows and loss."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import LofitConfig
from .iti import ItiProbe, iti_adapter, iti_probe
from .red import MLP_OUTPUTS, red_model
from .selection import HeadSelection, check_k, grid, layer_matched_heads, learned_scores, random_heads, top_heads
from .stages import FINISHED, fit, fit_scales
from .trainer import LofitDPOConfig, LofitSFTConfig

logger = logging.getLogger(__name__)

DRAWN = ("random", "layer_matched")
ARMS = ("lofit", "random", "layer_matched", "offset_norm", "iti_heads", "all", "other", "iti", "lora", "red")


@dataclass
class ArmArguments:
    """Which arms to run, on how many heads, with which arguments. The trainer's `learning_rate` is the offsets'."""

    arms: list[str] = field(
        default_factory=lambda: list(ARMS), metadata={"help": f"Which methods to run: {', '.join(ARMS)}."}
    )
    heads_percent: list[float] = field(
        default_factory=lambda: [10.0, 2.0],
        metadata={"help": "How many heads, in per cent; the first is the main one."},
    )
    k: list[int] | None = field(default=None, metadata={"help": "How many heads, as numbers instead of per cent."})
    heads_file: str | None = field(default=None, metadata={"help": "A heads.json to use; nothing is selected then."})
    draws: int = field(default=3, metadata={"help": "Random choices of heads, for each number of heads."})
    init_std: float = field(default=1e-3, metadata={"help": "Standard deviation of initial scales and offsets."})
    selection_learning_rate: float = field(
        default=5e-3, metadata={"help": "Learning rate of the scales (stage 1; --l1_lambda is their penalty)."}
    )
    all_heads_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of offsets on all heads; default: that of the few."}
    )
    lora_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the LoRA baseline."})
    red_learning_rate: float = field(default=1e-2, metadata={"help": "Learning rate of the RED baseline."})
    iti_alphas: list[float] = field(
        default_factory=lambda: [2.0, 5.0, 10.0, 15.0, 20.0], metadata={"help": "ITI's strengths, chosen on dev."}
    )

    def __post_init__(self) -> None:
        unknown = sorted(set(self.arms) - set(ARMS))
        if unknown:
            raise ValueError(f"unknown arm {unknown[0]!r} in --arms; known: {', '.join(ARMS)}")
        if self.draws < 1:
            raise ValueError(f"--draws {self.draws}: random heads need at least one draw")
        if not self.heads_percent or not all(0 < percent <= 100 for percent in self.heads_percent):
            raise ValueError(f"--heads_percent {self.heads_percent}: give percentages above 0 and up to 100")
        if self.heads_file is not None and not Path(self.heads_file).is_file():
            raise FileNotFoundError(
                f"--heads_file {self.heads_file}: no such file; a run writes seed_N/selection/heads.json"
            )
        if self.heads_file is not None:
            HeadSelection.load(self.heads_file)

    def ks(self, total: int) -> list[int]:
        """Numbers of heads for a model with `total` heads; ValueError where there are not that many."""
        ks = self.k or [max(1, round(total * percent / 100)) for percent in self.heads_percent]
        if self.heads_file is not None:
            ks = [HeadSelection.load(self.heads_file).k]
        for k in ks:
            check_k(k, total)
        return list(dict.fromkeys(ks))

    def check(self, base: PreTrainedModel, total: int) -> None:
        """Before anything is measured: enough heads, given ones selected on this base, baselines that can be built.

        Raises:
            ValueError: something of this does not hold, with the way out.
        """
        self.ks(total)
        model_type = base.config.model_type
        known = {"lora": lora_targets(model_type) is not None, "red": model_type in MLP_OUTPUTS}
        for name, possible in known.items():
            if name in self.arms and not possible:
                rest = " ".join(arm for arm in self.arms if known.get(arm, True))
                raise ValueError(f"the arm {name} does not know {model_type!r} models; leave it out: --arms {rest}")
        if self.heads_file is not None:
            HeadSelection.load(self.heads_file).check_base(base)

    def keys(self) -> list[str]:
        """The keys (`arm_key`) of all arms, with placeholders for the numbers of heads."""
        numbers = list(range(len(self.k or self.heads_percent))) if self.heads_file is None else [0]
        keys = []
        for name in self.arms:
            for k in numbers if name in ("lofit", *DRAWN) else numbers[:1]:
                keys += [arm_key(name, k, draw + 1) for draw in range(self.draws if name in DRAWN else 1)]
        return keys


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


def lora_targets(model_type: str) -> list[str] | None:
    """The query and value projections (the paper's LoRA), or None where they are not known."""
    fused = {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"], "phi3": ["qkv_proj"]}
    known = model_type in MLP_OUTPUTS or model_type in ("gemma3", "granite")
    return fused.get(model_type) or (["q_proj", "v_proj"] if known else None)


def arm_key(name: str, k: int | None = None, draw: int = 0) -> str:
    """`random_k5_draw1`: the arm's folder and its key in the results."""
    return name + (f"_k{k}" if k is not None else "") + (f"_draw{draw}" if draw else "")


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
        result.model.unload()

    selection_seconds = 0.0
    arguments.check(base, sum(heads_per_layer.values()))
    ks = arguments.ks(sum(heads_per_layer.values()))
    if arguments.heads_file is not None:
        given = HeadSelection.load(arguments.heads_file)
        chosen = {given.k: given.heads}
    elif not {"lofit", "layer_matched", "other"} & set(arguments.arms):
        chosen = {k: [] for k in ks}  # no arm asks which heads were learned
    else:
        selection = fit_scales(
            base,
            tokenizer,
            rows,
            args,
            out_dir / "selection",
            k=max(ks),
            data_fingerprint=data_fingerprint,
            init_std=arguments.init_std,
            learning_rate=arguments.selection_learning_rate,
            l1_lambda=args.l1_lambda,
        )
        selection_seconds = json.loads((out_dir / "selection" / FINISHED).read_text())["seconds"]
        chosen = {k: top_heads(selection.scores, k) for k in ks}

    for k, heads in chosen.items():
        if wanted("lofit", k):
            yield from tune("lofit", offsets(heads), k, selected=selection_seconds)
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
