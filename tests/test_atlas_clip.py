"""aTLAS on CLIP: names of open_clip, exact composition, the zero-shot head, losses and trusted sets against hand-made
ones, and the whole recipe."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, Features, Image, Value
from PIL import Image as Picture
from safetensors.torch import save_file
from torch.nn.functional import conv2d, cross_entropy, layer_norm, scaled_dot_product_attention, softmax
from transformers import CLIPVisionModel

from steerbook.data_builders.atlas import images as image_data
from steerbook.eval.atlas import classify
from steerbook.trainers import Composer, TaskVector
from steerbook.trainers.atlas import adaptation
from steerbook.trainers.atlas.blocks import split_blocks
from steerbook.trainers.atlas.clip_names import from_open_clip, names_of, to_open_clip
from steerbook.trainers.atlas.image_stages import fine_tune, fit_coefficients, given_image_vectors, load_clip, tower
from steerbook.trainers.atlas.images import AtlasImageConfig, AtlasImageTrainer, ImageTrainer
from steerbook.trainers.atlas.zero_shot import ImageReader, ZeroShot, text_head
from steerbook.trainers.tiny_clip import TinyClipConfig, image_processor, new_clip, tiny_clip, word_tokenizer

ROOT = Path(__file__).parents[1]
TEXTS = {"first": [["a b", "b"], ["c"], ["a c d"]], "second": [["d d"], ["b d"]]}
SMALL = TinyClipConfig(hidden_size=16, text_hidden_size=16, projection=12, layers=2, heads=2)


def small_clip(seed=0):
    return new_clip(word_tokenizer(["a b c d"]), SMALL, seed).eval()


def vectors_of(clip, count=3, size=0.05, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        TaskVector(
            {n: size * torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in tower(clip).items()}
        )
        for _ in range(count)
    ]


def rows_of(counts, seed=0):
    """Random images of 8 x 8 pixels; counts: task -> rows."""
    draw = np.random.default_rng(seed)
    rows = [
        {"id": f"{task}-{n}", "group": f"{task}-{n}", "task": task, "label": int(draw.integers(len(TEXTS[task]))),
         "image": Picture.fromarray(draw.integers(0, 255, (8, 8), dtype=np.uint8))}
        for task, count in counts.items() for n in range(count)
    ]  # fmt: skip
    strings = dict.fromkeys(("id", "group", "task"), Value("string"))
    return Dataset.from_list(rows, Features({**strings, "label": Value("int64"), "image": Image()}))


def zero_shot_of(clip):
    return ZeroShot.from_prompts(clip, word_tokenizer(["a b c d"]), image_processor(8), TEXTS)


def config(tmp_path, **values):
    usual = dict(output_dir=str(tmp_path / "run"), crop_scale=1.0, flip=False, disable_tqdm=True, report_to=[],
                 save_strategy="no", logging_steps=1, max_steps=4, per_device_train_batch_size=8,
                 use_cpu=True)  # fmt: skip
    return AtlasImageConfig(**{**usual, **values})


# open_clip


def open_clip_features(weights, pixels, heads):
    """open_clip's vision transformer as its documentation describes it, from its own state dict, with quick GELU."""
    w = {name.removeprefix("visual."): tensor for name, tensor in weights.items()}
    patch = w["conv1.weight"].shape[-1]
    x = conv2d(pixels, w["conv1.weight"], stride=patch).flatten(2).transpose(1, 2)
    x = torch.cat([w["class_embedding"].expand(len(x), 1, -1), x], 1) + w["positional_embedding"]
    width = x.shape[-1]
    x = layer_norm(x, [width], w["ln_pre.weight"], w["ln_pre.bias"], 1e-5)
    layers = 1 + max(int(name.split(".")[2]) for name in w if "resblocks" in name)
    for layer in range(layers):
        p = {name.split(".", 3)[3]: t for name, t in w.items() if name.startswith(f"transformer.resblocks.{layer}.")}
        assert len(p) == 12
        y = layer_norm(x, [width], p["ln_1.weight"], p["ln_1.bias"], 1e-5)
        q, k, v = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in (y @ p["attn.in_proj_weight"].T + p["attn.in_proj_bias"]).chunk(3, -1)
        )
        y = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + y @ p["attn.out_proj.weight"].T + p["attn.out_proj.bias"]
        y = layer_norm(x, [width], p["ln_2.weight"], p["ln_2.bias"], 1e-5)
        y = y @ p["mlp.c_fc.weight"].T + p["mlp.c_fc.bias"]
        x = x + (y * torch.sigmoid(1.702 * y)) @ p["mlp.c_proj.weight"].T + p["mlp.c_proj.bias"]
    return layer_norm(x[:, 0], [width], w["ln_post.weight"], w["ln_post.bias"], 1e-5) @ w["proj"]


def test_open_clip_weights_give_the_same_features():
    clip, pixels = small_clip().double(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    for parameter in clip.parameters():  # biases are 0 and norms 1 at the start
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs = to_open_clip(tower(clip))
    ours = clip.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(open_clip_features(theirs, pixels, SMALL.heads), ours, rtol=0, atol=1e-12)
    back = from_open_clip({f"model.{name}": t for name, t in theirs.items()} | {"model.logit_scale": torch.ones(())})
    assert back.keys() == tower(clip).keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tower(clip).items())
    with pytest.raises(ValueError, match="ResNets are not supported"):
        names_of("layer1.0.conv1.weight")


def test_fused_blocks_are_open_clips_blocks():
    clip = small_clip()
    names = [name for name, _ in clip.named_parameters()]
    for blocks, a_layer in (("tensor", 16), ("fused_qkv", 12)):
        cut = split_blocks(clip, names, blocks)
        assert len(cut) == a_layer * SMALL.layers + 8
    theirs = {tuple(sorted(names_of(name.removeprefix("visual.")))) for name in to_open_clip(tower(clip))}
    assert {tuple(sorted(members)) for members in cut.values()} == theirs


# Composition


@pytest.mark.parametrize("blocks", ["tensor", "fused_qkv", "isotropic"])
def test_composition_of_the_image_tower_is_exact(blocks):
    clip = small_clip().double()
    vectors, head = vectors_of(clip), torch.nn.functional.normalize(torch.randn(5, 12, dtype=torch.float64), dim=1)
    pixels, labels = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.randint(5, (6,))
    text_before = {n: p.clone() for n, p in clip.named_parameters() if n not in tower(clip)}
    composer = Composer(clip, vectors, blocks)
    values = 0.3 * torch.randn_like(composer.coefficients)
    composer.coefficients.data.copy_(values)

    # by autograd, through weights that are functions of the coefficients
    leaf = values.clone().requires_grad_()
    cut = split_blocks(clip, tower(clip), blocks)
    numbers = {name: j for j, members in enumerate(cut.values()) for name in members}
    reference = small_clip().double()
    base = dict(reference.named_parameters())
    composed = {name: base[name] + sum(leaf[i, j] * vectors[i][name] for i in range(3)) for name, j in numbers.items()}

    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.clip = reference

        def forward(self, x):
            return self.clip.get_image_features(pixel_values=x).pooler_output

    def loss_of(features):
        features = features / features.norm(dim=-1, keepdim=True)
        return cross_entropy(clip.logit_scale.exp().detach() * features @ head.T, labels)

    weights = {f"clip.{name}": tensor for name, tensor in composed.items()}
    expected = loss_of(torch.func.functional_call(Features(), weights, (pixels,)))
    expected.backward()

    composer.compose()
    for name, tensor in composed.items():
        torch.testing.assert_close(dict(clip.named_parameters())[name].data, tensor.data, rtol=0, atol=1e-14)
    loss = loss_of(clip.get_image_features(pixel_values=pixels).pooler_output)
    loss.backward()
    assert abs((loss - expected).item()) < 1e-13
    torch.testing.assert_close(composer.coefficients.grad, leaf.grad, rtol=0, atol=1e-12)
    for name, before in text_before.items():
        parameter = dict(clip.named_parameters())[name]
        assert torch.equal(parameter, before) and not parameter.requires_grad and parameter.grad is None
    composer.remove()


# The head


def test_head_and_logits_against_clips_own():
    clip, rows = small_clip(), rows_of({"first": 3, "second": 4})
    tokenizer, zero_shot = word_tokenizer(["a b c d"]), zero_shot_of(clip)
    found = zero_shot.logits(clip, rows, batch_size=3)
    assert found.shape == (7, 3) and np.isneginf(found[3:, 2]).all()
    pixels = image_processor(8)([image.convert("RGB") for image in rows["image"][:]], return_tensors="pt")
    for place, text in ((1, "c"),):  # a class with one prompt: CLIP's own logits
        tokens = tokenizer([text], return_tensors="pt")
        with torch.no_grad():
            own = clip(input_ids=tokens["input_ids"], pixel_values=pixels["pixel_values"]).logits_per_image[:, 0]
        np.testing.assert_allclose(found[:3, place], own[:3], rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # one with two: the direction of their mean
        both = [clip.get_text_features(**_ids(tokenizer, text)).pooler_output[0] for text in ("a b", "b")]
    mean = sum(feature / feature.norm() for feature in both) / 2
    torch.testing.assert_close(zero_shot.heads["first"][0], mean / mean.norm(), rtol=1e-5, atol=1e-6)
    assert classify(rows.remove_columns("image"), found)["metrics"]["accuracy"]["n"] == 7
    with pytest.raises(ValueError, match="class 1 has no prompt"):
        text_head(clip, tokenizer, [["a"], []])
    with pytest.raises(ValueError, match="more than the 16 tokens"):
        text_head(clip, tokenizer, [["a " * 20]])


def _ids(tokenizer, text):
    return {"input_ids": tokenizer([text], return_tensors="pt")["input_ids"]}


def test_reader_keeps_what_fits_and_names_broken_images():
    rows, processor = rows_of({"first": 6}), image_processor(8)
    ids = rows["id"][:]
    one = 3 * 8 * 8 * 4
    reader = ImageReader(processor, cache_bytes=2 * one)
    whole = torch.stack(reader.read(rows, ids, range(6)))
    assert len(reader._kept) == 2
    torch.testing.assert_close(torch.stack(reader.read(rows, ids, [5, 0, 5])), whole[[5, 0, 5]])
    broken = rows.cast_column("image", Image(decode=False)).to_list()
    broken[3]["image"] = {"bytes": broken[3]["image"]["bytes"][:60], "path": None}
    bad = Dataset.from_list(broken, rows.features)
    with pytest.raises(ValueError, match="an image among rows first-2, first-3"):
        ImageReader(processor).read(bad, ids, [2, 3])


# Adaptation without labels


def test_trusted_set_by_hand():
    p = torch.tensor([[.9, .1, .0], [.8, .1, .1], [.7, .2, .1], [.4, .5, .1], [.1, .6, .3], [.4, .2, .4]])  # fmt: skip
    # 6 images, 3 classes: two each. Class 0: rows 0, 1; class 1: rows 4, 3; class 2: rows 5, 4, and 4 is more of 1.
    assert adaptation.trusted_set(p).tolist() == [0, 0, -1, 1, 1, 2]
    many = torch.rand(1000, 2).softmax(1)
    assert [(adaptation.trusted_set(many) == c).sum().item() for c in (0, 1)] == [100, 100]
    assert (adaptation.trusted_set(torch.rand(3, 10).softmax(1)) >= 0).any()  # at least one a class


def test_ufm_loss_by_hand():
    weak = torch.tensor([[8.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 3.0, 0.0], [9.0, 0.0, -math.inf]], requires_grad=True)
    strong = torch.tensor(
        [[1.0, 2.0, 0.0], [0.5, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 1.0, -math.inf]], requires_grad=True
    )
    losses = adaptation.ufm_losses(weak, strong, torch.tensor([-1, -1, 2, -1]), 0.9)
    logs = [[v - math.log(sum(math.exp(x) for x in row)) for v in row] for row in strong.tolist()]
    root = [math.exp(v / 2) for v in (8.0, 0.0, 0.0)]  # softmax's denominator cancels in the normalisation
    sigma = [r / sum(root) for r in root]
    assert sigma[0] > 0.9
    expected = [-sum(s * g for s, g in zip(sigma, logs[0], strict=True)), 0.0, -logs[2][2]]
    root = [math.exp(4.5), 1.0]
    expected.append(-sum(r / sum(root) * g for r, g in zip(root, logs[3][:2], strict=True)))
    torch.testing.assert_close(losses, torch.tensor(expected))
    losses.sum().backward()
    assert weak.grad is None and strong.grad.isfinite().all()
    # sqrt is what decides: 0.93 alone is over the threshold, its sharpened (here: flattened) form is not
    p = torch.tensor([[0.93, 0.035, 0.035]])
    assert adaptation.sharpened(p).max() < 0.9
    assert adaptation.ufm_losses(p.log(), strong[:1], torch.tensor([-1]), 0.9).item() == 0.0
    assert [adaptation.threshold(x) for x in (0.0, 0.5, 1.0)] == [0.9, 0.95, 1.0]


def test_entropy_by_hand_and_its_filter():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.1, 0.0, 0.0], [2.0, 0.0, -math.inf]], requires_grad=True)
    p = softmax(logits[0], 0)
    losses = adaptation.entropy_losses(logits, 0.8)
    torch.testing.assert_close(losses[0], -(p * p.log()).sum())
    q = softmax(logits[2, :2], 0)
    assert losses[1] == 0 and losses[2].item() == pytest.approx(-(q * q.log()).sum().item())
    losses.sum().backward()
    assert logits.grad.isfinite().all() and not logits.grad[1].any()


def test_trusted_batches():
    labels = torch.full((30,), -1)
    labels[[3, 7]] = torch.tensor([0, 1])
    asked = []
    batches = adaptation.TrustedBatches(30, 8, 0, lambda: asked.append(1) or labels)
    first = list(batches)
    assert len(first) == len(batches) == 4 and all(len(batch) == 8 for batch in first)
    for batch in first:
        assert sum(place in (3, 7) for place in batch) == 2 and set(batch[:2]) <= {3, 7}
    rest = [place for batch in first for place in batch[2:]]
    assert len(set(rest)) == 24  # no row twice before all have been
    assert list(batches) == first
    batches.set_epoch(1)
    assert list(batches) != first and len(asked) == 3
    with pytest.raises(ValueError, match="take at least 4"):
        adaptation.TrustedBatches(30, 3, 0, lambda: labels)


def test_random_crops():
    pixels = torch.rand(64, 3, 8, 8)
    torch.testing.assert_close(
        adaptation.random_crops(pixels, 1.0, False)[:, :, 4:5, 4:5].shape, torch.Size([64, 3, 1, 1])
    )
    ramp = torch.arange(8.0).expand(500, 1, 8, 8)  # value = column: a crop's range is its width
    views = adaptation.random_crops(ramp, 0.5, False)
    widths = (views[:, 0, 0, -1] - views[:, 0, 0, 0]) / 7
    assert 0.5 < widths.min() and widths.max() <= 1.0 + 1e-5 and (widths > 0).all()
    mirrored = adaptation.random_crops(ramp, 0.5, True)
    share = (mirrored[:, 0, 0, -1] < mirrored[:, 0, 0, 0]).float().mean()
    assert 0.4 < share < 0.6


# The trainer


def test_loss_is_the_sum_of_the_tasks_means_whatever_the_micro_batches(tmp_path):
    rows = rows_of({"first": 5, "second": 3})
    found = {}
    for name, size, steps in (("whole", 8, 1), ("parts", 2, 4)):
        clip = small_clip()
        composer = Composer(clip, vectors_of(clip))
        args = config(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=3,
            adam_epsilon=1e-3,
        )  # with 1e-8, Adam blows up the rounding of biases without effect (k_proj)
        trainer = AtlasImageTrainer(composer, args, rows, zero_shot_of(clip))
        trainer.train()
        found[name] = (composer.coefficients.detach().clone(), trainer.state.log_history[0]["loss"])
    torch.testing.assert_close(*[value for value, _ in found.values()], rtol=0, atol=1e-5)
    clip = small_clip()
    logits = torch.from_numpy(zero_shot_of(clip).logits(clip, rows))
    nats = cross_entropy(logits, torch.tensor(rows["label"][:]), reduction="none")
    for _, loss in found.values():
        assert loss == pytest.approx(float(nats[:5].mean() + nats[5:].mean()), rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"ufm": True, "crop_scale": 0.7}], ids=["labels", "ufm"])
def test_resuming_is_bitwise(tmp_path, changes):
    rows = rows_of({"first": 16})

    def run(folder, resume=None):
        clip = small_clip()
        composer = Composer(clip, vectors_of(clip))
        args = config(tmp_path, output_dir=str(folder), save_strategy="epoch", max_steps=6, **changes)
        AtlasImageTrainer(composer, args, rows, zero_shot_of(clip)).train(resume_from_checkpoint=resume)
        return composer.coefficients.detach()

    whole = run(tmp_path / "a")
    assert whole.abs().max() > 0
    assert torch.equal(run(tmp_path / "b", str(tmp_path / "a" / "checkpoint-2")), whole)


def test_ufm_trusts_anew_every_epoch_and_never_looks_at_labels(tmp_path):
    rows = rows_of({"first": 24})
    blind = rows.remove_columns("label").add_column("label", [0] * 24)
    found = []
    for given in (rows, blind):
        clip = small_clip()
        composer = Composer(clip, vectors_of(clip))
        args = config(tmp_path, max_steps=9, ufm=True, learning_rate=0.3)
        trainer = AtlasImageTrainer(composer, args, given, zero_shot_of(clip))
        chosen, select = [], trainer._select
        trainer._select = lambda chosen=chosen, select=select: chosen.append(select()) or chosen[-1]
        trainer.train()
        found.append(composer.coefficients.detach())
        assert len(chosen) == 3  # 24 rows, 8 a batch, 9 steps
        expected = adaptation.trusted_set(
            torch.from_numpy(zero_shot_of(small_clip()).logits(small_clip(), rows)).softmax(1)
        )
        assert torch.equal(chosen[0], expected)
    assert torch.equal(*found) and found[0].abs().max() > 0


def test_what_the_trainer_refuses(tmp_path):
    rows = rows_of({"first": 4, "second": 4})
    clip = small_clip()
    with pytest.raises(ValueError, match="one task at a time"):
        ImageTrainer(clip, config(tmp_path, ufm=True), rows, zero_shot_of(clip))
    with pytest.raises(ValueError, match="--save_strategy epoch or no"):
        ImageTrainer(
            clip, config(tmp_path, ufm=True, save_strategy="steps"), rows.select(range(4)), zero_shot_of(clip)
        )
    with pytest.raises(ValueError, match="two objectives"):
        args = config(tmp_path, ufm=True, entropy_below=0.5)
        ImageTrainer(clip, args, rows.select(range(4)), zero_shot_of(clip))
    with pytest.raises(ValueError, match="share of the area"):
        config(tmp_path, crop_scale=0.0)
    with pytest.raises(ValueError, match="rows are of 'second', for which there is no head"):
        ZeroShot({"first": torch.ones(2, 12)}, ImageReader(image_processor(8))).logits(clip, rows)


def test_fine_tuning_changes_what_it_says(tmp_path):
    clip, rows = small_clip(), rows_of({"first": 8})
    before = copy.deepcopy(clip.state_dict())
    for norms in (False, True):
        tuned, fit = fine_tune(clip, zero_shot_of(clip), rows, config(tmp_path), tmp_path / "t", norms=norms)
        changed = {n for n, p in tuned.named_parameters() if not torch.equal(p, before[n])}
        expected = {n for n in tower(clip) if not norms or "norm" in n or "layrnorm" in n}
        assert changed <= expected and len(changed) > 0.8 * len(expected)
        assert fit.trained == sum(before[n].numel() for n in expected)
    assert all(torch.equal(value, before[name]) for name, value in clip.state_dict().items())


def test_a_finished_fit_is_loaded(tmp_path):
    clip, rows = small_clip(), rows_of({"first": 8})
    composer = Composer(clip, vectors_of(clip))
    fit = fit_coefficients(composer, zero_shot_of(clip), rows, config(tmp_path), tmp_path / "fit", max_steps=3)
    values = composer.coefficients.detach().clone()
    composer.remove()
    again = Composer(clip, vectors_of(clip))
    assert fit_coefficients(again, zero_shot_of(clip), rows, config(tmp_path), tmp_path / "fit").seconds == fit.seconds
    assert torch.equal(again.coefficients, values)
    again.remove()


# Bases and vectors


def test_vectors_from_every_kind_of_source(tmp_path):
    clip, tuned = small_clip(), small_clip()
    for name, parameter in tuned.named_parameters():
        if name.startswith("vision_model."):
            parameter.data += 0.1 * torch.randn_like(parameter)
    expected = {n: p - dict(clip.named_parameters())[n] for n, p in tower(tuned).items()}
    tuned.save_pretrained(tmp_path / "whole")
    seen = CLIPVisionModel(tuned.config.vision_config)
    seen.load_state_dict(tuned.vision_model.state_dict())
    seen.save_pretrained(tmp_path / "tower")
    old = {f"vision_model.{name}": tensor for name, tensor in seen.state_dict().items()}  # before transformers 5
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old" / "model.safetensors")
    save_file(to_open_clip(tower(tuned)), tmp_path / "theirs.safetensors")
    sources = [f"{name}={tmp_path / name}" for name in ("whole", "tower", "old")]
    found = given_image_vectors(clip, [*sources, str(tmp_path / "theirs.safetensors")])
    assert list(found) == ["whole", "tower", "old", "theirs"]
    for name, vector in found.items():
        assert set(vector.shapes) >= {n for n in expected if n.startswith("vision_model.")}
        for own in vector.shapes:
            torch.testing.assert_close(vector.dense(own), expected[own], rtol=0, atol=1e-7, msg=f"{name} {own}")
    found["theirs"].save(tmp_path / "saved.safetensors")
    given_image_vectors(clip, [str(tmp_path / "saved.safetensors")])
    Composer(clip, [found["tower"], found["old"]]).remove()  # neither changes the projection
    tuned.text_projection.weight.data += 1
    tuned.save_pretrained(tmp_path / "both")
    with pytest.raises(ValueError, match="outside of the image tower, too .text_projection.weight"):
        given_image_vectors(clip, [str(tmp_path / "both")])
    with pytest.raises(ValueError, match="two are called 'tower'"):
        given_image_vectors(clip, [str(tmp_path / "tower")] * 2)
    with pytest.raises(FileNotFoundError, match="absent.safetensors: no such file"):
        given_image_vectors(clip, [str(tmp_path / "absent.safetensors")])
    with pytest.raises(OSError, match="cannot load --base .*absent"):
        load_clip(str(tmp_path / "absent"), None, lambda: tmp_path)


def test_tiny_clip_reads_upright_digits_and_is_built_once():
    data = image_data.build(image_data.AtlasImageArguments(rows_seed=5, world="smoke"))
    prompts = image_data.prompts(data["classes"])
    rows = data["base"]
    texts = [prompts["upright"][label] for label in rows["label"][:]]
    state = torch.get_rng_state()
    folder = tiny_clip(rows["image"][:], texts, seed=5, config=TinyClipConfig(steps=80), progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert tiny_clip(rows["image"][:], texts, seed=5, config=TinyClipConfig(steps=80), progress=False) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    clip, tokenizer, processor = load_clip(str(folder), None, lambda: folder)
    zero_shot = ZeroShot.from_prompts(clip, tokenizer, processor, prompts)
    scores = {}
    for split in ("control", "dev"):
        found = classify(data[split].remove_columns("image"), zero_shot.logits(clip, data[split]))["metrics"]
        scores |= {name.split("/")[1]: value["value"] for name, value in found.items() if "/" in name}
    assert scores["upright"] > 0.85 and scores["mirrored"] < scores["upright"] - 0.2
    with pytest.raises(ValueError, match="give each image at least one text"):
        tiny_clip(rows["image"][:2], [["a"], []], seed=0)


# The recipe


@pytest.fixture(scope="module")
def recipe(load_recipe):
    return load_recipe("atlas_clip")


def test_smoke_preset_with_accelerate(recipe, tmp_path, cache, capsys):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu",
               str(ROOT / "recipes" / "atlas_clip.py"), "--preset", "smoke", "--output_dir", str(out)]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"STEERBOOK_CACHE": str(cache)})
    assert ran.returncode == 0, ran.stderr[-3000:]
    results = json.loads((out / "results.json").read_text())
    assert results["status"] == "finished" and results["toy"] and results["recipe"] == "atlas_clip"
    assert results["metrics"]["per_task"]["tasks"] == ["left", "mirrored", "inverted"]
    after, alone = results["metrics"]["after"]["accuracy"], results["metrics"]["baselines"]["best single alpha"]
    assert after["value"] > results["metrics"]["before"]["accuracy"]["value"] and alone["accuracy"]["n"] == after["n"]
    assert (out / "seed_42" / "addition_atlas" / "coefficients.json").is_file()
    assert (out / "figures" / "alpha.png").is_file() and "New tasks from unlabelled images" in ran.stdout
    recipe.main(["--preset", "smoke", "--output_dir", str(out)])
    assert "is finished; these are its results" in capsys.readouterr().out


def save_clip_world(folder, templates):
    """A tiny CLIP in `folder/base`, two fine-tuned towers, and images of cats and dogs for both."""
    texts = image_data.class_rows("t", ["cat", "dog"], [t.partition("=")[2] or t for t in templates])
    tokenizer = word_tokenizer([text for row in texts for text in row["prompts"]])
    clip = new_clip(tokenizer, TinyClipConfig(hidden_size=16, layers=2, heads=2, max_tokens=32), 0)
    for part in (clip, tokenizer, image_processor(8)):
        part.save_pretrained(folder / "base")
    for number, name in enumerate(("mnist", "cars")):
        tuned = copy.deepcopy(clip.vision_model)
        for parameter in tuned.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        tuned.save_pretrained(folder / f"{name}_tower")
        draw = np.random.default_rng(number)
        for label in ("cat", "dog"):
            (folder / name / label).mkdir(parents=True)
            for n in range(20):
                pixels = draw.integers(0, 255, (9, 10, 3), dtype=np.uint8)
                Picture.fromarray(pixels).save(folder / name / label / f"{n}.png")


def test_the_config_runs_on_a_tiny_clip(recipe, tmp_path, capsys):
    path = ROOT / "recipes" / "configs" / "atlas" / "clip_vit_b32.yaml"
    lines = path.read_text()
    assert lines.startswith(f"# accelerate launch recipes/atlas_clip.py --config {path.relative_to(ROOT)}\n")
    content = yaml.safe_load(lines)
    names = [entry.split("=")[0] for entry in content["task_vectors"]]
    assert names == [entry.split("=")[0] for entry in content["tasks"]] and len(names) == 8
    settings = recipe.parse(["--config", str(path)])
    assert settings.training.weight_decay == 0.1 and settings.training.crop_scale == 0.5 and settings.training.flip

    save_clip_world(tmp_path, settings.data.templates)
    argv = ["--config", str(path), "--preset", "smoke", "--base", str(tmp_path / "base"),
            "--task_vectors", *(f"{name}={tmp_path / name}_tower" for name in ("mnist", "cars")),
            "--tasks", *(f"{name}={tmp_path / name}" for name in ("mnist", "cars")),
            "--templates", *settings.data.templates[:2], "--dataloader_num_workers", "0", "--use_cpu", "true",
            "--shots", "1", "--targets", "mnist", "--output_dir", str(tmp_path / "run"),
            "--disable_tqdm", "true"]  # fmt: skip
    recipe.main([*argv, "--dry_run"])
    assert "task vectors" in capsys.readouterr().out and not (tmp_path / "run").exists()
    recipe.main(argv)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["status"] == "finished" and not results["toy"]
    assert {"aTLAS, UFM", "LayerNorm tuning, UFM"} <= {key.split(": ")[-1] for key in results["metrics"]["adaptation"]}


def test_dry_run_on_the_digits(recipe, tmp_path, capsys):
    recipe.main(["--preset", "smoke", "--dry_run", "--output_dir", str(tmp_path / "run")])
    shown = capsys.readouterr().out
    assert "Coefficients: 216 (3 task vectors, 72 blocks)" in shown and "left 0: a photo of the digit zero." in shown
    assert not (tmp_path / "run").exists()


def test_recipe_input(recipe):
    for argv, message in (
        (["--base", "x"], "--base, --task_vectors and --tasks go together"),
        (["--ufm", "true"], "--ufm has no effect here"),
        (["--arms", "lora"], "--arms: unknown 'lora'"),
        (["--sections", "negation"], "--sections: unknown 'negation'"),
        (["--seed", "3"], "use --seeds 3"),
        (["--max_step", "3"], "max_step"),
    ):
        with pytest.raises((SystemExit, ValueError), match=message):
            recipe.main(argv)
