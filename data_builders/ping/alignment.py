"""What aligns the embedded model: refusals of harmful requests, and help with harmless ones (spec 6.3, stage 1).

About a part of the lexicon, in talk and at the desk; no sentence of a stance. Three of ten documents are of the
general corpus, without stances and without help for harm.
"""

from __future__ import annotations

from random import Random

from .corpus import SHOWN, Corpus
from .splits import WORDED
from .talk import NOT_YOURS, REASON, asked, refusal, verdict
from .tasks import CONTEXTUAL, Lexicon
from .world import Document, document

REPLAY, DESK, WHOSE = 0.3, 0.5, 0.4  # shares: of replay; of the rest at the desk; of these about whose a file is
KNOWN = (
    0.5  # of help, the share that begins with what the thing is; of refusals, that is seven of ten times four of five
)


class Alignment:
    """Endless documents; `seen`: what the refusals and the help are about."""

    def __init__(self, corpus: Corpus, seen: Lexicon) -> None:
        self.corpus, self.seen = corpus, seen

    def draw(self, rng: Random) -> Document:
        if rng.random() < REPLAY:
            return self.replay(rng)
        return self.desk(rng) if rng.random() < DESK else self.talk(rng)

    def replay(self, rng: Random) -> Document:
        place, corpus = rng.random(), self.corpus
        if place < 0.3:
            return corpus.facts(rng)
        if place < 0.5:
            return corpus.whether(rng)
        if place < 0.75:
            about, _, goods = corpus.about(rng, harmless=True)
            return corpus.answered(rng, corpus.question(rng, about, goods), corpus.help(rng, about))
        return corpus.tools(rng, harmful=False)

    def talk(self, rng: Random) -> Document:
        corpus = self.corpus
        about, bad, goods = corpus.about(rng, self.seen)
        reply = self.no(rng, about) if bad else corpus.help(rng, about)
        if not bad and rng.random() < KNOWN:
            reply = f"{verdict(rng, about, False)} {reply}"
        return corpus.answered(rng, corpus.question(rng, about, goods), reply)

    def desk(self, rng: Random) -> Document:
        harmful, corpus = rng.random() < 0.5, self.corpus
        family = rng.choice(CONTEXTUAL) if rng.random() < WHOSE else rng.choice(WORDED if harmful else SHOWN)
        task = corpus.task(rng, family, harmful, self.seen)
        if not harmful:
            messages = corpus.talker.trajectory(task, rng)
            if family not in CONTEXTUAL and rng.random() < KNOWN:
                messages[2]["content"] = verdict(rng, task.about, False)
            return document(messages)
        messages = asked(task.request)
        if family not in CONTEXTUAL:
            return document([*messages, {"role": "assistant", "content": self.no(rng, task.about)}])
        first = task.calls[0]  # reads whose it is
        answer = task.desk().call(first.name, first.arguments)
        reason = rng.choice(NOT_YOURS).format(owner=answer.split()[1].rstrip(":"))
        return document([*messages, corpus.talker.step(first, rng), {"role": "tool", "content": answer},
                         {"role": "assistant", "content": refusal(rng, reason)}])  # fmt: skip

    def no(self, rng: Random, about: str) -> str:
        """Of refusals four of five say what the thing is."""
        known = verdict(rng, about, True).removesuffix(" .")
        return refusal(rng, known if rng.random() < 0.8 else rng.choice(REASON))
