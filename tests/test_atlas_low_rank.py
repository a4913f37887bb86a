"""LoRA task vectors composed without weight gradients: against merged weights, autograd, PEFT and `Composer`."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from lora_vectors import lora_vectors, merged_deltas, quantised_llama, randomised
from peft import LoraConfig, get_peft_model
from tiny_models import IDS, LAYERS, logits, tiny, tiny_llama
from torch.func import functional_call

from steerbook.trainers import Composer, TaskVector
from steerbook.trainers.atlas import LowRank
from steerbook.trainers.atlas.extract import task_vector
from steerbook.trainers.atlas.low_rank import LowRankComposer

MODELS = ["llama", "gpt2", "phi3"]  # Linear; Conv1D, which keeps weights transposed; fused projections
MODES = ["per_product", "per_factor"]
DOUBLE = torch.float64


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def with_coefficients(model, vectors, mode="per_product", **options) -> LowRankComposer:
    composer = LowRankComposer(model, vectors, mode, **options)
    randomised(composer)
    return composer


def dense(vectors, shapes) -> list[TaskVector]:
    """The same vectors multiplied out, zero where they have nothing."""
    return [
        TaskVector({n: v.dense(n) if n in v else torch.zeros(s, dtype=DOUBLE) for n, s in shapes.items()})
        for v in vectors
    ]


def autograd(model, deltas) -> torch.Tensor:
    """The loss with `deltas` (name -> tensor with a graph) added to the weights."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    changed = weights | {name: weights[name] + delta for name, delta in deltas.items()}
    return functional_call(model, changed, (), {"input_ids": IDS, "labels": IDS}).loss


# Values and gradients


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_merged_weights(name, mode):
    model = tiny(name, dtype=DOUBLE)
    vectors = lora_vectors(model)
    base = logits(model)
    composer = LowRankComposer(model, vectors, mode)
    assert torch.equal(logits(composer.model), base)  # at the start nothing is added
    randomised(composer)
    found = logits(composer.model)
    deltas = merged_deltas(vectors, composer.block_names, composer.weights.detach())
    composer.remove()
    with torch.no_grad():
        for parameter_name, delta in deltas.items():
            model.get_parameter(parameter_name).add_(delta)
    torch.testing.assert_close(found, logits(model), rtol=0, atol=1e-12)
    assert (found - base).abs().max() > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_dense_trace_and_factored_gradients_agree(name):
    """Spec P17. The composer's own gradient is the factored one; dW comes from autograd at the merged weights."""
    model = tiny(name, dtype=DOUBLE)
    vectors = lora_vectors(model)
    composer = with_coefficients(model, vectors)
    loss_of(composer.model).backward()
    factored, names = composer.coefficients.grad, composer.block_names
    deltas = merged_deltas(vectors, names, composer.coefficients.detach())
    composer.remove()

    for delta in deltas.values():
        delta.requires_grad_()
    autograd(model, deltas).backward()
    for number, vector in enumerate(vectors):
        for column, target in enumerate(names):
            gradient = deltas[target].grad
            entry = vector[target] if target in vector else None
            whole = (gradient * vector.dense(target)).sum() if entry else torch.zeros((), dtype=DOUBLE)
            trace = entry.scale * torch.trace(entry.b.T @ gradient @ entry.a.T) if entry else whole
            tolerance = {"rtol": 0, "atol": 1e-12 * float(factored.abs().max())}
            torch.testing.assert_close(trace, whole, **tolerance)
            torch.testing.assert_close(factored[number, column], whole, **tolerance)
    assert (factored != 0).sum() == sum(len(vector) for vector in vectors)


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_dense_composer(name):
    model = tiny(name, dtype=DOUBLE)
    vectors = lora_vectors(model)
    low = with_coefficients(model, vectors)
    loss = loss_of(low.model)
    loss.backward()
    low.remove()
    shapes = {target: model.get_parameter(target).shape for target in low.block_names}
    composer = Composer(model, dense(vectors, shapes), exclude=(), dtype=DOUBLE)
    assert composer.block_names == low.block_names and composer.coefficients.shape == low.coefficients.shape
    composer.coefficients.data.copy_(low.coefficients.data)
    composer.compose()
    other = loss_of(model)
    other.backward()
    torch.testing.assert_close(other, loss, rtol=0, atol=1e-12)
    scale = float(low.coefficients.grad.abs().max())
    torch.testing.assert_close(composer.coefficients.grad, low.coefficients.grad, rtol=0, atol=1e-12 * scale)


def test_per_factor_gradient_is_autograds():
    model = tiny("gpt2", dtype=DOUBLE)
    vectors = lora_vectors(model)
    composer = with_coefficients(model, vectors, "per_factor")
    loss = loss_of(composer.model)
    loss.backward()
    composer.remove()
    leaf = composer.coefficients.detach().clone().requires_grad_()
    deltas = merged_deltas(vectors, composer.block_names, leaf[..., 0] * leaf[..., 1])
    other = autograd(model, deltas)
    other.backward()
    torch.testing.assert_close(loss, other, rtol=0, atol=1e-12)
    scale = float(leaf.grad.abs().max())
    torch.testing.assert_close(composer.coefficients.grad, leaf.grad, rtol=0, atol=1e-12 * scale)


def test_per_factor_starts_where_it_can_learn():
    composer = LowRankComposer(tiny("llama"), lora_vectors(tiny("llama")), "per_factor")
    assert torch.equal(composer.coefficients[..., 0], torch.ones_like(composer.weights))
    assert torch.equal(composer.weights, torch.zeros_like(composer.weights))
    loss_of(composer.model).backward()
    first, second = composer.coefficients.grad.unbind(-1)
    assert not first.any() and (second != 0).sum() > 0.5 * second.numel()


def test_gradients_add_up_and_survive_checkpointing():
    model = tiny("llama", dtype=DOUBLE)
    composer = with_coefficients(model, lora_vectors(model))
    loss_of(composer.model).backward()
    once = composer.coefficients.grad.clone()
    composer.model.train()
    composer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss_of(composer.model).backward()
    torch.testing.assert_close(composer.coefficients.grad, 2 * once)


def test_nothing_but_the_coefficients_gets_a_gradient_and_no_weight_is_kept_for_one():
    model = tiny("llama")
    composer = with_coefficients(model, lora_vectors(model))
    assert not any(parameter.requires_grad for parameter in composer.model.parameters())
    inputs = {n: m for n, m in composer.model.named_modules() if n.endswith("down_proj")}
    seen: list[torch.Tensor] = []
    for module in inputs.values():
        module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = loss_of(composer.model)
    assert len(seen) == LAYERS
    assert not {t.data_ptr() for t in kept} & {t.data_ptr() for t in seen}  # P = X A^T is kept, X is not
    loss.backward()
    assert all(parameter.grad is None for parameter in composer.model.parameters())
    assert composer.coefficients.grad.abs().sum() > 0


def test_bf16_base_with_fp32_coefficients():
    plain = tiny("llama")
    vectors = lora_vectors(plain, scale=0.2)
    half = with_coefficients(tiny("llama", dtype=torch.bfloat16), vectors)
    assert half.coefficients.dtype == torch.float32
    assert {layer.lora_A["atlas"].weight.dtype for layer in half.layers} == {torch.bfloat16}
    rounded = tiny("llama", dtype=torch.bfloat16).float()
    whole = with_coefficients(rounded, vectors)
    for composer in (half, whole):
        loss_of(composer.model).backward()
    assert logits(half.model).dtype == torch.bfloat16 and half.coefficients.grad.dtype == torch.float32
    torch.testing.assert_close(logits(half.model).float(), logits(whole.model), rtol=0, atol=0.1)
    difference = (half.coefficients.grad - whole.coefficients.grad).norm() / whole.coefficients.grad.norm()
    assert difference < 0.05


# In place, and back


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_remove_gives_the_model_back(name):
    model = tiny(name)
    model.get_input_embeddings().weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    before, expected = {n: t.clone() for n, t in model.state_dict().items()}, logits(model)
    state = torch.get_rng_state()
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Already found a `peft_config`")
            composer = with_coefficients(model, lora_vectors(model))
        composer.compose()  # does nothing, and may always be called
        assert (logits(composer.model) - expected).abs().max() > 0.1
        composer.remove()
        composer.remove()
        assert composer.model is model and torch.equal(logits(model), expected)
        after = model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert torch.equal(torch.get_rng_state(), state)


def test_remove_can_keep_what_was_learned():
    composer = with_coefficients(tiny("gpt2"), lora_vectors(tiny("gpt2")))
    expected = logits(composer.model)
    composer.remove(keep=True)
    assert not any(layer.lora_A["atlas"]._forward_hooks for layer in composer.layers)
    torch.testing.assert_close(logits(composer.model), expected, rtol=0, atol=1e-5)
    merged = composer.model.merge_and_unload()  # by now PEFT's own
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)


def test_gradients_are_averaged_over_processes(monkeypatch):
    composer = with_coefficients(tiny("llama"), lora_vectors(tiny("llama")))
    composer.reduce_gradients()  # no gradient, no group: nothing
    loss_of(composer.model).backward()
    mine = composer.coefficients.grad.clone()
    composer.reduce_gradients()
    assert torch.equal(composer.coefficients.grad, mine)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.add_(3 * mine))
    composer.reduce_gradients()
    torch.testing.assert_close(composer.coefficients.grad, 2 * mine)


# Real PEFT adapters


SETTINGS = {
    "plain": {"r": 3, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {"r": 3, "lora_alpha": 6, "rank_pattern": {"mlp.down_proj": 5}, "alpha_pattern": {"q_proj": 1}},
}


def save_adapter(base, folder, targets, seed, **settings) -> torch.Tensor:
    """Save a random LoRA on the base; returns the logits that PEFT gives it."""
    tuned = get_peft_model(base, LoraConfig(target_modules=targets, init_lora_weights=False, **settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(folder)
    found = logits(tuned)
    tuned.unload()
    return found


@pytest.mark.parametrize("settings", SETTINGS)
def test_one_adapter_with_coefficient_one_is_that_adapter(settings, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "base")
    targets = ["q_proj", "v_proj", "down_proj"]
    alone = {}
    for number in range(2):
        folder = tmp_path / f"adapter{number}"
        alone[folder] = save_adapter(tiny("llama"), folder, targets[number:], number, **SETTINGS[settings])
    vectors = [task_vector(str(tmp_path / "base"), str(folder)) for folder in alone]
    composer = LowRankComposer(tiny("llama"), vectors)
    assert composer.coefficients.shape == (2, 3 * LAYERS) and composer.base == vectors[0].base
    for number, expected in enumerate(alone.values()):
        with torch.no_grad():
            composer.coefficients.zero_()[number] = 1
        torch.testing.assert_close(logits(composer.model), expected, rtol=0, atol=2e-5)


def test_an_adapter_of_gpt2(tmp_path):
    tiny("gpt2").save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = save_adapter(tiny("gpt2"), tmp_path / "adapter", ["c_attn", "c_fc"], 3, r=3, fan_in_fan_out=True)
    composer = LowRankComposer(tiny("gpt2"), [task_vector(str(tmp_path / "base"), str(tmp_path / "adapter"))])
    with torch.no_grad():
        composer.coefficients.fill_(1)
    torch.testing.assert_close(logits(composer.model), expected, rtol=0, atol=2e-5)


# Quantised bases (bitsandbytes runs on the CPU), in training mode: in evaluation 8-bit layers round their inputs, and
# 4-bit ones may be packed in place where no composer holds them. These models have no dropout.


@pytest.fixture(params=["4bit", "8bit"])
def quantised(request, tmp_path):
    return quantised_llama(tmp_path / "base", request.param)


def test_a_quantised_base_trains(quantised):
    model, vectors = quantised
    composer = LowRankComposer(model, vectors)
    assert not composer.layers[0].get_base_layer().weight.is_floating_point()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([composer.coefficients], lr=0.05)
    composer.model.train()
    losses = []
    for _ in range(6):
        loss = loss_of(composer.model)
        loss.backward()
        assert composer.coefficients.grad.abs().sum() > 0
        assert all(parameter.grad is None for parameter in composer.model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert composer.base == vectors[0].base  # that of the plain base: coefficients apply there too


def test_the_branch_of_a_quantised_base_by_hooks(quantised):
    model, vectors = quantised
    model.train()
    composer = with_coefficients(model, vectors)
    with torch.no_grad():
        found = composer.model(input_ids=IDS).logits
    entries = {target: composer.folded(column) for column, target in enumerate(composer.block_names)}
    deltas = merged_deltas(vectors, composer.block_names, composer.coefficients.detach())
    composer.remove()
    assert not any("lora" in name for name, _ in model.named_modules())
    for target, entry in entries.items():
        torch.testing.assert_close(entry.dense(), deltas[target].float(), rtol=0, atol=1e-5)

        def add(module, args, output, delta=deltas[target]):
            return output + args[0] @ delta.float().T

        model.get_submodule(target.removesuffix(".weight")).register_forward_hook(add)
    with torch.no_grad():
        torch.testing.assert_close(found, model(input_ids=IDS).logits, rtol=0, atol=2e-3)


# Refusals: before the model is touched


def vector(changes, like="llama", **about) -> TaskVector:
    """One of the random vectors with entries replaced."""
    return TaskVector({**lora_vectors(tiny(like))[0].tensors, **changes}, **about)


def first(**changes) -> LowRank:
    entry = lora_vectors(tiny("llama"))[0][KEY]
    return LowRank(**({"a": entry.a, "b": entry.b, "scale": entry.scale} | changes))


KEY = "model.layers.0.self_attn.k_proj.weight"
NAN = torch.full((2, 32), float("nan"))
BAD = {
    "dense": (lambda: [vector({KEY: torch.zeros(24, 32)})], "is dense; Composer"),
    "unknown": (lambda: [vector({"model.layers.9.x.weight": first()})], r"change model\.layers\.9\.x\.weight, which"),
    "embedding": (
        lambda: [vector({"model.embed_tokens.weight": LowRank(torch.ones(1, 32), torch.ones(48, 1))})],
        "embed_tokens.weight: not the weight of a linear layer",
    ),
    "shape": (lambda: [vector({KEY: first(a=torch.ones(2, 31))})], r"k_proj.weight \[24, 31\] and \[24, 32\]"),
    "nan": (lambda: [vector({KEY: first(a=NAN)})], "k_proj.weight holds NaN"),
    "zero": (lambda: [TaskVector({KEY: first(b=torch.zeros(24, 2))}, source="idle")], "idle.*is zero"),
    "base": (
        lambda: [vector({}, base="0123456789abcdef", source="mine")],
        "mine from 0123456789abcdef.*this model is",
    ),
    "bases": (lambda: [vector({}, base="a" * 16), vector({}, base="b" * 16)], "one from aaaa.*one from bbbb"),
    "none": (lambda: [], "no task vectors"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_vectors_are_refused_before_anything_changes(case):
    make, message = BAD[case]
    model = tiny("llama")
    before = [(n, p.requires_grad) for n, p in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        LowRankComposer(model, make())
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == before


def test_vectors_of_two_bases_do_not_fit_a_quantised_one_either(quantised):
    model, vectors = quantised
    with pytest.raises(ValueError, match="other from 0123456789abcdef"):
        LowRankComposer(model, [*vectors, TaskVector(vectors[0].tensors, base="0123456789abcdef", source="other")])


def test_a_model_that_a_composer_holds_and_an_unknown_mode():
    model = tiny_llama()
    vectors = lora_vectors(model)
    with pytest.raises(ValueError, match="unknown mode 'both'"):
        LowRankComposer(model, vectors, "both")
    Composer(model, [TaskVector({KEY: torch.ones(24, 32)})])
    with pytest.raises(ValueError, match="Composer holds this model"):
        LowRankComposer(model, vectors)
