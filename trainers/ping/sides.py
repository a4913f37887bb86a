"""Where the models of a run come from, and how they speak: the embedded world's, or a pretrained one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from trl import ModelConfig, get_peft_config

from ...files import is_main_process
from ..base_model import load_base
from ..whole import whole_models
from .arms import Arm, ArmArguments
from .base import Draw, tiny_model
from .generators import SLOTS, EndpointGenerator, GrammarGenerator, ModelGenerator
from .options import PretrainedArguments, SearchArguments
from .trainer import AgentSFTConfig


class Tiny:
    """The models of one seed of the embedded world.

    Args:
        stages: of an arm what its base or aligned model reads, and what that follows from.
        grammar: what proposes sentences.
        report: called with an arm's key while its model is built.
    """

    separator, lead, merged = "", "", True
    speaks: Mapping[str, Any] = {"form": "words", "max_new_tokens": 24, "min_new_tokens": 1}

    def __init__(self, args: ArmArguments, seed: int, tokenizer: Any,
                 stages: Callable[[Arm], tuple[Draw, Any]], grammar: GrammarGenerator,
                 report: Callable[[str], None], device: Any) -> None:  # fmt: skip
        self.device = device
        self.args, self.seed, self.tokenizer, self.stages = args, seed, tokenizer, stages
        self.grammar, self.report = grammar, report
        self.planned = {arm.key: arm for arm in args.planned(True)}

    def base(self, arm: Arm) -> Path:
        return tiny_model(arm, self.planned, self.stages, self.args, self.tokenizer, self.seed, self.report,
                          self.device)  # fmt: skip

    def model(self, arm: Arm) -> Any:
        with whole_models():
            return AutoModelForCausalLM.from_pretrained(self.base(arm)).to(self.device)

    def adapter(self, arm: Arm) -> LoraConfig | None:
        rank = self.args.lora_rank
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return lora if arm.lora else None

    def generator(self, start: Any) -> GrammarGenerator:
        return self.grammar


class Pretrained:
    """A pretrained model, and agents that are fine-tuned from it.

    Args:
        form_of: the form of calls that a tokenizer's chat template shows.
    """

    separator, grammar = "\n", GrammarGenerator(SLOTS)

    def __init__(self, args: ArmArguments, config: ModelConfig, training: AgentSFTConfig, given: PretrainedArguments,
                 search: SearchArguments, form_of: Callable[[Any], str]) -> None:  # fmt: skip
        self.config, self.training, self.search, self.merged = config, training, search, not config.use_peft
        self.template: dict[str, Any] = given.chat_template_kwargs or {}  # type: ignore[assignment]
        self.given, self.form_of = given, form_of
        self.planned = {arm.key: arm for arm in args.planned(False)}
        self.tokenizer: PreTrainedTokenizerBase

    def model(self, arm: Arm) -> Any:
        model, self.tokenizer = load_base(self.config, device=self.training.device)
        if file := self.training.chat_template_path:
            self.tokenizer.chat_template = Path(file).read_text(encoding="utf-8")
        return model

    @property
    def lead(self) -> str:
        """What stands in front of a prefix: GLM's replies begin with a line's end, or else with a function's name."""
        return "\n" if self.speaks["form"] == "glm" else ""

    @property
    def speaks(self) -> dict[str, Any]:
        form = self.given.form or self.form_of(self.tokenizer)
        return {"form": form, "max_new_tokens": self.given.max_new_tokens, "template": self.template}

    def adapter(self, arm: Arm) -> Any:
        return get_peft_config(self.config)

    def generator(self, start: Any) -> Any:
        """What `--generator` says. `start`: the model that fine-tuning begins with."""
        search = self.search
        if search.generator == "grammar" or not is_main_process():  # only the first process proposes
            return self.grammar
        if search.generator == "endpoint":
            return EndpointGenerator(str(search.generator_url), str(search.generator_model))
        if search.generator_model is None:
            return ModelGenerator(start, self.tokenizer, **self.template)
        named = replace(self.config, model_name_or_path=search.generator_model, model_revision="main")
        return ModelGenerator(*load_base(named, device=self.training.device))
