"""Prompts as the text that a model reads: plain texts as they are, conversations through the chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from .choices import encode

Prompt: TypeAlias = str | Sequence[Mapping[str, Any]]


def prompt_text(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, template: Mapping[str, Any], *, generation_prompt: bool = True
) -> str:
    """The text in front of an answer, for functions that tokenise plain texts.

    A conversation gets the template's generation prompt, unless it is a whole one; `template`: its own arguments
    (`enable_thinking`, `tools`). Where the template writes the tokens of a beginning that the tokenizer adds anyway,
    they are left out.

    Raises:
        ValueError: a conversation for a tokenizer without a chat template.
    """
    if isinstance(prompt, str):
        return prompt
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template; take an instruct model, or prompts of plain text")
    made = tokenizer.apply_chat_template(
        list(prompt), tokenize=False, add_generation_prompt=generation_prompt, **template
    )
    text = str(made)
    added, ids = encode(tokenizer, ["", text])  # what the tokenizer puts in front: BOS, or GLM's two marks
    if added and ids[: 2 * len(added)] == added * 2:
        return text.removeprefix("".join(tokenizer.convert_ids_to_tokens(added)))
    return text


def check_beginning(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Mapping[str, Any]], template: Mapping[str, Any]
) -> None:
    """ValueError where the tokenizer adds a token in front (BOS) that the chat template does not write: TRL trains on
    what the template alone makes."""
    trained = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=True, **template)
    measured = encode(tokenizer, [prompt_text(tokenizer, prompt, template)])[0]
    if list(trained["input_ids"]) != measured:
        raise ValueError(
            f"the tokenizer reads a text as {measured[:3]}..., but the chat template makes {trained['input_ids'][:3]}"
            "... of it: a model would be trained on other tokens than it is measured on. Where the tokenizer adds a "
            "token in front (BOS), its template must write that token too"
        )
