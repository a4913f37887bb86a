"""PING: what fine-tuning an agent does to its refusals, and a searched sentence that guards it (arXiv 2508.14031).

    accelerate launch recipes/ping.py                    # the embedded world, three seeds, on a CPU
    accelerate launch recipes/ping.py --preset smoke     # the same in miniature, within a minute
    accelerate launch recipes/ping.py --config recipes/configs/ping/qwen25_7b.yaml    # a pretrained model

An agent is fine-tuned on harmless trajectories, and measured before and after at an offline desk with tools: what it
gets done, what harm it does, what it refuses. Then a sentence is searched that its replies begin with, so that it
refuses again, and compared with controls and other defences. The model is a tiny one that is made here (it reads a
general corpus and is aligned first; minutes, kept in a cache), or with --model_name_or_path one that has a chat
template: fine-tuned on trajectories at the desk or on a public set (--dataset). Every flag of TRL's trainer works.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from trl import ModelConfig

from steerbook.arguments import RecipeArguments, RecipeParser, check_unused, flags_and_defaults, refuse
from steerbook.console import clear_errors, quiet_libraries, run_main
from steerbook.data_builders.ping import PingDataArguments
from steerbook.data_builders.ping.desk import TOOLS
from steerbook.data_builders.ping.experiment import EMBEDDED, TESTS, DeskArguments, DeskExperiment
from steerbook.data_builders.ping.office_experiment import OfficeExperiment
from steerbook.data_builders.ping.world import BOS, END, ROLES, TEMPLATE
from steerbook.eval.environment import peak_memory
from steerbook.eval.ping.agent import ModelAgent, form_of
from steerbook.eval.ping.controls import controls
from steerbook.eval.ping.measure import inside, run_all, talk
from steerbook.eval.ping.report import show, write_report
from steerbook.eval.ping.scoring import PrefixScorer
from steerbook.eval.report import RunFolder
from steerbook.eval.results import read_records
from steerbook.files import write_json
from steerbook.trainers.dry_run import show_dry_run
from steerbook.trainers.fingerprint import checkpoint_fingerprint
from steerbook.trainers.fits import Fit
from steerbook.trainers.ping.arms import Arm, ArmArguments
from steerbook.trainers.ping.base import PARTS, desk_tokenizer, size
from steerbook.trainers.ping.generators import GrammarGenerator, words_of
from steerbook.trainers.ping.options import PRETRAINED, WORLD, PretrainedArguments, SearchArguments, check
from steerbook.trainers.ping.prefix import Prefix
from steerbook.trainers.ping.search import PrefixSearch
from steerbook.trainers.ping.sides import Pretrained, Tiny
from steerbook.trainers.ping.trainer import AgentSFTConfig, AgentSFTTrainer, check_rows
from steerbook.trainers.ping.watch import Watch, watched
from steerbook.trainers.processes import of_main
from steerbook.trainers.seeds import run_seeds
from steerbook.trainers.stages import run_stage
from steerbook.trainers.tiny_lm import new_model

COMMON = {
    "learning_rate": 5e-4, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5, "max_steps": 60,
    "per_device_train_batch_size": 16, "max_length": 512, "gradient_checkpointing": False,
    "train_sampling_strategy": "group_by_length", "save_strategy": "no", "logging_steps": 20,
    "turns": "first", "threshold": 1.0, "watch_every": 15, "eval_batch_size": 256}  # fmt: skip
PRESETS: dict[tuple[bool, str], dict[str, Any]] = {  # (embedded world?, preset)
    (True, "default"): COMMON | {"seeds": [0, 1, 2]},
    (True, "smoke"): COMMON | {
        "seeds": [0], "goods": 16, "messages": 16, "base_steps": 30, "aligned_steps": 20, "max_steps": 6,
        "trajectories": 100, "controls": ["never"], "doses": False, "rounds": 2, "tuning": 5, "finalists": 3,
        "validation": 3, "test_tasks": 4, "watch_every": 3, "logging_steps": 2},
    (False, "default"): {"save_strategy": "no", "logging_steps": 10},
    (False, "smoke"): {
        "tasks": 20, "max_steps": 2, "per_device_train_batch_size": 2, "rounds": 1, "candidates": 2, "tuning": 2,
        "finalists": 2, "validation": 2, "test_tasks": 2, "max_new_tokens": 16, "logging_steps": 1,
        "save_strategy": "no"}}  # fmt: skip
PRELOAD = ["steerbook.trainers.ping.trainer", "steerbook.trainers.ping.base", "steerbook.eval.ping.report",
           "steerbook.eval.ping.controls", "steerbook.trainers.stages"]  # fmt: skip
HELD_OUT = ("new_noun",)  # what controls are compared on


class Settings(NamedTuple):
    """The parsed command line."""

    recipe: RecipeArguments
    arms: ArmArguments
    search: SearchArguments
    data: DeskArguments
    rows: PingDataArguments
    pretrained: PretrainedArguments
    training: AgentSFTConfig
    model: ModelConfig

    @property
    def toy(self) -> bool:
        return self.model.model_name_or_path is None


def parse(argv: list[str]) -> Settings:
    """Defaults, then the preset, then --config, then the command line."""
    first = RecipeParser((RecipeArguments, ModelConfig), add_help=False)
    recipe, model, *_ = first.parse_args_and_config(argv, return_remaining_strings=True)
    toy = model.model_name_or_path is None
    parser = RecipeParser((RecipeArguments, ArmArguments, SearchArguments, DeskArguments, PingDataArguments,
                           PretrainedArguments, AgentSFTConfig, ModelConfig))  # fmt: skip
    name = "ping" + ("" if recipe.preset == "default" else f"-{recipe.preset}")
    parser.set_defaults_with_config(output_dir=f"runs/{name}", **PRESETS[toy, recipe.preset])
    settings = Settings(*parser.parse_args_and_config(argv))
    check_unused(settings.training)
    refuse(settings.rows, ("rows_seed", "refusals"), "has no effect here: give --seeds and --controls mixed")
    refuse(*((settings.rows, vars(settings.rows), PRETRAINED) if toy else (settings.data, EMBEDDED, WORLD)))
    check(settings.arms, settings.search, settings.pretrained, settings.training, settings.model)
    return settings


class Arms:
    """All models of one seed, and what is measured of them."""

    def __init__(self, settings: Settings, seed: int, report: Any = None) -> None:
        self.settings, self.seed = settings, seed
        self.folder = Path(settings.training.output_dir) / f"seed_{seed}"
        if not settings.toy:
            self.data: Any = OfficeExperiment(settings.data, settings.rows, seed)
            self.side: Any = Pretrained(settings.arms, settings.model, settings.training, settings.pretrained,
                                        settings.search, form_of)  # fmt: skip
            return
        self.data = world = DeskExperiment(settings.data, seed)

        def stages(arm: Arm) -> Any:
            dosed = world if arm.stance is None else DeskExperiment(settings.data, seed, arm.stance)
            return (dosed.alignment if arm.kind == "aligned" else dosed.corpus).draw, dosed.identity

        tokenizer = desk_tokenizer(world.words(), ROLES, BOS, END, TEMPLATE)
        grammar = GrammarGenerator(world.slots, allowed=world.allowed())
        self.side = Tiny(settings.arms, seed, tokenizer, stages, grammar, report, settings.training.device)

    def fit(self, arm: Arm) -> Fit:
        if arm.kind != "agent":
            return Fit(self.side.model(arm), [], 0.0, 0)
        model, training = self.side.model(self.side.planned[arm.start]), self.settings.training
        rate = self.settings.arms.lora_learning_rate if arm.lora else arm.rate * training.learning_rate
        args = replace(training, constrained=arm.constrained, learning_rate=rate)
        args.disable_tqdm = args.disable_tqdm or self.settings.toy  # one bar stands for all
        options: dict[str, Any] = {"train_dataset": self.data.rows(arm.refused), "peft_config": self.side.adapter(arm)}
        if training.eval_strategy != "no" and not self.settings.toy:
            options["eval_dataset"] = self.data.built["dev"]
        if arm.watched and self.settings.arms.watch_every:
            options["callbacks"] = [Watch(self.settings.arms.watch_every, self.folder / arm.key, self.validate)]
        return run_stage(AgentSFTTrainer, model, self.side.tokenizer, args, self.folder / arm.key, seed=self.seed,
                         merged=self.side.merged, **options)  # fmt: skip

    def validate(self, model: Any) -> Any:
        return self.outcomes([self.agent(model)], ("validation",))["validation"]

    def agent(self, model: Any) -> ModelAgent:
        return ModelAgent(model, self.side.tokenizer, tools=None if self.settings.toy else TOOLS,
                          batch_size=self.settings.recipe.eval_batch_size, **self.side.speaks)  # fmt: skip

    def prefix(self, text: str, **changes: Any) -> Prefix:
        lead = self.side.lead if changes.get("position", "prefix") == "prefix" else ""
        return Prefix(lead + text, **{"turns": self.settings.search.turns, "separator": self.side.separator} | changes)

    def outcomes(self, agents: list[Any], sets: tuple[str, ...]) -> dict[str, Any]:
        return run_all(agents, self.data.tasks, sets, self.data.system)

    def check(self) -> Any:
        """The data. ValueError, before any time is spent, for a model that cannot be trained or measured on them."""
        if not self.settings.toy:
            agent = self.agent(self.side.model(self.side.planned["aligned"]))
            for arm in self.side.planned.values():
                check_rows(self.side.tokenizer, self.data.rows(arm.refused))
            agent.check([task.request for task in self.data.tasks["train"]])
        return self.data

    def record(self, arm: Arm) -> None:
        """Measure an arm's model, and write what was found to its folder."""
        made, tests = self.fit(arm), TESTS if arm.stance is None else HELD_OUT
        agent = self.agent(made.model)
        facts: dict[str, Any] = {
            "name": arm.key, "label": arm.label, "kind": arm.kind, "order": [*self.side.planned].index(arm.key),
            "stance": self.settings.data.stance if arm.stance is None else arm.stance, "trained": made.trained,
            "seconds": made.seconds, "log": made.log, "peak_memory_bytes": peak_memory(),
            "sets": self.outcomes([agent], tests), "trajectory": watched(self.folder / arm.key),
        }  # fmt: skip
        if self.settings.toy:
            facts["talk"] = {name: talk(agent, self.data.questions(name)) for name in ("seen", "test")}
        if arm.searched:
            facts |= self.searched(arm, made.model, tests)
        write_json(self.folder / arm.key / "measured.json", facts)

    def search(self, arm: Arm, model: Any, generator: Any, name: str, threshold: float) -> Any:
        """A search and its finalists on fresh tasks. Behind a threshold that nothing reaches it learns nothing."""
        args, key = self.settings.search, checkpoint_fingerprint(model)

        def scorer(by: Any) -> PrefixScorer:
            return PrefixScorer(self.agent(model), self.prefix, key, by=by, system=self.data.system)

        search = PrefixSearch(generator, scorer(args.scored_by), *self.data.split("tuning"), rounds=args.rounds,
                              candidates=args.candidates, seeds=args.shown, threshold=threshold, seed=self.seed,
                              log=self.folder / arm.key / f"{name}.jsonl", progress=not self.settings.toy)  # fmt: skip
        search.run()
        return search, search.finalists(*self.data.split("finalists"), agent=scorer("episodes"))

    def searched(self, arm: Arm, model: Any, tests: tuple[str, ...]) -> dict[str, Any]:
        """The search, and the winner beside other defences (spec 6.6), probes and steering (5)."""
        args = self.settings.search
        start = self.fit(self.side.planned["aligned"]).model if arm.key == "agent" else None
        generator = self.side.generator(start)
        search, finalists = self.search(arm, model, generator, "search", args.threshold)
        winner, bare = finalists[0].text, self.agent(model)
        guarded = self.outcomes([bare.behind(self.prefix(winner))], tests)
        found: dict[str, Any] = {"search": search.facts(finalists), "winner": winner, "guarded": guarded}
        self.prefix(winner).of(model).save(self.folder / arm.key / "prefix.json")
        if arm.key == "agent" and self.settings.arms.defences:
            _, best = self.search(arm, model, generator, "random", math.inf)
            agents = controls(bare, self.agent(start), self.data, self.prefix, winner, best[0].text,
                              words_of(self.side.grammar.slots), args.turns, Random(f"{self.seed}"))  # fmt: skip
            found["random"] = {"winner": best[0].text}
            found["defences"] = {name: self.outcomes(several, HELD_OUT) for name, several in agents.items()}
        if arm.key == "agent" and self.settings.arms.probes:
            openings = {"none": None, "PING": self.prefix(winner), "suffix": self.prefix(winner, position="suffix")}
            found |= inside(bare, self.data.tasks["train"], self.data.tasks["new_noun"], openings, self.data.system,
                            self.seed)  # fmt: skip
        return found


def jobs(settings: Settings) -> list[tuple[int, list[Arm]]]:
    """Seed and arms of what runs side by side: every seed, and the first one's other doses."""
    planned, seeds = settings.arms.planned(settings.toy), settings.recipe.seeds
    dosed = [arm for arm in planned if arm.stance is not None]
    return [*((seed, [arm for arm in planned if arm not in dosed]) for seed in seeds),
            *([(seeds[0], dosed)] if dosed else [])]  # fmt: skip


def bases(settings: Settings) -> list[tuple[int, Arm]]:
    """What is built before any agent is trained; the general corpus comes with its alignment."""
    return [(seed, arm) for seed, arms in jobs(settings) for arm in arms if arm.kind == "aligned"]


def build(argv: list[str], number: int, report: Any) -> None:
    """One of `bases`, kept in the cache."""
    quiet_libraries()
    settings = parse(argv)
    seed, arm = bases(settings)[number]
    Arms(settings, seed, report).side.base(arm)


def run_job(argv: list[str], number: int, report: Any) -> None:
    """One of `jobs`: each arm's model, and what was measured of it, written to its folder at once."""
    settings = parse(argv)
    if settings.toy:
        quiet_libraries()
    seed, planned = jobs(settings)[number]
    arms = Arms(settings, seed, report)
    for arm in planned:
        if not of_main((arms.folder / arm.key / "measured.json").exists):
            arms.record(arm)
        report(arm.key)


def dry_run(settings: Settings) -> None:
    """Trajectories with their loss tokens, parameters and memory of the agent's training; nothing is trained."""
    quiet_libraries()
    arms = Arms(settings, settings.recipe.seeds[0])
    arm = arms.side.planned["agent"]
    model = new_model(arms.side.tokenizer, size(settings.arms), seed=0) if settings.toy else arms.side.model(arm)
    with tempfile.TemporaryDirectory() as settings.training.output_dir:  # the Trainer makes its folder at once
        trainer = AgentSFTTrainer(model, settings.training, arms.data.rows(), processing_class=arms.side.tokenizer,
                                  peft_config=arms.side.adapter(arm))  # fmt: skip
        show_dry_run(trainer, arms.side.tokenizer, between=" " * settings.toy, **settings.recipe.plan)


def main(argv: list[str]) -> None:
    with clear_errors(ValueError, OSError):
        settings = parse(argv)
        training, seeds, toy = settings.training, settings.recipe.seeds, settings.toy
        data = Arms(settings, seeds[0]).check()
        if settings.recipe.dry_run:
            return dry_run(settings)
        flags, defaults = flags_and_defaults(settings)
        run = RunFolder(training.output_dir, recipe="ping", toy=toy, arguments=flags, defaults=defaults)
    with clear_errors(ValueError, OSError, FloatingPointError), run:
        run.data(*data.facts())
        if run.finished:
            print(f"{run.path} is finished; these are its results. Another --output_dir runs it again.")
        else:
            parallel, made = toy and training.world_size == 1 and len(seeds) > 1, bases(settings)
            if toy:
                print("A toy: tiny models, trained here from scratch. It shows nothing about large models.")
                print("Base models, which are kept in a cache:")
                run_seeds(build, argv, range(len(made)), 2 * PARTS, PRELOAD, parallel,
                          lambda number: f"seed {made[number][0]}")  # fmt: skip
            parts = jobs(settings)
            print("Agents, searches and tests:")
            run_seeds(run_job, argv, range(len(parts)), [len(arms) for _, arms in parts], PRELOAD, parallel,
                      lambda number: f"seed {parts[number][0]}")  # fmt: skip
            model, records = settings.model, read_records(run.path, seeds, lambda record: record["order"])
            write_report(run, records, model.model_name_or_path, model.model_revision, model.use_peft)
    show(run)


if __name__ == "__main__":
    run_main(main)
