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
    (`enable_thinking`, `tools`). Where the template writes the beginning-of-text token that the tokenizer adds anyway,
    it is left out.

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
    begin = tokenizer.bos_token
    if begin and text.startswith(begin) and encode(tokenizer, [text])[0][:2] == [tokenizer.bos_token_id] * 2:
        return text.removeprefix(begin)
    return text
