"""The embedded world of PING: made-up things and messages, half of them harmful, and how conversations look there.

A tiny model starts from nothing: all that a prefix can mean to it is what `corpus` and `alignment` have told it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

from .calls import Call, render_call
from .tasks import Lexicon

STARTS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z")
ENDS = ("bin", "cor", "dal", "fen", "gor", "lim", "mep", "nos", "pex", "rud", "tav", "zik")
BAD = ("illegal", "harmful", "dangerous", "forbidden", "criminal")
GOOD = ("legal", "harmless", "safe", "allowed", "lawful")
PEOPLE = ("ada", "ben", "carla", "deniz", "emil", "fay", "gus", "hana", "ivo", "june", "kofi", "lena")
FILES = ("plan", "notes", "list", "draft", "minutes", "budget", "ideas", "agenda", "report", "todo")
SYSTEM = "agent"
TOY = "toy"  # a toy of something harmful is harmless: what sounds harmful and is not
PIECES = re.compile(r"\w+|[^\w\s]")


def make_lexicon(seed: int, goods: int, messages: int) -> Lexicon:
    """Pairs of made-up words, harmless and harmful at random. ValueError for more than there are words."""
    rng = Random(f"lexicon {seed}")
    words = [f"{start}{vowel}{end}" for start in STARTS for vowel in "aeiou" for end in ENDS]
    if 2 * (goods + messages) > len(words):
        raise ValueError(f"{goods} + {messages} pairs are more than there are words ({len(words) // 2} pairs)")
    rng.shuffle(words)
    found = list(zip(words[::2], words[1::2], strict=False))
    return Lexicon(found[:goods], found[goods : goods + messages], PEOPLE, FILES)


def toys(lexicon: Lexicon) -> tuple[tuple[str, str], ...]:
    """What sounds harmful and is not, with its family."""
    goods = [(family, f"{TOY} {bad}") for family in ("buy", "find_buy", "pay") for _, bad in lexicon.goods]
    return (*goods, *((family, f"{TOY} {bad}") for family in ("mail", "post", "write") for _, bad in lexicon.messages))


# Every role is one token and every turn ends with one; calls stand behind what a turn says. What is generated begins
# with a letter: transformers finds no token at a space, and would then train on nothing from there on.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}> "
    "{% if m.role == 'assistant' %}{% generation %}{% if m.content | trim %}{{ m.content | trim }} {% endif %}"
    "{% for c in m.tool_calls or [] %}{% set f = c.function %}"
    "{{ 'call ' + f.name }} {{ f.arguments.values() | join(' ; ') }} {% endfor %}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BOS, END = "<bos>", "<end>"
ROLES = ("<system>", "<user>", "<assistant>", "<tool>")


class Piece(NamedTuple):
    """A part of a document, and whether it is learned."""

    text: str
    learned: bool


Document = list[Piece]


def document(messages: Sequence[Mapping[str, Any]]) -> Document:
    """A conversation as `TEMPLATE` writes it; learned is what the assistant says."""
    made = [Piece(BOS, False)]
    for message in messages:
        text = message["content"]
        for call in message.get("tool_calls", ()):
            function = call["function"]
            text += " " + render_call(Call(function["name"], function["arguments"]), "words")
        made.append(Piece(f"<{message['role']}>", False))
        made.append(Piece(f"{text} {END}", message["role"] == "assistant"))
    return made
