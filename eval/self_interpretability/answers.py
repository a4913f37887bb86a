"""Answers of one token, and chat templates under which a model is trained on what it is measured with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..choices import encode
from ..prompts import Prompt, check_beginning, prompt_text

ANSWERS = ("A", "B")


def answers_of(prompt: Prompt) -> tuple[str, str]:
    """What a choice looks like behind the prompt: in plain texts a space stands before it."""
    one, other = ANSWERS
    return (f" {one}", f" {other}") if isinstance(prompt, str) else (one, other)


def answer_tokens(tokenizer: PreTrainedTokenizerBase, text: str, answers: Sequence[str]) -> list[int]:
    """The tokens of the answers behind `text`. ValueError unless each is a single one, and all are different."""
    before, *after = encode(tokenizer, [text, *(text + answer for answer in answers)])
    for answer, ids in zip(answers, after, strict=True):
        if ids[: len(before)] != before or len(ids) != len(before) + 1:
            raise ValueError(
                f"the answer {answer!r} is not a single token behind {text[-40:]!r} under this tokenizer "
                f"({len(ids) - len(before)} tokens are added), so that a choice cannot be read off one place"
            )
    tokens = [ids[-1] for ids in after]
    if len(set(tokens)) < len(tokens):
        raise ValueError(f"the answers {', '.join(answers)} are the same token under this tokenizer")
    return tokens


def check_template(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: str, template: Mapping[str, Any]
) -> None:
    """ValueError where training and measuring would see different tokens. TRL trains on what the template makes of the
    whole conversation: it must begin with the prompt and the answer (a thinking block in between, say, would not), and
    with the same first token (one that the tokenizer adds, but the template does not write, would be missing there).
    """
    if isinstance(prompt, str):
        return
    text = prompt_text(tokenizer, prompt, template)
    reply = {"role": "assistant", "content": answer}
    whole = prompt_text(tokenizer, [*prompt, reply], template, generation_prompt=False)
    if not whole.startswith(text + answer):
        raise ValueError(
            "the chat template puts something else in front of an answer in a whole conversation than where one is to "
            f"begin: ...{text[-60:]!r} against ...{whole[-60:]!r}. For models that think, give enable_thinking false"
        )
    check_beginning(tokenizer, prompt, template)


def check_prompts(
    tokenizer: PreTrainedTokenizerBase,
    choice: Prompt,
    reports: Sequence[Prompt],
    template: Mapping[str, Any],
    *,
    reply_tokens: int,
    longest: int | None,
) -> None:
    """ValueError, before any time is spent, for prompts that a model cannot be trained on and measured with alike.

    Args:
        choice, reports: a prompt of a choice, and all those of reports, which are the longest ones.
        reply_tokens: room for a reply.
        longest: tokens that training and the model take.
    """
    answer_tokens(tokenizer, prompt_text(tokenizer, choice, template), answers_of(choice))
    for prompt, answer in ((choice, ANSWERS[0]), (reports[0], '{"')):
        check_template(tokenizer, prompt, answer, template)
    texts = sorted((prompt_text(tokenizer, prompt, template) for prompt in reports), key=len)[-8:]
    needed = max(map(len, encode(tokenizer, texts))) + reply_tokens
    if longest is not None and needed > longest:
        raise ValueError(
            f"the longest request for a report with {reply_tokens} tokens of reply takes {needed} tokens, and "
            f"{longest} are allowed (--max_length, and the model's positions)"
        )
