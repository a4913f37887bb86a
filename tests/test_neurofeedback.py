"""Neurofeedback: axes, reports in one forward pass, baselines that see the same examples, control, and the command."""

import json
import re

import numpy as np
import pytest
import torch
from chat_models import CHAT, chat_model, chat_tokenizer
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from steerbook.eval.generation import generate
from steerbook.eval.neurofeedback import arms, control
from steerbook.eval.neurofeedback.__main__ import main
from steerbook.eval.neurofeedback.axes import fit_axes, label_edges, sentence_vectors, span_vector
from steerbook.eval.neurofeedback.baselines import penalty, residuals, running_logits, word_features
from steerbook.eval.neurofeedback.control import request, steer
from steerbook.eval.neurofeedback.dialogue import ASK, SYSTEM, Turn, dialogue
from steerbook.eval.neurofeedback.outcomes import bins, effect, resampled
from steerbook.eval.neurofeedback.reporting import judged, label_logits

WHO = ("The dog", "My aunt", "A friend", "The clerk", "Our team")
GOOD, BAD = ("helped", "thanked", "fed"), ("robbed", "hurt", "cheated")
SENTENCES = [f"{who} {verb} {whom}" for verb in (*GOOD, *BAD) for who in WHO for whom in ("us", "them")]
KINDS = np.array([int(any(verb in text for verb in GOOD)) for text in SENTENCES])


def tiny(seed, kind="word"):
    corpus = [*SENTENCES, SYSTEM, ASK, request(0), request(1), "<user><assistant><system>\n [Score: {0}]{1}{2}{3}"]
    tokenizer = chat_tokenizer(kind, corpus)
    return chat_model(tokenizer, seed, layers=3), tokenizer


@pytest.fixture(scope="module")
def pair():
    return tiny(0), tiny(1)


@pytest.mark.parametrize("kind", ["word", "byte"])
def test_where_sentences_and_scores_stand(kind):
    _, tokenizer = tiny(0, kind)
    turns = [Turn(text, label) for text, label in zip(SENTENCES[:4], (1, 0, 0, 1), strict=True)]
    made = dialogue(tokenizer, [*turns, Turn(SENTENCES[0], None, request(1))], {}, SYSTEM)
    said = [tokenizer.decode(made.ids[start:stop]).strip() for start, stop in made.sentences]
    assert said == [*SENTENCES[:4], SENTENCES[0]]
    assert [tokenizer.decode(made.ids[place]) for place in made.scores] == ["1", "0", "0", "1"]
    assert made.before.endswith(f"{SENTENCES[0]} [Score: {{") and made.ids[0] == tokenizer.bos_token_id


def test_scores_that_share_a_token_and_templates_that_change_texts_are_refused(pair):
    _, tokenizer = tiny(0)
    tokenizer.add_tokens(["{1", "{0"])
    with pytest.raises(ValueError, match="score 1 is not a token of its own"):
        dialogue(tokenizer, [Turn(SENTENCES[0], 1)], {})
    shouting = tiny(0)[1]
    shouting.chat_template = CHAT.replace("m.content", "m.content | upper")
    with pytest.raises(ValueError, match="does not keep user's text"):
        dialogue(shouting, [Turn(SENTENCES[0], 1)], {})


def test_reports_in_one_pass_against_a_pass_for_each(pair):
    model, tokenizer = pair[0]
    labels = [1, 0, 1, 1, 0, 0, 1, 0]
    found = label_logits(model, tokenizer, SENTENCES[:8], labels)
    for count in range(8):
        turns = [Turn(text, label) for text, label in zip(SENTENCES[: count + 1], labels, strict=False)]
        made = dialogue(tokenizer, turns, {}, SYSTEM)
        with torch.no_grad():
            logits = model(torch.tensor([made.ids[: made.scores[-1]]])).logits[0, -1]
        wanted = logits[tokenizer.convert_tokens_to_ids(["0", "1"])]
        assert np.allclose(found[count], wanted, atol=1e-4)
    assert np.ptp(found[:, 1] - found[:, 0]) > 1e-3  # what stands before does matter


def test_right_labels_and_nats_by_hand():
    correct, nats = judged([[0.0, 0.0], [2.0, 1.0], [0.0, 3.0]], [1, 1, 0])
    assert correct.tolist() == [1.0, 0.0, 0.0]  # a tie counts as the higher label
    assert nats == pytest.approx([np.log(2), np.log(1 + np.e), np.log(1 + np.exp(3))])


def test_a_sentences_vector_is_the_mean_over_its_tokens(pair):
    model, tokenizer = pair[0]
    made = dialogue(tokenizer, [Turn(SENTENCES[1], 0), Turn(SENTENCES[2])], {}, SYSTEM)
    start, stop = made.sentences[1]
    with torch.no_grad():
        states = model(torch.tensor([made.ids]), output_hidden_states=True).hidden_states
    found = span_vector(model, made.ids, (start, stop))
    assert found.shape == (3, model.config.hidden_size)
    for layer in range(3):
        assert np.allclose(found[layer], states[layer + 1][0, start:stop].mean(0), atol=1e-5)


def test_axes_against_scikit_learn():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 2, 6)) * np.arange(1, 7) + 3.0
    kinds = (vectors[:, 1, 0] + rng.normal(size=40) > 3).astype(int)
    axes = fit_axes(vectors, kinds, [1], ["lr", "pc1", "pc3"])
    new = rng.normal(size=(5, 6))
    classifier = LogisticRegression(max_iter=10_000).fit(vectors[:, 1], kinds)
    scale = classifier.decision_function(vectors[:, 1]).std()
    assert axes[1, "lr"].scores(new) == pytest.approx(classifier.decision_function(new) / scale)
    components = PCA(3).fit(vectors[:, 1])
    wanted = components.transform(new) / components.transform(vectors[:, 1]).std(0)
    for name, place in (("pc1", 0), ("pc3", 2)):
        assert np.abs(axes[1, name].scores(new)) == pytest.approx(np.abs(wanted[:, place]))
        direction = axes[1, name].direction
        assert direction[np.abs(direction).argmax()] > 0
    labels = axes[1, "pc1"].labels(vectors[:, 1])
    assert labels.sum() == 20 and set(labels) == {0, 1}  # the median
    with pytest.raises(ValueError, match="pc1 to pc6"):
        fit_axes(vectors, kinds, [0], ["pc7"])
    with pytest.raises(ValueError, match="two kinds"):
        fit_axes(vectors, np.zeros(40), [0], ["lr"])


def test_finer_labels_are_quantiles_of_either_side():
    scores = [-4.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert label_edges(scores, 4).tolist() == [-2.5, 0.0, 3.0]
    assert np.searchsorted(label_edges(scores, 4), scores, side="right").tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert len(label_edges(scores, 8)) == 7
    for levels in (3, 12):
        with pytest.raises(ValueError, match="levels must be even"):
            label_edges(scores, levels)


def test_guessing_sees_only_what_came_before():
    rng = np.random.default_rng(1)
    features = rng.normal(size=(12, 40))
    labels = np.array([1, 1, 0, 1, 0, 0, 1, 0, 1, 1, 0, 1])
    found = running_logits(features, labels, 2, 3.0)
    assert np.exp(found[0]) == pytest.approx([0.5, 0.5]) and np.exp(found[2]) == pytest.approx([0.25, 0.75])
    for place in (3, 7, 11):  # in all 40 dimensions, where ours turned them to 12
        direct = LogisticRegression(C=3.0, max_iter=10_000, tol=1e-8).fit(features[:place], labels[:place])
        assert np.exp(found[place]) == pytest.approx(direct.predict_proba(features[place : place + 1])[0], abs=1e-3)
    three = running_logits(features, np.array([0, 2, 0, 1, 2, 1, 0, 2, 1, 0, 1, 2]), 3, 1.0)
    assert np.exp(three).sum(1) == pytest.approx(np.ones(12))


def test_words_tell_what_a_sentence_is_about_and_residuals_do_not():
    order = np.random.default_rng(0).permutation(60)
    fit, rest = order[:30], order[30:]
    texts = np.array(SENTENCES)
    features = word_features(list(texts[fit]), list(texts[rest]))
    strength = penalty(features[0], KINDS[fit], 30)
    correct, _ = judged(running_logits(features[1], KINDS[rest], 2, strength), KINDS[rest])
    assert correct[15:].mean() > 0.9 and strength >= 1.0
    rng = np.random.default_rng(2)
    noise = rng.normal(size=60)
    scores = 3.0 * KINDS + noise
    _, left = residuals(features[0], scores[fit], features[1], scores[rest])
    assert np.corrcoef(left, noise[rest])[0, 1] > 0.8
    assert abs(np.corrcoef(left, KINDS[rest])[0, 1]) < 0.4 < np.corrcoef(scores[rest], KINDS[rest])[0, 1]


@pytest.mark.parametrize("of", ["sentences", "orders"])
def test_the_bootstrap_draws_orders_and_sentences(of):
    """Values that depend on one of the two alone: the spread of a mean over so many of them."""
    rng = np.random.default_rng(3)
    which = np.stack([rng.permutation(50) for _ in range(30)])
    effects = rng.normal(size=50 if of == "sentences" else 30)
    values = effects[which] if of == "sentences" else np.repeat(effects[:, None], 50, axis=1)
    drawn = resampled(values[None], which)[:, 0]
    assert drawn.mean() == pytest.approx(values.mean(), abs=0.02)
    assert drawn.std() == pytest.approx(effects.std() / np.sqrt(len(effects)), rel=0.08)


def test_bins_and_effect_sizes_by_hand():
    assert bins(10) == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 10)] and bins(8)[-1] == (4, 8)
    found = effect([1.0, 2.0, 3.0], [0.0, 1.0, 2.0])
    assert found["value"] == pytest.approx(1.0)
    error = np.sqrt(6 / 9 + 1 / 12)
    assert (found["low"], found["high"]) == pytest.approx((1 - 1.96 * error, 1 + 1.96 * error))
    for groups in (([1.0], [1.0, 2.0]), ([1.0, 1.0], [1.0, 1.0])):
        with pytest.raises(ValueError, match=r"effect size"):
            effect(*groups)


def half(places, vectors):
    rng = np.random.default_rng(5)
    return arms.Half([SENTENCES[p] for p in places], KINDS[places], vectors[places], rng.normal(size=(len(places), 4)))


def test_only_a_look_inside_puts_a_model_ahead(monkeypatch):
    """Hidden states of which the input says nothing; a model that reports them, and one that cannot."""
    rng = np.random.default_rng(4)
    vectors = rng.normal(size=(60, 1, 5))
    order = rng.permutation(60)
    fit, rest = half(order[:30], vectors), half(order[30:], vectors)
    axis = fit_axes(fit.vectors, fit.kinds, [0], ["pc1"])[0, "pc1"]
    true = dict(zip(rest.texts, axis.scores(rest.vectors[:, 0]), strict=True))

    def knowing(model, tokenizer, sentences, labels, levels, *, template):
        inside = np.array([true[one] if model == "self" else 0.0 for one in sentences])
        return np.stack([-inside, inside + 1e-6 * rng.normal(size=len(inside))], axis=1)

    monkeypatch.setattr(arms, "label_logits", knowing)
    orders = np.stack([rng.permutation(30) for _ in range(8)])
    steps = []
    found = arms.report(axis, fit, rest, orders, ("self", None), ("other", None), step=lambda: steps.append(1))
    assert len(steps) == 8
    accuracy = {name: one["value"] for name, one in found.accuracies().items()}
    assert accuracy[arms.SELF] > 0.75 > accuracy[arms.SHUFFLED] and accuracy[arms.RELABELLED] > 0.7
    assert max(accuracy[name] for name in (*arms.BASELINES, arms.RELABELLED_INPUT)) < 0.75
    assert accuracy[arms.IDEAL] > 0.7
    ahead = found.headline()
    best = max(accuracy[name] for name in arms.BASELINES)
    assert ahead["value"] == pytest.approx(accuracy[arms.SELF] - best)
    assert ahead["low"] < ahead["value"] < ahead["high"] + 0.2
    assert found.cross_entropies()[arms.OTHER]["value"] == pytest.approx(np.log(2), abs=1e-3)
    curve = found.curve()
    assert [one["from"] for one in curve] == [0, 1, 2, 4, 8, 16] and curve[-1]["to"] == 29


def test_control_is_counterbalanced(monkeypatch, pair):
    """A model that moves by 2 along the first of two axes towards the side that is asked for, and one that follows
    the digit instead, whatever it means."""
    model, tokenizer = pair[0]
    rng = np.random.default_rng(6)
    vectors = rng.normal(size=(60, 1, 4))
    axes = list(fit_axes(vectors, KINDS, [0], ["pc1", "pc2"]).values())
    sides = dict(zip(SENTENCES, (axes[0].scores(vectors[:, 0]) >= axes[0].edges[0]).astype(int), strict=True))
    base = dict(zip(SENTENCES, vectors, strict=True))

    def moving(model, ids, span, follow):
        text = tokenizer.decode(ids[: span[1]])
        shown = re.findall(r"assistant\s*>\s*(.*?) \[Score:\s?\{(\d)", text)
        wanted = int(re.findall(r"with the score \{(\d)", text)[-1])
        sentence, label = shown[0]
        turned = sides[sentence.strip()] ^ int(label)
        said = tokenizer.decode(ids[span[0] : span[1]]).strip()
        side = wanted ^ turned if follow == "side" else wanted
        return base[said] + 2.0 * (side - 0.5) * axes[0].scale * axes[0].direction

    def run(follow):
        monkeypatch.setattr(control, "span_vector", lambda *given: moving(*given, follow))
        return steer(model, tokenizer, axes, "pc1", SENTENCES, vectors[:, 0], examples=3, repeats=6, seed=0)

    moved = run("side")
    d = moved.effects()
    low, high = (moved.scores[:, :, side, 0].ravel() for side in (0, 1))  # both assignments, each for itself
    assert high - low == pytest.approx(np.full(12, 2.0)) and d["pc1"]["n"] == 24
    assert d["pc1"]["value"] == pytest.approx(2.0 / np.sqrt((low.var(ddof=1) + high.var(ddof=1)) / 2))
    assert d["pc2"]["value"] == pytest.approx(0.0, abs=1e-9) and moved.precision() == pytest.approx(2.0)
    assert run("digit").effects()["pc1"]["value"] == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ValueError, match="more than 60 sentences"):
        steer(model, tokenizer, axes, "pc1", SENTENCES, vectors[:, 0], examples=60, repeats=2, seed=0)


def test_sampled_texts_depend_on_their_seed_alone(pair):
    model, tokenizer = pair[0]
    state = torch.random.get_rng_state()
    texts = [
        generate(model, tokenizer, ["The dog"], max_new_tokens=12, temperature=1.5, seed=seed) for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2] and torch.equal(state, torch.random.get_rng_state())
    greedy = generate(model, tokenizer, ["The dog"], max_new_tokens=12)
    assert greedy == generate(model, tokenizer, ["The dog"], max_new_tokens=12, temperature=1e-4, seed=3)


@pytest.fixture(scope="module")
def folders(pair, tmp_path_factory):
    where = tmp_path_factory.mktemp("models")
    for name, (model, tokenizer) in zip("ab", pair, strict=True):
        model.save_pretrained(where / name)
        tokenizer.save_pretrained(where / name)
    rows = [{"text": text, "label": int(kind)} for text, kind in zip(SENTENCES, KINDS, strict=True)]
    (where / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return where


def flags(folders, *more):
    return ["--model", str(folders / "a"), "--other", str(folders / "b"), "--sentences", str(folders / "rows.jsonl"),
            "--axes", "lr", "pc1", "--layers", "1", "--examples", "8", "--orders", "2", "--repeats", "2",
            "--control_examples", "4", *more]  # fmt: skip


def test_the_command(folders, tmp_path, capsys):
    main(flags(folders, "--explicit", "--out", str(tmp_path / "out")))
    output = capsys.readouterr().out
    for text in ("the model", "another model", "words", "ideal", "implicit", "explicit", "whole 95 % interval"):
        assert text in output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(one["axis"], one["layer"]) for one in found["reports"]] == [("lr", 1), ("pc1", 1)]
    assert set(found["reports"][0]) == {"layer", "axis", "headline", "accuracy", "cross_entropy", "curve"}
    assert len(found["control"]) == 4 and found["chance"] == 0.5
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"results.json", "accuracy.png", "control.png"}
    main(flags(folders, "--levels", "4", "--repeats", "0", "--out", str(tmp_path / "four")))
    assert json.loads((tmp_path / "four" / "results.json").read_text())["chance"] == 0.25


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layers", "3"], "layers 0 to 2"),
        (["--axes", "pc30"], "pc1 to pc29"),
        (["--axes", "lr", "lda"], "known are lr"),
        (["--levels", "5"], "levels must be even"),
        (["--control_examples", "30"], "there are 30 sentences"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_time_is_spent(folders, capsys, more, message, monkeypatch):
    monkeypatch.setattr("steerbook.eval.neurofeedback.__main__.sentence_vectors", None)
    with pytest.raises(SystemExit, match=message):
        main(flags(folders, *more))


def test_bad_sentences_name_their_rows(folders, tmp_path, pair):
    file = tmp_path / "bad.jsonl"
    rows = [
        {"text": "One", "label": 1},
        {"text": "One", "label": 0},
        {"text": "Two", "label": 2},
        {"text": "", "label": 1},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SystemExit) as error:
        main(flags(folders, "--sentences", str(file)))
    for part in ("row 2", "row 3", "row 4", "0 or 1", "non-empty"):
        assert part in str(error.value)
    file.write_text("\n".join(json.dumps({"text": f"t{n}", "label": int(n < 3)}) for n in range(40)))
    with pytest.raises(SystemExit, match="at least 8 each"):
        main(flags(folders, "--sentences", str(file)))


def test_conversations_longer_than_the_model_takes(folders, pair, tmp_path):
    model, tokenizer = tiny(2)
    model.config.max_position_embeddings = 100
    model.save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    with pytest.raises(SystemExit, match="takes 100; give fewer examples"):
        main(flags(folders, "--other", str(tmp_path / "short")))
    assert sentence_vectors(model, tokenizer, SENTENCES[:2]).shape == (2, 3, model.config.hidden_size)
