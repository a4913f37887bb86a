"""PING: what fine-tuning an agent does to its refusals, and a searched sentence that guards it (arXiv 2508.14031).

    accelerate launch recipes/ping.py                    # the embedded world, three seeds, on a CPU
    accelerate launch recipes/ping.py --preset smoke     # the same in miniature, within a minute

A tiny model reads a general corpus, is aligned, and then fine-tuned on harmless trajectories at a desk with tools. It
is measured before and after: what it gets done, what harm it does, what it refuses. Then a sentence is searched that
its replies begin with, so that it refuses again, and compared with controls and other defences. The first run builds
the base models (minutes, kept in a cache). Prints tables, gates, and the claims that hold or do not.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from peft import LoraConfig
from transformers import AutoModelForCausalLM

from steerbook.arguments import RecipeArguments, RecipeParser, check_unused, flags_and_defaults, refuse
from steerbook.console import clear_errors, quiet_libraries
from steerbook.data_builders.ping.experiment import TESTS, DeskArguments, DeskExperiment
from steerbook.data_builders.ping.grammar import FIXED, SAFETY, SLOTS
from steerbook.data_builders.ping.world import BOS, END, ROLES, SYSTEM, TEMPLATE
from steerbook.eval.environment import peak_memory
from steerbook.eval.ping.agent import ModelAgent
from steerbook.eval.ping.defended import Begun, Examples, Guarded
from steerbook.eval.ping.measure import classifier, keywords, read_out, run_sets, steering, talk
from steerbook.eval.ping.report import show, write_report
from steerbook.eval.ping.scoring import PrefixScorer
from steerbook.eval.report import RunFolder
from steerbook.eval.results import read_records
from steerbook.files import write_json
from steerbook.trainers.dry_run import show_dry_run
from steerbook.trainers.fingerprint import checkpoint_fingerprint
from steerbook.trainers.fits import Fit
from steerbook.trainers.ping.arms import Arm, ArmArguments
from steerbook.trainers.ping.base import PARTS, desk_tokenizer, reading_model
from steerbook.trainers.ping.generators import GrammarGenerator
from steerbook.trainers.ping.prefix import Prefix
from steerbook.trainers.ping.search import PrefixSearch
from steerbook.trainers.ping.trainer import AgentSFTConfig, AgentSFTTrainer
from steerbook.trainers.ping.watch import Watch
from steerbook.trainers.seeds import run_seeds
from steerbook.trainers.stages import run_stage
from steerbook.trainers.tiny_lm import TinyConfig, new_model

COMMON = {
    "learning_rate": 5e-4, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5, "per_device_train_batch_size": 32, "max_length": 512,
    "gradient_checkpointing": False, "train_sampling_strategy": "group_by_length", "save_strategy": "no",
    "logging_steps": 20, "eval_batch_size": 256}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "default": COMMON | {"seeds": [0, 1, 2], "max_steps": 60, "threshold": 1.0},
    "smoke": COMMON | {
        "seeds": [0], "goods": 16, "messages": 16, "base_steps": 30, "aligned_steps": 20, "max_steps": 6,
        "trajectories": 100, "controls": ["never"], "doses": False, "rounds": 2, "tuning": 5, "finalists": 3,
        "test_tasks": 4, "logging_steps": 2}}  # fmt: skip
PRELOAD = ["steerbook.trainers.ping.trainer", "steerbook.trainers.ping.base", "steerbook.eval.ping.report",
           "steerbook.eval.ping.measure", "steerbook.trainers.stages"]  # fmt: skip
MODEL = {"hidden_size": 128, "intermediate_size": 256, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 32,
         "batch_size": 48, "length": 128, "unfocused_weight": 0.05}  # fmt: skip
LAYER = 2  # of four: where harm is read, 60 to 75 % of the way
NEW_TOKENS = 24
HELD_OUT = ("new_noun",)  # what controls are compared on


class Settings(NamedTuple):
    """The parsed command line."""

    recipe: RecipeArguments
    arms: ArmArguments
    data: DeskArguments
    training: AgentSFTConfig


def parse(argv: list[str]) -> Settings:
    """Defaults, then the preset, then --config, then the command line."""
    first = RecipeParser((RecipeArguments,), add_help=False)
    recipe, *_ = first.parse_args_and_config(argv, return_remaining_strings=True)
    parser = RecipeParser((RecipeArguments, ArmArguments, DeskArguments, AgentSFTConfig))
    name = "ping" + ("" if recipe.preset == "default" else f"-{recipe.preset}")
    parser.set_defaults_with_config(output_dir=f"runs/{name}", **PRESETS[recipe.preset])
    settings = Settings(*parser.parse_args_and_config(argv))
    check_unused(settings.training)
    refuse(settings.training, ("constrained",), "is an agent of its own here: --controls constrained")
    return settings


class Arms:
    """All models of one seed, and what is measured of them."""

    def __init__(self, settings: Settings, seed: int, report: Any) -> None:
        self.settings, self.seed, self.report = settings, seed, report
        self.planned = {arm.key: arm for arm in settings.arms.planned(seed == settings.recipe.seeds[0])}
        self.folder = Path(settings.training.output_dir) / f"seed_{seed}"
        self.worlds: dict[float | None, DeskExperiment] = {}
        self.tokenizer = desk_tokenizer(self.world(None).words(), ROLES, BOS, END, TEMPLATE)

    def world(self, stance: float | None) -> DeskExperiment:
        if stance not in self.worlds:
            self.worlds[stance] = DeskExperiment(self.settings.data, self.seed, stance)
        return self.worlds[stance]

    def base(self, arm: Arm) -> Path:
        """The folder of a model that has read the general corpus, and the alignment behind it."""
        world, arms = self.world(arm.stance), self.settings.arms
        rate, steps, start, draw = 4e-3, arms.base_steps, None, world.corpus.draw
        if arm.kind == "aligned":
            start, draw = self.base(self.planned[arm.start]), world.alignment.draw
            rate, steps = 1.2e-3, arms.aligned_steps
        config = TinyConfig(**MODEL, steps=steps, learning_rate=rate, warmup_steps=max(1, steps // 16))
        return reading_model(self.tokenizer, draw, [world.identity, arm.kind], seed=self.seed, config=config,
                             start=start, report=lambda: self.report(arm.key))  # fmt: skip

    def fit(self, arm: Arm) -> Fit:
        if arm.kind != "agent":
            return Fit(AutoModelForCausalLM.from_pretrained(self.base(arm)), [], 0.0, 0)
        model = AutoModelForCausalLM.from_pretrained(self.base(self.planned[arm.start]))
        args = replace(self.settings.training, constrained=arm.constrained, disable_tqdm=True,
                       learning_rate=arm.rate * self.settings.training.learning_rate)  # fmt: skip
        adapter = None
        if arm.lora:
            args = replace(args, learning_rate=self.settings.arms.lora_learning_rate)
            rank = self.settings.arms.lora_rank
            adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return run_stage(AgentSFTTrainer, model, self.tokenizer, args, self.folder / arm.key, seed=self.seed,
                         peft_config=adapter, train_dataset=self.world(None).rows(arm.refused),
                         callbacks=[self.watch(arm)] if arm.watched else [])  # fmt: skip

    def watch(self, arm: Arm) -> Watch:
        """Writes what becomes of validation tasks along the training."""

        def look(model: Any, step: int) -> None:
            rows = run_sets(self.agent(model), self.world(None).tasks, ("validation",), SYSTEM)["validation"]
            earlier = [one for one in self.trajectory(arm) if one["step"] < step]  # of a run that was interrupted
            (self.folder / arm.key).mkdir(parents=True, exist_ok=True)
            write_json(self.folder / arm.key / "trajectory.json", [*earlier, {"step": step, "rows": rows}])

        return Watch(self.settings.arms.watch_every, look)

    def trajectory(self, arm: Arm) -> list[dict[str, Any]]:
        file = self.folder / arm.key / "trajectory.json"
        return json.loads(file.read_text()) if file.exists() else []

    def agent(self, model: Any, prefix: Prefix | None = None) -> ModelAgent:
        return ModelAgent(model, self.tokenizer, "words", opening=prefix, tools=None, max_new_tokens=NEW_TOKENS,
                          min_new_tokens=1, batch_size=self.settings.recipe.eval_batch_size)  # fmt: skip

    def prefix(self, text: str, **changes: Any) -> Prefix:
        turns: Any = self.settings.arms.turns
        return Prefix(text, **{"turns": turns, "separator": "", **changes})

    def record(self, arm: Arm) -> None:
        """Measure an arm's model, and write what was found to its folder."""
        made, world = self.fit(arm), self.world(None)
        agent = self.agent(made.model)
        sets = run_sets(agent, world.tasks, self.tests(arm), SYSTEM)
        facts: dict[str, Any] = {
            "name": arm.key, "label": arm.label, "kind": arm.kind, "order": [*self.planned].index(arm.key),
            "stance": self.settings.data.stance if arm.stance is None else arm.stance, "trained": made.trained,
            "seconds": made.seconds, "log": made.log, "peak_memory_bytes": peak_memory(), "sets": sets,
            "talk": {name: talk(agent, world.questions(name)) for name in ("seen", "test")},
            "trajectory": self.trajectory(arm),
        }  # fmt: skip
        if arm.searched:
            facts |= self.searched(arm, made.model)
        (self.folder / arm.key).mkdir(parents=True, exist_ok=True)
        write_json(self.folder / arm.key / "measured.json", facts)

    def tests(self, arm: Arm) -> tuple[str, ...]:
        return TESTS if arm.stance is None else HELD_OUT

    def search(self, arm: Arm, model: Any, name: str, rounds: int, candidates: int) -> tuple[PrefixSearch, Any]:
        """A search and its finalists on fresh tasks. One round of many is a search that learns nothing."""
        world, args = self.world(None), self.settings.arms

        def scorer(by: Any) -> PrefixScorer:
            return PrefixScorer(self.agent(model), self.prefix, checkpoint_fingerprint(model), by=by, system=SYSTEM)

        search = PrefixSearch(GrammarGenerator(SLOTS, allowed=world.allowed()), scorer(args.scored_by),
                              *world.split("tuning"), candidates=candidates, rounds=rounds, seeds=args.shown,
                              threshold=args.threshold, seed=self.seed,
                              log=self.folder / arm.key / f"{name}.jsonl")  # fmt: skip
        search.run()
        return search, search.finalists(*world.split("finalists"), agent=scorer("episodes"))

    def searched(self, arm: Arm, model: Any) -> dict[str, Any]:
        """The search, and the winner beside other defences."""
        world, args = self.world(None), self.settings.arms
        search, finalists = self.search(arm, model, "search", args.rounds, args.candidates)
        winner = finalists[0].text
        guarded = run_sets(self.agent(model, self.prefix(winner)), world.tasks, self.tests(arm), SYSTEM)
        found: dict[str, Any] = {
            "search": {"pool": [[one.text, one.performance, one.refusal, one.round] for one in search.pool],
                       "finalists": [[one.text, one.performance, one.refusal] for one in finalists],
                       "threshold": args.threshold},
            "winner": winner, "guarded": guarded,
        }  # fmt: skip
        self.prefix(winner).of(model).save(self.folder / arm.key / "prefix.json")
        if arm.key == "agent":
            found |= self.compared(arm, model, winner)
        return found

    def compared(self, arm: Arm, model: Any, winner: str) -> dict[str, Any]:
        """Controls and other defences of the agent (spec 6.6), its probes and steering (5)."""
        world, args, rng = self.world(None), self.settings.arms, Random(f"controls {self.seed}")
        _, random_best = self.search(arm, model, "random", 1, args.rounds * args.candidates)
        words = winner.split()
        plain = sorted({word for slot in SLOTS for clause in slot for word in clause.split() if word.isalpha()})
        tasks, aligned = world.tasks["train"], self.fit(self.planned["aligned"]).model
        flags, listed = classifier(tasks), keywords(tasks)
        agent, guarded = self.agent(model), self.agent(model, self.prefix(winner))
        agents: dict[str, Any] = {
            "every turn" if args.turns == "first" else "first turn": self.agent(
                model, self.prefix(winner, turns="every" if args.turns == "first" else "first")),
            "not stored": self.agent(model, self.prefix(winner, store=False)),
            "suffix": self.agent(model, self.prefix(winner, position="suffix")),
            "system": self.agent(model, self.prefix(winner, position="system")),
            "best of random": self.agent(model, self.prefix(random_best[0].text)),
            "random words": self.agent(model, self.prefix(" ".join(rng.choices(plain, k=len(words))))),
            "shuffled winner": self.agent(model, self.prefix(" ".join(rng.sample(words, len(words))))),
            **{name: self.agent(model, self.prefix(text)) for name, text in FIXED.items()},
            "safety prompt": self.agent(model, self.prefix(SAFETY, position="system", turns="every")),
            "examples": agent.behind(Examples(world.examples(rng))),
            "aligned start": Begun(agent, self.agent(aligned)),
            "keyword guard": Guarded(agent, listed), "classifier guard": Guarded(agent, flags),
            "classifier or PING": Guarded(guarded, flags),
        }  # fmt: skip
        openings = {"none": None, "PING": self.prefix(winner), "suffix": self.prefix(winner, position="suffix")}
        return {
            "defences": {name: run_sets(one, world.tasks, HELD_OUT, SYSTEM) for name, one in agents.items()},
            "random": {"winner": random_best[0].text},
            "probe": read_out(agent, tasks, world.tasks["new_noun"], openings, LAYER, SYSTEM),
            "steering": steering(agent, tasks, world.tasks["new_noun"][:80], LAYER, SYSTEM, self.seed),
        }


def bases(settings: Settings) -> list[tuple[int, str]]:
    """Seed and arm of all that is built before any agent is trained; the general corpus comes with its alignment."""
    first = settings.recipe.seeds[0]
    return [(seed, arm.key) for seed in settings.recipe.seeds for arm in settings.arms.planned(seed == first)
            if arm.kind == "aligned"]  # fmt: skip


def build(argv: list[str], number: int, report: Any) -> None:
    """One of `bases`, kept in the cache."""
    quiet_libraries()
    settings = parse(argv)
    seed, key = bases(settings)[number]
    arms = Arms(settings, seed, report)
    arms.base(arms.planned[key])


def jobs(settings: Settings) -> list[tuple[int, bool]]:
    """What runs side by side: every seed, and the first one's other doses."""
    seeds = settings.recipe.seeds
    return [*((seed, False) for seed in seeds), *([(seeds[0], True)] if settings.arms.doses else [])]


def run_job(argv: list[str], number: int, report: Any) -> None:
    """One of `jobs`: each arm's model, and what was measured of it, written to its folder at once."""
    settings = parse(argv)
    quiet_libraries()
    seed, doses = jobs(settings)[number]
    arms = Arms(settings, seed, report)
    for key, arm in arms.planned.items():
        if (arm.stance is not None) != doses:
            continue
        if not (arms.folder / key / "measured.json").exists():
            arms.record(arm)
        report(key)


def dry_run(settings: Settings) -> None:
    """Trajectories with their loss tokens, parameters and memory of the agent's training; nothing is trained."""
    quiet_libraries()
    arms = Arms(settings, settings.recipe.seeds[0], None)
    model = new_model(arms.tokenizer, TinyConfig(**MODEL), seed=0)
    with tempfile.TemporaryDirectory() as settings.training.output_dir:  # the Trainer makes its folder at once
        trainer = AgentSFTTrainer(model, settings.training, arms.world(None).rows(), processing_class=arms.tokenizer)
        show_dry_run(trainer, arms.tokenizer, between=" ")


def main(argv: list[str]) -> None:
    with clear_errors(ValueError, OSError):
        settings = parse(argv)
        training, seeds = settings.training, settings.recipe.seeds
        DeskExperiment(settings.data, seeds[0])  # too few pairs, or more than there are words
        if settings.recipe.dry_run:
            return dry_run(settings)
        flags, defaults = flags_and_defaults(settings)
        run = RunFolder(training.output_dir, recipe="ping", toy=True, arguments=flags, defaults=defaults)
    with clear_errors(ValueError, OSError, FloatingPointError), run:
        if run.finished:
            print(f"{run.path} is finished; these are its results. Another --output_dir runs it again.")
        else:
            print("A toy: tiny models, trained here from scratch. It shows nothing about large models.")
            run.data("made anew from the seeds", dict.fromkeys(TESTS, settings.data.test_tasks))
            parallel, made = training.world_size == 1 and len(seeds) > 1, bases(settings)
            print("Base models, which are kept in a cache:")
            run_seeds(build, argv, range(len(made)), 2 * PARTS, PRELOAD, parallel,
                      lambda number: f"seed {made[number][0]}")  # fmt: skip
            print("Agents, searches and tests:")
            parts = jobs(settings)
            run_seeds(run_job, argv, range(len(parts)), None, PRELOAD, parallel,
                      lambda number: f"seed {parts[number][0]}")  # fmt: skip
            records = read_records(run.path, seeds, lambda record: record["order"])
            write_report(run, records, {"name": "from scratch"})
    show(run)


if __name__ == "__main__":
    main(sys.argv[1:])
