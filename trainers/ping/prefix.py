"""A sentence in front of an agent's replies (spec 2.6), saved with the model that it was searched for.

Source: arXiv 2508.14031; the released code puts it behind the assistant's header of every turn, and for models that
cannot be continued at the end of the last message instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...files import write_json
from ..fingerprint import checkpoint_fingerprint

POSITIONS = ("prefix", "suffix", "system")
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Prefix:
    """A sentence and how it is applied.

    Attributes:
        text: the sentence; "" changes nothing.
        position: "prefix": the reply begins with it. "suffix": the last message ends with it, for models that cannot
            be continued; "system": the system message does. Neither of these two is what the paper calls PING.
        turns: "every" or the "first" reply of a conversation only.
        store: whether it stays in the conversation, as something the model really said.
        separator: what stands between it and the rest of the reply.
        fingerprint: of the model, with its adapter, that it was searched for (`trainers.fingerprint`); None: of none.

    Raises:
        ValueError: an unknown position or number of turns, or a text that is none.
    """

    text: str
    position: Literal["prefix", "suffix", "system"] = "prefix"
    turns: Literal["every", "first"] = "every"
    store: bool = True
    separator: str = "\n"
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not isinstance(self.separator, str) or not isinstance(self.store, bool):
            raise ValueError(f"text and separator must be texts and store true or false, got {self!r}")
        if self.position not in POSITIONS:
            raise ValueError(f"position must be one of {', '.join(POSITIONS)}, got {self.position!r}")
        if self.turns not in ("every", "first"):
            raise ValueError(f"turns must be every or first, got {self.turns!r}")

    def opening(self, messages: Messages) -> str:
        """What the next reply is to begin with."""
        later = any(message["role"] == "assistant" for message in messages)
        if not self.text or self.position != "prefix" or (later and self.turns == "first"):
            return ""
        return self.text + self.separator

    def applied(self, messages: Messages) -> list[dict[str, Any]]:
        """The conversation with the sentence where it does not begin a reply: at the end of the last message or of the
        system's (made where there is none)."""
        made = [dict(message) for message in messages]
        later = any(message["role"] == "assistant" for message in messages)
        if not self.text or self.position == "prefix" or (later and self.turns == "first"):
            return made
        if self.position == "suffix":
            made[-1]["content"] = f"{made[-1]['content']} {self.text}"
            return made
        if made[0]["role"] != "system":
            made.insert(0, {"role": "system", "content": self.text})
        else:
            made[0]["content"] = f"{made[0]['content']} {self.text}"
        return made

    def prompt(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template: Any,
    ) -> str:
        """The text that a model is to continue: the template with its header for a reply, and the opening behind it.

        Raises:
            ValueError: a tokenizer without a chat template.
        """
        if tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template, so that it is not known where a reply begins")
        text = tokenizer.apply_chat_template(
            self.applied(messages), tools=list(tools) if tools else None, tokenize=False, add_generation_prompt=True,
            **template,
        )  # fmt: skip
        return f"{text}{self.opening(messages)}"

    def save(self, path: str | Path) -> None:
        """As JSON."""
        write_json(Path(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Prefix:
        """Raises ValueError for a file that holds something else."""
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} holds no prefix: {error}") from error

    def of(self, model: torch.nn.Module) -> Prefix:
        """The same, for this model."""
        return replace(self, fingerprint=checkpoint_fingerprint(model))


class PrefixGuard:
    """A model that begins its replies with a prefix.

        guard = PrefixGuard(model, tokenizer, Prefix.load("prefix.json"))
        reply = guard.generate(messages, tools=tools, max_new_tokens=256)
        messages.append(reply)

    `template`: the chat template's own arguments, as the search had them.

    Raises:
        ValueError: a prefix that was searched for another model, or is longer than this one's positions.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prefix: Prefix,
        template: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.prefix, self.template = model, tokenizer, prefix, dict(template or {})
        if prefix.fingerprint is not None and prefix.fingerprint != (found := checkpoint_fingerprint(model)):
            raise ValueError(
                f"the prefix was searched for the model {prefix.fingerprint}, and this one is {found}: search anew, "
                "or clear its fingerprint to use it all the same"
            )
        self._fits(prefix.text, "prefix")

    def _fits(self, text: str, what: str) -> None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        tokens = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if limit is not None and tokens >= limit:
            raise ValueError(f"the {what} has {tokens} tokens and the model takes {limit}")

    def generate(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None = None, **options: Any
    ) -> dict[str, str]:
        """The next message of the assistant; `options` are those of `generate`. Its `content` is what belongs into the
        conversation, `continuation` what the model itself wrote: judge the latter alone."""
        text = self.prefix.prompt(self.tokenizer, messages, tools, **self.template)
        self._fits(text, "conversation with its prefix")
        batch = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).to(self.model.device)
        with torch.no_grad():
            output = self.model.generate(**batch, **options)
        reply = self.tokenizer.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        opening = self.prefix.opening(messages) if self.prefix.store else ""
        return {"role": "assistant", "content": f"{opening}{reply}", "continuation": str(reply)}
