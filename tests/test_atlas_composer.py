"""The composer against autograd through `torch.func.functional_call` in fp64, and what it promises besides."""

import copy
import zlib

import pytest
import torch
from composed_models import (
    MODELS,
    N,
    gradients,
    inputs,
    loss_of,
    make,
    oracle,
    relative,
    set_random,
    vectors_for,
    weights,
)
from tiny_models import IDS
from torch import nn

import steerbook.trainers.atlas.slots as slots_module
from steerbook.trainers import Composer, TaskVector
from steerbook.trainers.atlas import BLOCKS, LowRank, split_blocks
from steerbook.trainers.atlas.partition import partition_indices
from steerbook.trainers.fingerprint import model_fingerprint


@pytest.mark.parametrize(
    ("exclude", "partitions"), [((), 1), ((), 3), (None, 1)], ids=["everything", "three parts", "default"]
)
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_autograd_through_composed_weights(name, blocks, exclude, partitions):
    model = make(name)
    base, vectors, batch = weights(model), vectors_for(model), inputs(name)
    composer = Composer(model, vectors, blocks=blocks, exclude=exclude, dtype=torch.float64, partitions=partitions)
    cut = split_blocks(model, base, blocks, (), exclude)
    assert composer.block_names == list(cut)
    assert composer.coefficients.shape == (N, len(cut)) + ((partitions,) if partitions > 1 else ())
    assert not composer.coefficients.any()
    set_random(composer)
    loss, gradient = gradients(composer, name, batch)
    free = composer.coefficients.detach().clone().requires_grad_()
    expected = oracle(model, base, vectors, cut, free, name, batch, partitions)
    expected.backward()
    assert abs(float(loss - expected.detach())) <= 1e-12 * abs(float(expected.detach()))
    assert relative(gradient, free.grad) <= 1e-12
    assert all(parameter.grad is None for parameter in model.parameters())


def test_isotropic_gradient_is_the_sum_over_blocks():
    model = make("llama")
    vectors, batch = vectors_for(model), inputs("llama")
    by_tensor = Composer(model, vectors, exclude=())
    _, expected = gradients(by_tensor, "llama", batch)
    by_tensor.remove()
    _, found = gradients(Composer(model, vectors, "isotropic", exclude=()), "llama", batch)
    assert relative(found[:, 0], expected.sum(1)) <= 1e-12


def test_weights_keep_closer_to_the_exact_sum_than_the_reference_order():
    """The released code multiplies and sums in fp16 and adds to the base in fp32 (spec 1.7); ours sums in fp32."""
    torch.manual_seed(0)
    model = nn.Linear(40, 50)
    base = weights(model)
    vectors = [{n: (0.01 * torch.randn(p.shape)).half() for n, p in base.items()} for _ in range(8)]
    composer = Composer(model, vectors)
    set_random(composer)
    for column, name in enumerate(composer.block_names):
        share = composer.coefficients.detach()[:, column]
        reference = sum(v[name] * s for v, s in zip(vectors, share, strict=True))  # a 0-dim fp32 factor keeps fp16
        assert reference.dtype == torch.float16
        reference = reference + base[name]
        exact = sum(v[name].double() * s.double() for v, s in zip(vectors, share, strict=True)) + base[name].double()
        ours = dict(model.named_parameters())[name].detach()
        assert (ours - reference).abs().max() <= 3e-5
        assert (ours - exact).abs().max() <= 2e-8  # half a unit in the last place
        assert (reference - exact).abs().max() > 1e-6


def test_gradients_keep_within_the_references_own_error():
    """P3: with fp16 vectors the reference rounds gradients to fp16, about 3e-4; ours agrees with it to 1e-3."""
    model = make("llama", torch.float32)
    base = weights(model)
    vectors = [TaskVector({k: (v / 5).half() for k, v in vector.items()}) for vector in vectors_for(model)]
    composer = Composer(model, vectors, exclude=())
    set_random(composer)
    _, found = gradients(composer, "llama", inputs("llama"))
    cut = split_blocks(model, base, "tensor", (), ())
    free = composer.coefficients.detach().clone().requires_grad_()
    oracle(model, base, vectors, cut, free, "llama", inputs("llama")).backward()
    assert 1e-6 < relative(found, free.grad) < 1e-3


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "clip_vision"])
@pytest.mark.parametrize("blocks", ["tensor", "isotropic"])
def test_twenty_optimiser_steps_follow_the_functional_path(name, blocks):
    model = make(name)
    base, vectors = weights(model), vectors_for(model)
    # A key's bias changes no attention weight: its gradient is rounding noise, which Adam would blow up.
    exclude = ["k_proj.bias"] if name == "clip_vision" else None
    cut = split_blocks(model, base, blocks, (), exclude)
    free = torch.zeros(N, len(cut), dtype=torch.float64, requires_grad=True)
    composer = Composer(model, vectors, blocks, exclude, torch.float64)
    batches = [inputs(name, slice(start, start + 2)) for start in (0, 2)]
    paths = []
    for parameter in (free, composer.coefficients):
        optimizer = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.1)
        path = []
        for step in range(20):
            batch = batches[step % 2]
            if parameter is free:
                loss = oracle(model, base, vectors, cut, free, name, batch)
            else:
                loss = loss_of(name, model(**batch))
            loss.backward()
            torch.nn.utils.clip_grad_norm_([parameter], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if parameter is not free:
                composer.compose()
            path.append((loss.detach(), parameter.detach().clone()))
        paths.append(path)
    for (expected_loss, expected), (loss, found) in zip(*paths, strict=True):
        assert abs(float(loss) - float(expected_loss)) <= 1e-12
        assert (found - expected).abs().max() <= 1e-12
    assert paths[0][-1][1].abs().max() > 0.05  # it went somewhere


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_at_most_one_weight_gradient_is_alive(name):
    model = make(name)
    largest = max(parameter.numel() for parameter in model.parameters())
    alive = []

    def measure(_):
        alive.append([p.numel() for p in model.parameters() if p.grad is not None])

    for parameter in model.parameters():  # before the composer's hooks, which free them
        parameter.register_post_accumulate_grad_hook(measure)
    loss_of(name, model(**inputs(name))).backward()
    assert sum(alive[-1]) == sum(p.numel() for p in model.parameters())  # what the measure says of an ordinary pass
    alive.clear()
    composer = Composer(model, vectors_for(model), exclude=())
    gradients(composer, name, inputs(name))
    assert {len(gradient) for gradient in alive} == {1}
    assert max(sum(gradient) for gradient in alive) == largest
    assert len(alive) == len(composer.block_names)


def test_micro_batches_add_up_to_one_batch():
    model = make("llama")
    composer = Composer(model, vectors_for(model))
    set_random(composer)
    _, whole = gradients(composer, "llama", inputs("llama"))
    whole = whole.clone()
    composer.coefficients.grad = None
    for start in (0, 1, 2, 3):  # the rows are equally long, so the mean of means is the mean
        (loss_of("llama", model(**inputs("llama", slice(start, start + 1)))) / 4).backward()
    assert relative(composer.coefficients.grad, whole) <= 1e-12


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    found = []
    for checkpointing in (False, True):
        model = make("llama_tied").train()  # no dropout in this model; checkpointing wants training mode
        composer = Composer(model, vectors_for(model), exclude=())
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        set_random(composer)
        found.append(gradients(composer, "llama", inputs("llama")))
    assert found[0][0] == found[1][0]
    assert relative(found[1][1], found[0][1]) <= 1e-12


def test_unused_parameters_have_a_zero_gradient():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    model = Half()
    composer = Composer(model, vectors_for(model), "module")
    model(torch.ones(2, 4)).sum().backward()
    assert composer.block_names == ["used", "unused"]
    assert composer.coefficients.grad[:, 0].all() and not composer.coefficients.grad[:, 1].any()


def test_gradients_from_before_are_not_counted():
    model = make("llama")
    loss_of("llama", model(**inputs("llama"))).backward()  # ordinary training left its gradients
    _, found = gradients(Composer(model, vectors_for(model)), "llama", inputs("llama"))
    fresh = make("llama")
    _, expected = gradients(Composer(fresh, vectors_for(fresh)), "llama", inputs("llama"))
    assert torch.equal(found, expected)


def test_composing_between_forward_and_backward_is_an_error():
    model = make("llama")
    composer = Composer(model, vectors_for(model))
    loss = loss_of("llama", model(**inputs("llama")))
    composer.compose()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_remove_restores_the_base_and_what_was_trained():
    model = make("llama_tied")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    before, trained = weights(model), {name: p.requires_grad for name, p in model.named_parameters()}
    composer = Composer(model, vectors_for(model), "matrices")
    composed = {name for name, p in model.named_parameters() if p.requires_grad}
    assert composed == {name for name in before if "proj" in name}
    set_random(composer)
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], model.model.layers[0].mlp.up_proj.weight)
    composer.remove()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    loss_of("llama", model(**inputs("llama"))).backward()
    assert composer.coefficients.grad is None and model.model.norm.weight.grad is not None  # the hooks are gone
    again = Composer(model, vectors_for(model))
    set_random(again)
    composed = weights(model)
    composer.remove()  # has nothing left to do
    assert all(torch.equal(composed[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_model_is_the_composed_one_bit_for_bit(name, dtype, tmp_path):
    make(name, dtype).save_pretrained(tmp_path / "base")
    kind = type(make(name))  # loaded, for `.to(dtype)` also rounds the rotary frequencies
    model = kind.from_pretrained(tmp_path / "base", dtype=dtype).eval()
    composer = Composer(model, vectors_for(model), exclude=())
    set_random(composer)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        composer.remove(keep=True)
        model.save_pretrained(tmp_path / "folded")
        folded = kind.from_pretrained(tmp_path / "folded", dtype=dtype).eval()
        assert torch.equal(model(input_ids=IDS).logits, expected)
        assert torch.equal(folded(input_ids=IDS).logits, expected)


def test_one_composer_a_model():
    model = make("clip")
    vectors = vectors_for(model)
    composer = Composer(model, vectors)
    with pytest.raises(ValueError, match=r"another composer holds this model; call its remove\(\)"):
        Composer(model, vectors)
    with pytest.raises(ValueError, match="another composer"):  # also through a part of it
        Composer(model.vision_model, vectors_for(model.vision_model))
    copied = copy.deepcopy(model)  # copies have no hooks
    Composer(copied, vectors).remove()
    composer.remove(keep=True)
    Composer(model, vectors).remove()
    with pytest.raises(ValueError, match="unknown blocks"):
        Composer(model, vectors, "heads")
    Composer(model, vectors)  # a refused one holds nothing


def test_block_kinds_cut_as_documented():
    model = make("llama")
    names = [name for name, _ in model.named_parameters()]

    def cut(blocks, **patterns):
        return split_blocks(model, names, blocks, **patterns)

    attention, tensors = "model.layers.1.self_attn", cut("tensor", exclude=())
    assert tensors == {name: [name] for name in names}
    assert [name for name in names if name not in cut("tensor")] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert all("norm" not in name for name in cut("matrices"))
    assert cut("fused_qkv")[f"{attention}.qkv.weight"] == [f"{attention}.{x}_proj.weight" for x in "qkv"]
    assert len(cut("fused_qkv")) == len(cut("tensor")) - 2 * 3
    layers = cut("layer", exclude=())
    assert list(layers) == ["model.embed_tokens", *(f"model.layers.{i}" for i in range(3)), "model.norm", "lm_head"]
    assert len(layers["model.layers.2"]) == 9
    assert cut("isotropic", exclude=()) == {"all": names}
    gpt2 = make("gpt2")
    modules = split_blocks(gpt2, dict(gpt2.named_parameters()), "module")
    assert modules["transformer.h.0.attn.c_attn"] == [f"transformer.h.0.attn.c_attn.{x}" for x in ("weight", "bias")]
    assert "transformer.wte" not in modules and "transformer.wpe" in modules  # the head is tied to the embedding
    image_tower = split_blocks(make("clip"), [name for name, _ in make("clip").named_parameters()], "tensor")
    assert all(name.startswith(("vision_model.", "visual_projection.")) for name in image_tower)
    assert len(image_tower) == 2 * 16 + 8
    for blocks in BLOCKS[1:]:  # nothing is lost, nothing is in two blocks
        members = [name for block in cut(blocks, exclude=()).values() for name in block]
        assert sorted(members) == sorted(n for n in names if blocks != "matrices" or "norm" not in n)


def test_patterns_choose_parameters():
    model = make("llama")
    names = [name for name, _ in model.named_parameters()]
    only = split_blocks(model, names, "tensor", include=[r"mlp", r"norm"], exclude=[r"layers\.0\."])
    assert only and all(("mlp" in name or "norm" in name) and "layers.0." not in name for name in only)
    assert "lm_head.weight" in split_blocks(
        model, names, "tensor", exclude=["mlp"]
    )  # own patterns replace the default
    assert split_blocks(model, names, "tensor", include="mlp") == split_blocks(model, names, "tensor", include=["mlp"])
    with pytest.raises(ValueError, match="'attn.query' matches no parameter .* like model.embed_tokens.weight"):
        split_blocks(model, names, "tensor", include=["attn.query"])
    with pytest.raises(ValueError, match=r"'mlp\(' is not a regular expression"):
        split_blocks(model, names, "tensor", exclude=["mlp("])
    with pytest.raises(ValueError, match="no parameter is left"):
        split_blocks(model, names, "matrices", include=["norm"])
    composer = Composer(model, vectors_for(model), include=["mlp"])
    assert len(composer.block_names) == 9
    assert [n for n, p in model.named_parameters() if p.requires_grad] == composer.block_names


def test_partitions_are_even_and_belong_to_seed_and_name():
    count, k = 60_000, 5
    groups = partition_indices(3, "a.weight", slice(0, count), k)
    assert groups.min() == 0 and groups.max() == k - 1
    expected = count / k
    chi_square = ((torch.bincount(groups) - expected) ** 2 / expected).sum()
    assert chi_square < 18.5  # 0.1 % of 4 degrees of freedom
    for other in (partition_indices(4, "a.weight", slice(0, count), k), partition_indices(3, "b", slice(0, count), k)):
        assert abs(float((groups == other).double().mean()) - 1 / k) < 0.01
    assert torch.equal(groups[123:456], partition_indices(3, "a.weight", slice(123, 456), k))
    shifted = float((groups[1:] == groups[:-1]).double().mean())
    assert abs(shifted - 1 / k) < 0.01  # neighbours are independent


def test_partitions_are_splitmix64_of_the_element():
    """In Python's integers: saved coefficients must mean the same on every machine and in every version."""
    seed, name, k = 6, "model.layers.0.mlp.up_proj.weight", 7
    key = (zlib.crc32(name.encode()) + (seed << 32)) % 2**63

    def group(element):
        x = (element * 0x9E3779B97F4A7C15 + key) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return (x ^ x >> 31) // 2 % k

    place = slice(5_000_000_000, 5_000_001_000)
    assert partition_indices(seed, name, place, k).tolist() == [group(e) for e in range(place.start, place.stop)]


def test_tiles_change_nothing_but_rounding(monkeypatch):
    found = []
    for tile in (1 << 23, 100 * N + 1):
        monkeypatch.setattr(slots_module, "TILE", tile)
        for partitions in (1, 3):
            model = make("llama")
            composer = Composer(model, vectors_for(model), exclude=(), partitions=partitions)
            set_random(composer)
            found.append((weights(model), gradients(composer, "llama", inputs("llama"))[1]))
    for (whole, expected), (tiled, gradient) in zip(found[:2], found[2:], strict=True):
        assert max(float((whole[name] - tiled[name]).abs().max()) for name in whole) <= 1e-15
        assert relative(gradient, expected) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("partitions", [1, 3])
def test_streaming_is_residency_bit_for_bit(dtype, rounding, partitions, monkeypatch, tmp_path):
    monkeypatch.setattr(slots_module, "TILE", 1000)
    found = []
    for placement in ("resident", "stream"):
        model = make("llama_tied", dtype)
        file = tmp_path / "vectors.safetensors" if placement == "stream" else None
        composer = Composer(
            model, vectors_for(model), placement=placement, stream_file=file, rounding=rounding, partitions=partitions
        )
        set_random(composer)
        found.append((weights(model), *gradients(composer, "llama", inputs("llama"))))
    (resident, loss, gradient), (stream, other_loss, other_gradient) = found
    assert all(torch.equal(resident[name], stream[name]) for name in resident)
    assert torch.equal(loss, other_loss) and torch.equal(gradient, other_gradient)


@pytest.mark.parametrize("placement", ["resident", "stream"])
def test_vectors_of_different_types_are_widened(placement, tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    base = weights(model)
    types = [torch.bfloat16, torch.float16, torch.float32]
    vectors = [{n: (0.1 * torch.randn(p.shape)).to(t) for n, p in base.items()} for t in types]
    composer = Composer(
        model, vectors, placement=placement, stream_file=tmp_path / "v.safetensors" if placement == "stream" else None
    )
    set_random(composer)
    for column, name in enumerate(composer.block_names):
        share = composer.coefficients.detach()[:, column].double()
        exact = base[name].double() + sum(s * v[name].double() for s, v in zip(share, vectors, strict=True))
        assert (dict(model.named_parameters())[name] - exact).abs().max() < 1e-7


@pytest.mark.parametrize("placement", ["resident", "stream"])
def test_factors_with_different_targets_are_zero_where_absent(placement, tmp_path):
    model = make("llama")
    base, targets = weights(model), ["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"]
    generator = torch.Generator().manual_seed(0)

    def factors(module):
        rows, columns = base[f"{module}.weight"].shape
        a, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, columns), (rows, 2)))
        return LowRank(a, b, 0.03)

    vectors = [
        TaskVector({f"model.layers.{i}.{t}.weight": factors(f"model.layers.{i}.{t}") for i in (0, 2) for t in pair})
        for pair in (targets[:2], targets[1:])
    ]
    dense = [TaskVector({n: v.dense(n) if n in v else 0 * base[n] for n in base}) for v in vectors]
    file = tmp_path / "v.safetensors" if placement == "stream" else None
    composer = Composer(model, vectors, dtype=torch.float64, placement=placement, stream_file=file)
    assert composer.block_names == [n for n in base if n in vectors[0] or n in vectors[1]]
    assert len(composer.block_names) == 6
    set_random(composer)
    _, gradient = gradients(composer, "llama", inputs("llama"))
    free = composer.coefficients.detach().clone().requires_grad_()
    cut = {name: [name] for name in composer.block_names}
    oracle(model, base, dense, cut, free, "llama", inputs("llama")).backward()
    assert relative(gradient, free.grad) <= 1e-12
    assert not gradient[0, composer.block_names.index("model.layers.0.mlp.down_proj.weight")]
    composer.remove()
    mixed = [TaskVector({n: 0.1 * base[n] for n in base}), vectors[1]]  # one dense, one not
    assert len(Composer(model, mixed, exclude=()).block_names) == len(base)
    lacking = TaskVector({n: base[n] for n in list(base)[1:]})
    with pytest.raises(ValueError, match=r"number 2 \(short\) has no model.embed_tokens.weight"):
        Composer(make("llama"), [mixed[0], TaskVector(lacking, source="short")])


def test_bf16_dead_zone_and_stochastic_rounding():
    """Spec 4.3: at vectors of 1e-4 and a coefficient of 0.1, nearest rounding realises about 27 % of the movement."""
    torch.manual_seed(0)
    base = (0.02 * torch.randn(600, 600)).bfloat16()
    tuned = (base.float() + 1e-4 * torch.randn(600, 600)).bfloat16()  # checkpoints are bf16 too
    vector = tuned.float() - base.float()
    assert float((vector == 0).float().mean()) == pytest.approx(0.32, abs=0.02)

    def realised(rounding, coefficient, seed=0):
        model = nn.Linear(600, 600, bias=False, dtype=torch.bfloat16)
        model.weight.data = base.clone()
        composer = Composer(model, [{"weight": vector}], rounding=rounding, seed=seed)
        with torch.no_grad():
            composer.coefficients.fill_(coefficient)
        composer.compose()
        moved = (model.weight.detach().double() - base.double()) / coefficient
        return float((moved * vector.double()).sum() / (vector.double() ** 2).sum())

    assert realised("nearest", 0.1) == pytest.approx(0.27, abs=0.02)
    assert realised("nearest", 0.3) == pytest.approx(0.75, abs=0.02)
    assert realised("nearest", 1.0) == pytest.approx(1.0, abs=1e-6)
    assert realised("stochastic", 0.1) == pytest.approx(1.0, abs=0.05)
    assert realised("stochastic", 0.3) == pytest.approx(1.0, abs=0.02)


def test_stochastic_rounding_is_unbiased_and_repeatable():
    torch.manual_seed(0)
    start = torch.randn(4, 50).bfloat16()
    vector = 0.01 * torch.randn(4, 50)
    target = start.float() + vector  # coefficient 1, in fp32 as composed

    def draws(seed, count):
        model = nn.Linear(50, 4, bias=False, dtype=torch.bfloat16)
        model.weight.data = start.clone()
        composer = Composer(model, [{"weight": vector}], rounding="stochastic", seed=seed)
        composer.compose()
        assert torch.equal(model.weight, start)  # what bf16 can hold is left alone
        with torch.no_grad():
            composer.coefficients.fill_(1.0)
        for _ in range(count):
            composer.compose()
            yield model.weight.detach().double()

    several = torch.stack(list(draws(0, 2000)))
    toward_zero = (target.view(torch.int32) & -65536).view(torch.float32)  # bf16 is the upper half of fp32
    away = ((target.view(torch.int32) & -65536) + 65536).view(torch.float32).double()
    share = (target.double() - toward_zero) / (away - toward_zero)
    up = several == away
    assert (up | (several == toward_zero)).all()
    frequency, spread = up.double().mean(0), (share * (1 - share) / 2000).sqrt()
    assert ((frequency - share).abs() <= 5 * spread).all()
    assert abs(float((frequency - share).mean())) < 5 * float(spread.square().mean() / share.numel()) ** 0.5
    assert torch.equal(several[:5], torch.stack(list(draws(0, 5))))
    assert not torch.equal(several[:5], torch.stack(list(draws(1, 5))))
    assert not torch.equal(several[0], several[1])


def test_default_types_follow_the_weights():
    for weight, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model = make("llama", weight)
        before = weights(model)
        composer = Composer(model, vectors_for(model))
        assert composer.coefficients.dtype == composer.dtype == expected
        composer.compose()
        assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_expansion_is_the_base_and_the_movement():
    model = make("gpt2")
    base, vectors = weights(model), vectors_for(model)
    composer = Composer(model, vectors, "layer")
    set_random(composer)
    values, directions = composer.expansion()
    assert values.keys() == directions.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if name in values:
            assert torch.equal(values[name], base[name])
            assert (values[name] + directions[name] - parameter).abs().max() <= 1e-15


def test_wrong_arguments_are_refused_and_the_model_is_left_alone(tmp_path):
    model = make("llama", torch.float32)
    model.requires_grad_(False)
    before, vectors = weights(model), vectors_for(model)
    short = {name: tensor for name, tensor in vectors[1].items() if "norm" not in name}
    longer = {**vectors[1], "model.layers.9.mlp.up_proj.weight": torch.ones(2, 2)}
    misshapen = {**vectors[1], "lm_head.weight": torch.ones(50, 32)}
    nan = {**vectors[1], "model.norm.weight": torch.full((32,), float("nan"))}
    zero = {name: 0 * tensor for name, tensor in vectors[1].items()}
    other = TaskVector(vectors[1], base="0123456789abcdef", source="elsewhere")
    refused = [
        (dict(task_vectors=[]), "no task vectors to compose"),
        (dict(task_vectors=[vectors[0], short]), "number 2 .* has no .*layernorm.weight.* and 2 more"),
        (dict(task_vectors=[vectors[0], longer]), "the model has no model.layers.9.mlp.up_proj.weight"),
        (dict(task_vectors=[vectors[0], misshapen]), r"lm_head.weight \[48, 32\] and \[50, 32\].*vocabularies differ"),
        (dict(task_vectors=[vectors[0], nan]), "task vector 2 .*: model.norm.weight holds 32 NaN"),
        (dict(task_vectors=[vectors[0], zero]), "task vector 2 .* is zero in every composed tensor"),
        (dict(task_vectors=[vectors[0], other]), "'elsewhere' was made from the base 0123456789abcdef, but this"),
        (dict(blocks="heads"), "unknown blocks 'heads'; known: tensor, matrices, module"),
        (dict(placement="disk"), "unknown placement 'disk'"),
        (dict(stream_file=tmp_path / "x"), "a stream_file is for placement='stream' only"),
        (dict(rounding="up"), "unknown rounding 'up'"),
        (dict(partitions=0), "partitions=0"),
        (dict(dtype=torch.bfloat16), "exact in torch.float32 or torch.float64 only"),
    ]
    for placement in ("resident", "stream"):
        for arguments, message in refused:
            here = dict(placement=placement) if "task_vectors" in arguments else {}
            if here.get("placement") == "stream":
                here["stream_file"] = tmp_path / "vectors.safetensors"
            with pytest.raises(ValueError, match=message):
                Composer(model, **{"task_vectors": vectors, **here, **arguments})
    assert list(tmp_path.iterdir()) == []
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert len(Composer(model, vectors).block_names) > 0


def test_tied_tensors_by_any_name():
    """State dicts hold tied tensors twice; one that has only the other name is the same tensor."""
    model = make("llama_tied")
    assert "lm_head.weight" not in dict(model.named_parameters())
    full = vectors_for(model)[0]
    embedding = full["model.embed_tokens.weight"]
    both = {**full, "lm_head.weight": embedding.clone()}
    alias = {name: tensor for name, tensor in both.items() if name != "model.embed_tokens.weight"}
    composer = Composer(model, [full, both, alias], exclude=())
    assert composer.block_names == [name for name, _ in model.named_parameters()]
    _, gradient = gradients(composer, "llama", inputs("llama"))
    assert relative(gradient[1:], gradient[[0, 0]]) <= 1e-12
    composer.remove()
    differing = {**full, "lm_head.weight": embedding + 1}
    with pytest.raises(ValueError, match="embed_tokens.weight and lm_head.weight are one tensor .* differently"):
        Composer(model, [differing])
    untied = make("llama")
    with pytest.raises(ValueError, match="the model has no|has no lm_head.weight"):
        Composer(untied, [vectors_for(untied)[0], full])


def test_the_base_is_fingerprinted_once(monkeypatch):
    from steerbook.trainers.atlas import composer, matching, sources

    model = make("llama")
    calls = []
    real = model_fingerprint(model)
    for module in (composer, matching, sources):
        monkeypatch.setattr(module, "model_fingerprint", lambda model: calls.append(model) or real)
    Composer(model, [TaskVector(v, base=real) for v in vectors_for(model)])
    assert len(calls) == 1
