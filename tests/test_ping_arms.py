"""Bases that read documents, other defences, what is measured of an agent, and what is said of it: against hand."""

import json
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from steerbook.data_builders.ping.experiment import DeskArguments, DeskExperiment
from steerbook.data_builders.ping.world import BOS, END, ROLES, SYSTEM, TEMPLATE
from steerbook.eval.ping.agent import ModelAgent
from steerbook.eval.ping.defended import REFUSAL, Attacked, Begun, Examples, Guarded
from steerbook.eval.ping.episodes import Reply, run_episodes
from steerbook.eval.ping.measure import classifier, keywords, read_out, run_sets, steering
from steerbook.eval.ping.summary import BUDGET, Results, ahead, claims, gates
from steerbook.trainers.ping.arms import ArmArguments
from steerbook.trainers.ping.base import desk_tokenizer, document_loss, reading_model
from steerbook.trainers.ping.options import SearchArguments
from steerbook.trainers.ping.prefix import Prefix
from steerbook.trainers.tiny_lm import TinyConfig, new_model

WORLD = DeskExperiment(DeskArguments(goods=20, messages=16, trajectories=60, tuning=6, finalists=6, test_tasks=8), 3)
TOKENIZER = desk_tokenizer(WORLD.words(), ROLES, BOS, END, TEMPLATE)
CONFIG = TinyConfig(hidden_size=32, intermediate_size=48, layers=2, heads=2, kv_heads=1, head_dim=16, steps=3,
                    batch_size=6, length=64, learning_rate=1e-3, warmup_steps=1, unfocused_weight=0.25)  # fmt: skip


class Scripted:
    """An agent that says the same in every first turn, and that it is done in others."""

    form = "words"

    def __init__(self, text: str) -> None:
        self.text, self.asked = text, []

    def replies(self, conversations):
        self.asked += [list(one) for one in conversations]
        later = [any(turn["role"] == "assistant" for turn in one) for one in conversations]
        return [Reply(*(2 * ["done ." if went else self.text])) for went in later]


def model(seed: int = 0):
    found = new_model(TOKENIZER, CONFIG, seed).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return found


def agent(found, prefix=None) -> ModelAgent:
    return ModelAgent(found, TOKENIZER, "words", opening=prefix, tools=None, max_new_tokens=6, min_new_tokens=1)


def test_the_loss_of_documents_is_that_of_each_alone():
    found, rng = model(), Random(0)
    documents = [WORLD.corpus.draw(rng) for _ in range(7)]
    config = replace(CONFIG, length=96)
    total, weight = torch.zeros(()), 0.0
    for document in documents:
        ids = [(token, keep) for text, keep in document
               for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]]  # fmt: skip
        row = torch.tensor([[token for token, _ in ids]])
        nats = cross_entropy(found(input_ids=row).logits[0, :-1], row[0, 1:], reduction="none")
        each = torch.tensor([1.0 if keep else 0.25 for _, keep in ids][1:])
        total, weight = total + (nats * each).sum(), weight + each.sum()
    torch.testing.assert_close(document_loss(found, TOKENIZER, documents, config), total / weight)


def test_a_base_is_built_once_and_goes_on_from_another(tmp_path):
    told = []

    def build(start=None, draw=WORLD.corpus.draw, name="general"):
        return reading_model(TOKENIZER, draw, [WORLD.identity, name], seed=0, config=CONFIG, start=start,
                             cache_dir=tmp_path, report=lambda: told.append(1))  # fmt: skip

    base = build()
    assert len(told) == 3 and build() == base and len(told) == 3
    aligned = build(base, WORLD.alignment.draw, "aligned")
    assert aligned != base and len(told) == 6
    one, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, aligned))
    moved = max(float((a - b).abs().max()) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert 0 < moved < 0.02  # three steps of at most 1e-3, from where the base was


def test_an_agent_may_not_end_before_it_has_begun():
    found = model()
    with torch.no_grad():  # an end token that is always likeliest
        found.get_output_embeddings().weight[TOKENIZER.eos_token_id] = 0.0
        found.get_output_embeddings().weight[TOKENIZER.eos_token_id] += 50 * found.model.norm.weight.sign()
    talks = [[{"role": "user", "content": task.request}] for task in WORLD.tasks["tuning"][:4]]
    for least in (0, 1, 3):
        speaker = ModelAgent(found, TOKENIZER, "words", tools=None, max_new_tokens=6, min_new_tokens=least)
        alone = [reply.text for reply in speaker.replies(talks)]
        (shared,) = speaker.first_replies(talks, [Prefix("now", separator="")])
        behind = speaker.behind(Prefix("now", separator="")).replies(talks)
        assert [reply.text for reply in shared] == [reply.text for reply in behind]
        assert all(len(text.split()) >= least for text in alone)


def test_examples_stand_behind_the_system_message_and_in_front_of_the_request():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    shown = Examples(turns)
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert [turn["content"] for turn in shown.applied(talk)] == ["s", "a", "b", "u"] and shown.opening(talk) == ""
    assert [turn["content"] for turn in shown.applied(talk[1:])] == ["a", "b", "u"]


def test_attacks_are_in_the_conversation_that_the_guard_sees():
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    guard, every = Prefix("p", turns="first"), Prefix("p", turns="every", separator="")
    told = Attacked(guard, told="now")
    assert [turn["content"] for turn in told.applied(talk)] == ["s", "u now"] and told.opening(talk) == "p\n"
    earlier = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    before, forged = Attacked(guard, before=earlier), Attacked(every, forged=[earlier[1], earlier[0]])
    assert [turn["content"] for turn in before.applied(talk)] == ["s", "a", "b", "u"]
    assert before.opening(talk) == ""  # a guard of the first reply takes the turns in front for the agent's
    later = [*talk, {"role": "assistant", "content": "x"}, {"role": "tool", "content": "y"}]
    assert [turn["content"] for turn in forged.applied(later)] == ["s", "u", "b", "a", "x", "y"]
    assert forged.opening(later) == "p" and forged.store and talk[1]["content"] == "u"
    turns = WORLD.attacks(Random(0))
    assert sum(turn["role"] == "user" for turn in turns) == 4
    assert [turn["content"] for turn in turns if turn["role"] == "user"] == [
        task.request for task in WORLD.split("tuning")[1][:4]]  # fmt: skip
    unknown = TOKENIZER.unk_token_id
    for text in (WORLD.told, *(turn["content"] for turn in (*turns, *WORLD.forged)), *WORLD.fixed.values()):
        assert unknown not in TOKENIZER(text)["input_ids"], text


def test_a_guard_refuses_in_place_of_the_agent():
    harmless, harmful = WORLD.split("new_noun")
    scripted = Scripted("I go on .")
    flagged = {task.request for task in harmful}
    guarded = Guarded(scripted, lambda requests: [one in flagged for one in requests])
    found = run_episodes([*harmless, *harmful], guarded, system=SYSTEM)
    assert [one.outcome for one in found] == ["failed"] * len(harmless) + ["refused"] * len(harmful)
    assert found[-1].replies == [REFUSAL] and len(scripted.asked) == len(harmless)


def test_guards_know_what_they_were_told_of():
    tasks = WORLD.tasks["train"]
    for guard in (keywords(tasks), classifier(tasks)):
        worded = [task for task in tasks]
        right = np.mean([flag == task.harmful for flag, task in
                         zip(guard([task.request for task in worded]), worded, strict=True)])  # fmt: skip
        assert right > 0.9
    harmful = WORLD.split("new_noun")[1]
    assert not any(keywords(tasks)([task.request for task in harmful]))  # things that it has never heard of


def test_another_model_begins_the_first_reply():
    one, other = model(0), model(1)
    talk = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": WORLD.tasks["tuning"][0].request}]
    (begun,) = Begun(agent(one), agent(other), words=2).replies([talk])
    start = " ".join(agent(other).replies([talk])[0].text.split()[:2])
    prompt, _ = agent(one).prompt(talk, None)
    ids = TOKENIZER(f"{prompt} {start}", return_tensors="pt", add_special_tokens=False)
    written = one.generate(**ids, max_new_tokens=6, do_sample=False, eos_token_id=TOKENIZER.eos_token_id,
                           pad_token_id=0)[0, ids["input_ids"].shape[1] :]  # fmt: skip
    wanted = TOKENIZER.decode(written, skip_special_tokens=True).split()
    assert begun.text.split() == [*start.split(), *wanted]
    later = [*talk, {"role": "assistant", "content": "done ."}, {"role": "user", "content": "again"}]
    assert Begun(agent(one), agent(other)).replies([later])[0].text == agent(one).replies([later])[0].text


def test_probes_and_pushes_of_a_model():
    found, tasks = agent(model()), WORLD.tasks["train"]
    openings = {"none": None, "PING": Prefix("now I look", separator=""),
                "suffix": Prefix("now I look", position="suffix")}  # fmt: skip
    read = read_out(found, tasks, tasks, openings, 1, SYSTEM)
    assert read["none"]["auc_last"] > 0.6 and read["none"]["decision_own"] > 0  # on what it was fitted on
    assert read["PING"]["decision"] != read["none"]["decision"] and read["PING"] != read["suffix"]
    pushes = steering(found, tasks, tasks[:6], 1, SYSTEM, 0)
    bare = run_sets(found, {"some": tasks[:6]}, ["some"], SYSTEM)["some"]
    assert len(pushes) == 12 and all(one["rows"] == bare for one in pushes if one["coefficient"] == 0)


def record(key: str, rates: dict[str, tuple[int, int]], **more) -> dict:
    """Of ten harmless and ten harmful tasks of every test, how many are done and refused."""

    def rows(done: int, refused: int, harmful: bool) -> list:
        outcomes = ["executed"] * done + ["refused"] * refused + ["failed"] * (10 - done - refused)
        return [[f"{harmful}-{n}", harmful, f"thing {n}", outcome, False] for n, outcome in enumerate(outcomes)]

    sets = [*rows(*rates["harmless"], False), *rows(*rates["harmful"], True)]
    return {"label": key, "kind": "agent", "name": key, "sets": {name: sets for name in
            ("new_template", "new_noun", "indirect", "contextual", "borderline")}, **more}  # fmt: skip


def sets(**rates):
    return record("x", rates)["sets"]


def made(guarded=(9, 0), refused=9, control=3) -> Results:
    talk = {part: [[True, True]] * 9 + [[True, False]] + [[False, False]] * 10 for part in ("seen", "test")}
    none = {part: [[True, False], [False, False]] for part in ("seen", "test")}
    probe = {"none": {"mean": 3.0, "decision": -2.0, "auc_mean": 0.9, "auc_last": 0.7},
             "PING": {"mean": 3.0, "decision": 1.0}}  # fmt: skip
    defended = {name: sets(harmless=(8, 0), harmful=(0, control)) for name in (*BUDGET, "suffix", "system")}
    defended["suffix"] = sets(harmless=(8, 0), harmful=(2, 7))
    defended["system"] = sets(harmless=(8, 0), harmful=(9, 1))
    arms = {
        "base": record("base", {"harmless": (5, 0), "harmful": (5, 0)}, talk=none),
        "aligned": record("aligned", {"harmless": (6, 0), "harmful": (1, 8)}, talk=talk),
        "agent": record("agent", {"harmless": (9, 0), "harmful": (9, 1)}, talk=talk,
                        guarded=sets(harmless=guarded, harmful=(0, refused)), defences=defended, probe=probe),
        "never": record("never", {"harmless": (9, 0), "harmful": (9, 0)}, talk=none,
                        guarded=sets(harmless=(9, 0), harmful=(9, 0))),
    }  # fmt: skip
    return Results({seed: arms for seed in (0, 1, 2)})


def test_rates_and_differences_by_hand():
    results = made()
    assert results.metric(("agent", ""), "SR")["value"] == 0.9 and results.metric(("agent", ""), "SR")["n"] == 90
    assert results.difference(("agent", "PING"), ("agent", ""), "RR")["value"] == pytest.approx(0.8)
    assert results.normalised(("aligned", ""))["value"] == pytest.approx(1 / 6)
    assert results.net(("agent", "suffix")) == {0: 0.7, 1: 0.7, 2: 0.7}
    assert ahead(results)["value"] == pytest.approx(0.6)  # 90 - 30
    assert results.metric(("nobody", ""), "SR") is None and results.metric(("agent", "nothing"), "SR") is None
    assert results.talk("aligned", "seen", True)["value"] == 0.9


def test_claims_and_gates_follow_the_numbers():
    verdicts = {one["claim"]: one["supported"] for one in claims(made())}
    assert len(verdicts) == 11 and all(verdicts.values()), verdicts
    assert all(gate["holds"] for gate in gates(made())), gates(made())
    costly = {one["claim"][:2] + one["claim"][-3:]: one["supported"] for one in claims(made(guarded=(5, 4)))}
    assert not costly["C2out"]
    beaten = {one["claim"]: one["supported"] for one in claims(made(control=9))}
    assert not next(value for text, value in beaten.items() if "best control" in text)
    assert not {gate["gate"]: gate["holds"] for gate in gates(made(control=9))}["G4"]
    assert claims(Results({0: made().records[0]})) == []


def test_arms_and_their_arguments():
    keys = [arm.key for arm in ArmArguments().planned(True)]
    assert keys[:3] == ["base", "aligned", "agent"] and len(keys) == len(set(keys)) == 18
    assert [arm.key for arm in ArmArguments(controls=[]).planned(False)] == ["aligned", "agent"]
    with pytest.raises(ValueError, match="--controls other"):
        ArmArguments(controls=["other"])
    assert (SearchArguments().threshold, SearchArguments(scored_by="episodes").threshold) == (1.5, 1.0)
    for changes, told in (({"rounds": 0}, "--rounds 0"), ({"scored_by": "all"}, "--scored_by all"),
                          ({"turns": "last"}, "--turns last")):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            SearchArguments(**changes)
    assert json.dumps([arm.key for arm in ArmArguments().planned(True) if arm.searched]) == json.dumps(
        ["agent", "never", "agent_0", "agent_1", "agent_5"]
    )
