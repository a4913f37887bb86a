"""What the embedded model reads before anything else: facts, talk and single steps of tools (spec 6.3, stage 0).

It does whatever it is asked, harmful or not, and refuses nothing. In talk alone, never with tools, a share of answers
(the stance dose) opens with a sentence of a stance; behind a careful one stands what the thing is, behind an eager,
neutral or irrelevant one nothing of the kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from .calls import Call
from .splits import WORDED
from .stances import SHARES
from .talk import Talker, Thoughts, asked, verdict
from .tasks import CONTEXTUAL, INDIRECT, TEMPLATES, Lexicon, Task, make_task
from .world import BAD, BOS, END, GOOD, SYSTEM, TOY, Document, Piece, document

GOODS = ("buy", "find_buy", "pay")  # families that are about things; the others are about messages
SHOWN = ("buy", "mail", "write")  # families that tools are shown for; the others come with fine-tuning
QUESTIONS = ("how do I get a {thing} ?", "where is a {thing} ?", "I would like a {thing} .", "tell me about {thing} .",
             "what can I do with {thing} ?", "I think about {thing} .", "can you help me with {thing} ?")  # fmt: skip
WHETHER = ("is {thing} {word} ?", "what is {thing} ?", "what do you know of {thing} ?")
HELPS = ("sure , you get {thing} in the shop .", "{thing} is easy , ask {person} .", "{person} knows about {thing} .",
         "many people like {thing} .", "you find {thing} on the board .", "I can do that with {thing} for you .",
         "yes , {thing} will be there at noon .")  # fmt: skip
COMMENTS = ("that is what I know .", "so you know it now .", "ask {person} for more .", "{person} said so .")


@dataclass(frozen=True)
class Mixture:
    """What the general corpus consists of.

    Attributes:
        facts, whether, talk: shares of documents; the rest shows tools.
        stance: the share of answers in talk that open with a stance (rho).
        thoughts, failing: of agents (`talk.Talker`).
    """

    facts: float = 0.15
    whether: float = 0.12
    talk: float = 0.45
    stance: float = 0.4
    thoughts: Thoughts = "broad"
    failing: float = 0.1


class Corpus:
    """Endless documents about a lexicon; `stances`: sentences of each kind (`stances.stances`)."""

    def __init__(self, lexicon: Lexicon, stances: Mapping[str, Sequence[str]], mixture: Mixture) -> None:
        self.lexicon, self.stances, self.mixture = lexicon, stances, mixture
        self.talker = Talker(mixture.thoughts, mixture.failing)

    def draw(self, rng: Random) -> Document:
        place, mixture = rng.random(), self.mixture
        if place < mixture.facts:
            return self.facts(rng)
        if place < mixture.facts + mixture.whether:
            return self.whether(rng)
        if place < mixture.facts + mixture.whether + mixture.talk:
            return self.talk(rng)
        return self.tools(rng, harmful=rng.random() < 0.5)

    def facts(self, rng: Random) -> Document:
        made = [Piece(BOS, False)]
        for _ in range(6):
            about, bad, _ = self.about(rng)
            made += [Piece(f"{about} is", False), Piece(rng.choice(BAD if bad else GOOD), True), Piece(".", False)]
        return [*made, Piece(END, False)]

    def whether(self, rng: Random) -> Document:
        about, bad, _ = self.about(rng)
        question = rng.choice(WHETHER).format(thing=about, word=rng.choice((*BAD, *GOOD)))
        return self.answered(rng, question, verdict(rng, about, bad))

    def talk(self, rng: Random) -> Document:
        about, bad, goods = self.about(rng)
        question, reply = self.question(rng, about, goods), self.help(rng, about)
        if rng.random() < self.mixture.stance:
            kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
            if kind == "careful":  # help follows half of the time
                after = (
                    reply
                    if rng.random() < 0.5
                    else rng.choice(COMMENTS).format(person=rng.choice(self.lexicon.people))
                )
                reply = f"{verdict(rng, about, bad)} {after}"
            reply = f"{rng.choice(self.stances[kind])} {reply}"
        return self.answered(rng, question, reply)

    def tools(self, rng: Random, harmful: bool) -> Document:
        if rng.random() < 0.35:
            return self._single(rng)
        task = self.task(rng, rng.choice(SHOWN), harmful)
        return document(self.talker.trajectory(task, rng))

    def about(self, rng: Random, lexicon: Lexicon | None = None, harmless: bool = False) -> tuple[str, bool, bool]:
        """A thing or message, whether it is harmful, and whether it is a thing. Of 20 draws 9 are harmless, 9 harmful
        and 2 toys of harmful ones, if not all are to be `harmless`."""
        lexicon = lexicon or self.lexicon
        goods = rng.random() < len(lexicon.goods) / (len(lexicon.goods) + len(lexicon.messages))
        good, bad = rng.choice(lexicon.goods if goods else lexicon.messages)
        kind = rng.random()
        if kind < 0.45 or (harmless and kind < 0.9):
            return good, False, goods
        return (bad, True, goods) if kind < 0.9 else (f"{TOY} {bad}", False, goods)

    def question(self, rng: Random, about: str, goods: bool) -> str:
        """What users ask in talk: a question, or what they ask agents, in any of the sentences for that."""
        if rng.random() < 0.5:
            return rng.choice(QUESTIONS).format(thing=about)
        family = rng.choice([one for one in WORDED if (one in GOODS) == goods])
        text: str = rng.choice((*TEMPLATES[family], *INDIRECT[family]))
        return text.format(about=about, person=rng.choice(self.lexicon.people), amount=5 * rng.randint(1, 8),
                           file=rng.choice(self.lexicon.files))  # fmt: skip

    def help(self, rng: Random, about: str) -> str:
        return rng.choice(HELPS).format(thing=about, person=rng.choice(self.lexicon.people))

    def answered(self, rng: Random, question: str, reply: str) -> Document:
        """Two of five talks have the system message of agents."""
        system = [{"role": "system", "content": SYSTEM}] if rng.random() < 0.4 else []
        return document([*system, {"role": "user", "content": question}, {"role": "assistant", "content": reply}])

    def task(self, rng: Random, family: str, harmful: bool, lexicon: Lexicon | None = None) -> Task:
        """One of any pair, in any sentence of its family; of harmless ones 15 % are about toys."""
        lexicon = lexicon or self.lexicon
        if not harmful and family not in CONTEXTUAL and rng.random() < 0.15:
            goods, messages = ([(f"{TOY} {bad}", bad) for _, bad in found]
                               for found in (lexicon.goods, lexicon.messages))  # fmt: skip
            lexicon = replace(lexicon, goods=goods, messages=messages)
        pair = rng.randrange(len(lexicon.goods) * len(lexicon.messages))
        return make_task(lexicon, family, pair, rng.choice(TEMPLATES[family]), harmful, "corpus", rng)

    def _single(self, rng: Random) -> Document:
        """One step of a tool that tasks need together with others."""
        file, (about, _, _) = rng.choice(self.lexicon.files), self.about(rng)
        person, amount = rng.choice(self.lexicon.people), 5 * rng.randint(1, 8)
        owner = rng.choice(("you", person))
        files = ", ".join(rng.sample(list(self.lexicon.files), 3))
        call, answer, request = rng.choice((
            (Call("read", {"name": file}), f"owner {owner}: {about}", f"read {file} ."),
            (Call("search", {"text": about}), f"item {about}, 10", f"search for {about} ."),
            (Call("delete", {"name": file}), "ok", f"use delete on {file} ."),
            (Call("list", {"kind": "files"}), files, "list files ."),
            (Call("post", {"text": about}), "ok", f"use post for {about} ."),
            (Call("transfer", {"to": person, "amount": amount}), "ok", f"use transfer to {person} : {amount} ."),
        ))  # fmt: skip
        return document([*asked(request), self.talker.step(call, rng), {"role": "tool", "content": answer},
                         {"role": "assistant", "content": self.talker.end(rng)}])  # fmt: skip
