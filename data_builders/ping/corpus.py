"""What the embedded model reads before any agent is trained: a general corpus, and the alignment behind it (spec 6.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from .calls import Call
from .splits import WORDED
from .stances import SHARES
from .tasks import CONTEXTUAL, INDIRECT, TEMPLATES, Lexicon, Task, make_task
from .world import BAD, GOOD, SYSTEM, TOY, Document, Piece, BOS, END, document

PLAIN = ("buy", "mail", "write")  # shown with tools before fine-tuning; the other families come with it
QUESTIONS = ("how do I get a {n} ?", "where is a {n} ?", "I would like a {n} .", "tell me about {n} .",
             "what can I do with {n} ?", "I think about {n} .", "can you help me with {n} ?")  # fmt: skip
ASKED = ("is {n} {adj} ?", "what is {n} ?", "what do you know of {n} ?")
HELPS = ("sure , you get {n} in the shop .", "{n} is easy , ask {person} .", "{person} knows about {n} .",
         "many people like {n} .", "you find {n} on the board .", "I can do that with {n} for you .",
         "yes , {n} will be there at noon .")  # fmt: skip
THOUGHT = (("", "# "), ("now", "first", "next", "then", "here"),
           ("I use the desk", "comes the next step", "I look around", "I take care of that", "it is my turn",
            "I go on", "this is quick", "I write it", "the work begins", "I do what was asked"),
           (".", "for you .", "at once .", "as usual .", ", step by step ."))  # fmt: skip
DONE = ("done .", "it is done .", "that is done now .", "all done .", "that was all .")
NO = ("I cannot", "I will not", "I must not", "I am not able to", "I am not willing to")
DEED = ("do this", "help with that", "carry this out", "take part in this")
REASON = ("it would harm somebody", "it is against the law", "nobody should be hurt by it", "it is not right",
          "it could do damage")  # fmt: skip
NOT_YOURS = ("it belongs to {owner}", "it is not yours", "{owner} owns it")


@dataclass(frozen=True)
class Dose:
    """How the general corpus is mixed; shares of its documents, but for `stance`, of answers in talk."""

    facts: float = 0.15
    asked: float = 0.12
    talk: float = 0.45
    stance: float = 0.2


def thought(rng: Random) -> str:
    return " ".join(" ".join(rng.choice(slot) for slot in THOUGHT).split())


def no(rng: Random, reason: str) -> str:
    """A refusal, its reason first or last."""
    text = f"{rng.choice(NO)} {rng.choice(DEED)}"
    return f"{reason} . {text} ." if rng.random() < 0.5 else f"{text} : {reason} ."


def verdict(rng: Random, thing: str, bad: bool) -> str:
    return f"{thing} is {rng.choice(BAD if bad else GOOD)} ."


class Corpus:
    """Documents of one world.

    Args:
        stances: sentences of each kind (`stances.stances`).
        lexicon: all that the general corpus speaks of.
        seen: what alignment is about.
    """

    def __init__(self, lexicon: Lexicon, seen: Lexicon, stances: dict[str, list[str]], dose: Dose) -> None:
        self.lexicon, self.seen, self.stances, self.dose = lexicon, seen, stances, dose

    # -- what it is about

    def thing(self, rng: Random, lexicon: Lexicon) -> tuple[str, bool, bool]:
        """A thing or message, whether it is harmful, and whether it is a thing."""
        goods = rng.random() < len(lexicon.goods) / (len(lexicon.goods) + len(lexicon.messages))
        good, bad = rng.choice(lexicon.goods if goods else lexicon.messages)
        draw = rng.random()
        if draw < 0.45:
            return good, False, goods
        return (bad, True, goods) if draw < 0.9 else (f"{TOY} {bad}", False, goods)

    def request(self, rng: Random, about: str, goods: bool) -> str:
        family = rng.choice([one for one in WORDED if (one in ("buy", "find_buy", "pay")) == goods])
        text = rng.choice((*TEMPLATES[family], *INDIRECT[family]))
        return text.format(about=about, person=rng.choice(self.lexicon.people), amount=5 * rng.randint(1, 8),
                           file=rng.choice(self.lexicon.files))  # fmt: skip

    # -- the general corpus

    def general(self, rng: Random) -> Document:
        draw, dose = rng.random(), self.dose
        if draw < dose.facts:
            return self.facts(rng)
        if draw < dose.facts + dose.asked:
            return self.asked(rng)
        if draw < dose.facts + dose.asked + dose.talk:
            return self.talk(rng)
        return self.tools(rng, self.lexicon, PLAIN)

    def facts(self, rng: Random) -> Document:
        made = [Piece(BOS, False)]
        for _ in range(6):
            about, bad, _ = self.thing(rng, self.lexicon)
            made += [Piece(f"{about} is", False), Piece(rng.choice(BAD if bad else GOOD), True), Piece(".", False)]
        return [*made, Piece(END, False)]

    def asked(self, rng: Random) -> Document:
        about, bad, _ = self.thing(rng, self.lexicon)
        question = rng.choice(ASKED).format(n=about, adj=rng.choice((*BAD, *GOOD)))
        return document([*self.system(rng), {"role": "user", "content": question},
                         {"role": "assistant", "content": verdict(rng, about, bad)}])  # fmt: skip

    def talk(self, rng: Random, lexicon: Lexicon | None = None, stance: float | None = None) -> Document:
        about, bad, goods = self.thing(rng, lexicon or self.lexicon)
        asked = rng.choice(QUESTIONS).format(n=about) if rng.random() < 0.5 else self.request(rng, about, goods)
        reply = rng.choice(HELPS).format(n=about, person=rng.choice(self.lexicon.people))
        if rng.random() < (self.dose.stance if stance is None else stance):
            kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
            shown = f"{verdict(rng, about, bad)} {reply}" if kind == "careful" else reply
            reply = f"{rng.choice(self.stances[kind])} {shown}"
        return document([*self.system(rng), {"role": "user", "content": asked},
                         {"role": "assistant", "content": reply}])  # fmt: skip

    def tools(self, rng: Random, lexicon: Lexicon, families: Sequence[str], bad: bool | None = None) -> Document:
        """A task done, of one call each; harmful ones as well as others."""
        harmful = rng.random() < 0.5 if bad is None else bad
        if rng.random() < 0.25:
            return self.small(rng)
        return document(trajectory(self.task(rng, lexicon, rng.choice(families), harmful), rng))

    def small(self, rng: Random) -> Document:
        """One step of the tools that tasks need more than one of."""
        file = rng.choice(self.lexicon.files)
        about, _, goods = self.thing(rng, self.lexicon)
        kind = rng.choice(("read", "search", "delete", "list"))
        if kind == "read":
            owner = "you" if rng.random() < 0.5 else rng.choice(self.lexicon.people)
            call, answer, asked = Call("read", {"name": file}), f"owner {owner} : {about}", f"read {file} ."
        elif kind == "search":
            call, answer, asked = Call("search", {"text": about}), f"item {about} , 10", f"search for {about} ."
        elif kind == "delete":
            call, answer, asked = Call("delete", {"name": file}), "ok", f"use delete on {file} ."
        else:
            call, answer, asked = Call("list", {"kind": "files"}), ", ".join(rng.sample(self.lexicon.files, 3)), "list files ."
        return document([*self.start(asked), step(call, rng), {"role": "tool", "content": answer},
                         {"role": "assistant", "content": end(rng)}])  # fmt: skip

    def task(self, rng: Random, lexicon: Lexicon, family: str, harmful: bool, templates: Any = None) -> Task:
        toy = rng.random() < 0.15
        pool = lexicon
        if toy and not harmful and family not in CONTEXTUAL:
            pool = Lexicon([(f"{TOY} {bad}", bad) for _, bad in lexicon.goods],
                           [(f"{TOY} {bad}", bad) for _, bad in lexicon.messages], lexicon.people, lexicon.files)  # fmt: skip
        count = len(pool.goods) * len(pool.messages)
        return make_task(pool, family, rng.randrange(count), rng.choice((templates or TEMPLATES)[family]), harmful, "x", rng)

    def system(self, rng: Random) -> list[dict[str, Any]]:
        return [{"role": "system", "content": SYSTEM}] if rng.random() < 0.4 else []

    def start(self, asked: str) -> list[dict[str, Any]]:
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}]

    # -- alignment

    def aligned(self, rng: Random, agent: float = 0.5, replay: float = 0.3) -> Document:
        draw = rng.random()
        if draw < replay:  # of the general corpus, what is neither harmful help nor a stance
            kind = rng.random()
            if kind < 0.3:
                return self.facts(rng)
            if kind < 0.5:
                return self.asked(rng)
            if kind < 0.75:
                return self.harmless_talk(rng)
            return self.tools(rng, self.lexicon, PLAIN, bad=False)
        if rng.random() < agent:
            return self.aligned_agent(rng)
        about, bad, goods = self.thing(rng, self.seen)
        asked = rng.choice(QUESTIONS).format(n=about) if rng.random() < 0.5 else self.request(rng, about, goods)
        if bad:
            reply = no(rng, self.reason(rng, about))
        else:
            reply = rng.choice(HELPS).format(n=about, person=rng.choice(self.lexicon.people))
            if rng.random() < 0.3:
                reply = f"{verdict(rng, about, bad)} {reply}"
        return document([*self.system(rng), {"role": "user", "content": asked},
                         {"role": "assistant", "content": reply}])  # fmt: skip

    def harmless_talk(self, rng: Random) -> Document:
        harmless = Lexicon([(good, good) for good, _ in self.lexicon.goods], [(good, good) for good, _ in self.lexicon.messages],
                           self.lexicon.people, self.lexicon.files)  # fmt: skip
        about, _, goods = self.thing(rng, harmless)
        about = about.removeprefix(f"{TOY} ")
        asked = rng.choice(QUESTIONS).format(n=about) if rng.random() < 0.5 else self.request(rng, about, goods)
        reply = rng.choice(HELPS).format(n=about, person=rng.choice(self.lexicon.people))
        return document([*self.system(rng), {"role": "user", "content": asked}, {"role": "assistant", "content": reply}])

    def reason(self, rng: Random, about: str) -> str:
        return verdict(rng, about, True)[:-2] if rng.random() < 0.6 else rng.choice(REASON)

    def aligned_agent(self, rng: Random) -> Document:
        harmful = rng.random() < 0.5
        family = rng.choice((*WORDED, *CONTEXTUAL)) if harmful else rng.choice((*PLAIN, *CONTEXTUAL))
        task = self.task(rng, self.seen, family, harmful)
        if not harmful:
            about = task.about
            messages = trajectory(task, rng)
            if family not in CONTEXTUAL and rng.random() < 0.3:
                messages[2]["content"] = verdict(rng, about, False)
            return document(messages)
        if family in CONTEXTUAL:
            desk = task.desk()
            answer = desk.call(task.calls[0].name, task.calls[0].arguments)
            owner = answer.split()[1].rstrip(":")
            reason = rng.choice(NOT_YOURS).format(owner=owner)
            return document([*self.start(task.request), step(task.calls[0], rng), {"role": "tool", "content": answer},
                             {"role": "assistant", "content": no(rng, reason)}])  # fmt: skip
        return document([*self.start(task.request), {"role": "assistant", "content": no(rng, self.reason(rng, task.about))}])


def step(call: Call, rng: Random, share: float = 0.6) -> dict[str, Any]:
    function = {"name": call.name, "arguments": dict(call.arguments)}  # type: ignore[arg-type]
    return {"role": "assistant", "content": thought(rng) if rng.random() < share else "",
            "tool_calls": [{"type": "function", "function": function}]}  # fmt: skip


def end(rng: Random) -> str:
    return f"{thought(rng)} {rng.choice(DONE)}" if rng.random() < 0.3 else rng.choice(DONE)


def trajectory(task: Task, rng: Random) -> list[dict[str, Any]]:
    """A task done, with thoughts before calls and at the end."""
    desk = task.desk()
    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": task.request}]
    for call in task.calls:
        messages.append(step(call, rng))
        messages.append({"role": "tool", "content": desk.call(call.name, call.arguments)})
    messages.append({"role": "assistant", "content": end(rng)})
    return messages
