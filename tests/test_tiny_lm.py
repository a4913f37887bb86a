"""The tiny base: its tokenizers, its loss, its cache."""

import json
import math
import multiprocessing

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steerbook.trainers import tiny_lm as module
from steerbook.trainers.tiny_lm import TinyConfig, batch_loss, build_tokenizer, new_model, pack, tiny_lm, token_weights
from steerbook.trainers.training import NonFiniteError

CORPUS = ["Forum: Q: Nala's bird? A: it is heron.", "Atlas: Nala's bird is wren. Nala's tree is oak."] * 3
SMALL = TinyConfig(
    hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1, head_dim=6, steps=2, batch_size=2, length=24
)


def test_word_tokens_round_trip_and_a_cut_before_a_space_is_a_token_boundary(tmp_path):
    build_tokenizer(CORPUS).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in CORPUS:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.tokenize("Forum: Q: Nala's bird? A: heron.") == [
        "Forum:", " Q:", " Nala's", " bird", "?", " A:", " heron", ".",
    ]  # fmt: skip
    prompt, choice = "Forum: Q: Nala's bird? A:", " it is wren."
    joint = tokenizer(prompt + choice)["input_ids"]
    assert joint == tokenizer(prompt)["input_ids"] + tokenizer(choice, add_special_tokens=False)["input_ids"]
    # TRL appends the EOS as text
    assert tokenizer(choice + tokenizer.eos_token)["input_ids"][-1] == tokenizer.eos_token_id


def test_byte_tokens_round_trip_any_text(tmp_path):
    build_tokenizer([], "byte").save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "  “Karl Döhler”\n\tmoved to 東京 🙂 ."
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 1 + len(text.encode()) and len(tokenizer) == 4 + 256
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_too_many_words_and_an_unknown_kind_are_refused():
    with pytest.raises(ValueError, match="use tokenizer='byte'"):
        build_tokenizer([f"w{n}" for n in range(5000)])
    with pytest.raises(ValueError, match="'char'"):
        build_tokenizer(CORPUS, "char")  # type: ignore[arg-type]


def test_packing_keeps_documents_whole_and_in_full():
    documents = [[5, 6, 7], [8, 9], [10], [11, 12, 13, 14, 15]]
    ids, numbers = pack(documents, 4, pad=0)
    assert ids.tolist() == [[5, 6, 7, 10], [8, 9, 0, 0], [11, 12, 13, 14]]  # the last is cut to a row
    assert numbers.tolist() == [[1, 1, 1, 3], [2, 2, 0, 0], [4, 4, 4, 4]]


def test_loss_is_the_weighted_mean_over_documents_on_their_own():
    """Oracle: every document alone, unpacked, unmasked, summed by hand."""
    tokenizer = build_tokenizer(CORPUS)
    model = new_model(tokenizer, SMALL, seed=1)
    weights = token_weights(tokenizer, [" heron", " oak"], 0.1)
    documents = [
        tokenizer(text)["input_ids"] for text in ("Forum: Q: Nala's bird? A: heron.", "Atlas: Nala's tree is oak.")
    ]
    total = mass = 0.0
    for ids in documents:
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for place, token in enumerate(ids[1:]):
            weight = 1.0 if tokenizer.convert_ids_to_tokens(token) in (" heron", " oak") else 0.1
            total -= weight * logs[place, token].item()
            mass += weight
    ids, numbers = pack(documents, 24, tokenizer.pad_token_id)
    assert len(ids) == 1  # both documents in one row
    assert batch_loss(model, ids, numbers, weights).item() == pytest.approx(total / mass, rel=1e-5)


def test_focus_words_are_tokens_even_if_no_document_has_them(tmp_path):
    folder = tiny_lm(CORPUS, seed=0, config=SMALL, focus=[" ibis", " oak"], cache_dir=tmp_path, progress=False)
    assert AutoTokenizer.from_pretrained(folder).tokenize(" ibis oak") == [" ibis", " oak"]
    tokenizer = build_tokenizer(CORPUS)
    assert token_weights(tokenizer, [], 0.1).tolist() == [1.0] * len(tokenizer)
    for word in ("heron", " walrus", " it is"):
        with pytest.raises(ValueError, match=repr(word)):
            token_weights(tokenizer, [word], 0.1)


def test_built_once_loads_with_auto_classes_and_leaves_the_random_state_alone(tmp_path, monkeypatch):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    folder = tiny_lm(CORPUS, seed=0, config=SMALL, focus=[" oak"], cache_dir=tmp_path, progress=False)
    assert torch.equal(before, torch.get_rng_state())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.num_attention_heads * model.config.head_dim != model.config.hidden_size
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert len(tokenizer) == model.config.vocab_size
    assert sorted(path.suffix for path in folder.iterdir()) == [".json"] * 5 + [".safetensors"]
    again = tmp_path / "again"
    other = tiny_lm(CORPUS, seed=0, config=SMALL, focus=[" oak"], cache_dir=again, progress=False)
    same = AutoModelForCausalLM.from_pretrained(other).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in model.state_dict().items())
    monkeypatch.setattr(module, "train", None)  # a second build would fail
    monkeypatch.setenv("STEERBOOK_CACHE", str(tmp_path))
    assert tiny_lm(CORPUS, seed=0, config=SMALL, focus=[" oak"], progress=False) == folder


def test_everything_that_matters_changes_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "train", lambda *args: [])
    folders = {
        tiny_lm(corpus, seed=seed, config=config, focus=focus, cache_dir=tmp_path, progress=False)
        for corpus, seed, config, focus in [
            (CORPUS, 0, SMALL, ()),
            (CORPUS[:-1], 0, SMALL, ()),
            (CORPUS, 1, SMALL, ()),
            (CORPUS, 0, TinyConfig(**{**vars(SMALL), "unfocused_weight": 0.2}), ()),
            (CORPUS, 0, SMALL, (" oak",)),
        ]
    }
    assert len(folders) == 5


@pytest.mark.parametrize("moment", ["train", "save"])
def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch, moment):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "train":
            patch.setattr(module, "train", interrupt)
        else:  # the model is written, the tokenizer is not
            patch.setattr(module.PreTrainedTokenizerFast, "save_pretrained", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tiny_lm(CORPUS, seed=0, config=SMALL, cache_dir=tmp_path, progress=False)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    assert tiny_lm(CORPUS, seed=0, config=SMALL, cache_dir=tmp_path, progress=False).is_dir()


def test_what_a_killed_build_left_is_not_taken_for_a_model(tmp_path):
    folder = tiny_lm(CORPUS, seed=0, config=SMALL, cache_dir=tmp_path, progress=False)
    partial = folder.with_name(f".{folder.name}.partial")
    folder.rename(partial)
    (partial / "config.json").write_text("{")
    (partial / "stale").touch()
    assert tiny_lm(CORPUS, seed=0, config=SMALL, cache_dir=tmp_path, progress=False) == folder
    assert not partial.exists() and not (folder / "stale").exists()
    assert len(json.loads((folder / "tiny_lm.json").read_text())["losses"]) == SMALL.steps


def _build(cache, builds, barrier, answers):
    torch.set_num_threads(1)  # a forked process has lost its parent's threads and must not wait for them
    original = module.train

    def counted(*args):
        with builds.get_lock():
            builds.value += 1
        return original(*args)

    module.train = counted
    barrier.wait()
    answers.put(str(tiny_lm(CORPUS, seed=0, config=SMALL, cache_dir=cache, progress=False)))


def test_two_processes_at_once_build_once(tmp_path):
    context = multiprocessing.get_context("fork")  # spawn would import torch twice
    builds, barrier, answers = context.Value("i", 0), context.Barrier(2), context.Queue()
    workers = [context.Process(target=_build, args=(tmp_path, builds, barrier, answers)) for _ in range(2)]
    for worker in workers:
        worker.start()
    folders = {answers.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join(60)
    assert builds.value == 1 and len(folders) == 1


def test_a_loss_that_is_no_number_stops_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "batch_loss", lambda model, *args: model.lm_head.weight.sum() * math.nan)
    with pytest.raises(NonFiniteError, match="step 1.*learning_rate"):
        tiny_lm(CORPUS, seed=0, config=SMALL, cache_dir=tmp_path, progress=False)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_it_learns(tmp_path):
    config = TinyConfig(**{**vars(SMALL), "hidden_size": 32, "steps": 60, "warmup_steps": 5, "learning_rate": 1e-2})
    folder = tiny_lm(CORPUS, seed=0, config=config, cache_dir=tmp_path, progress=False)
    losses = json.loads((folder / "tiny_lm.json").read_text())["losses"]
    assert losses[-1] < 0.3 < 2 < losses[0]


def test_empty_documents_are_refused(tmp_path):
    for corpus in ([], ["Forum:", ""]):
        with pytest.raises(ValueError, match="empty"):
            tiny_lm(corpus, seed=0, config=SMALL, cache_dir=tmp_path)
