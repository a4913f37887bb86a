"""The length-aware softmax: its rules by hand, on several architectures, in generate, saved and loaded."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from steerbook.trainers.task_hinting import LengthSoftmax, ScratchConfig, length_softmax, scratch_model
from steerbook.trainers.task_hinting.softmax import NAME, WEIGHT, items, load, save, use_length_softmax

SMALL = {"vocab_size": 30, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
MODELS = {
    "smollm3, none": lambda: scratch_model(30, ScratchConfig(), 0, 40),
    "smollm3, rope": lambda: scratch_model(30, ScratchConfig(positions="rope"), 0, 40),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16)),
}


def sharpened(model):
    """Larger weights than at the start, so that attention is far from uniform and tau shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model.eval()


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(1)
    return sharpened(MODELS[request.param]())


def test_rules_by_hand():
    n = torch.tensor([2.0, 10.0, 100.0])
    assert torch.allclose(LengthSoftmax("log", 10.0).tau(n), torch.tensor([math.log10(2), 1.0, 2.0]))
    assert torch.allclose(LengthSoftmax("log", 10.0, least=1.0).tau(n), torch.tensor([1.0, 1.0, 2.0]))
    a = torch.tensor([-2.0, 3.0])[:, None]
    by_hand = [[1 + math.log1p(math.exp(x)) * max(0.0, math.log(v / 10)) for v in (2, 10, 100)] for x in (-2.0, 3.0)]
    assert torch.allclose(LengthSoftmax("learn", 10.0).tau(n, a), torch.tensor(by_hand))
    s = torch.tensor([0.5, 1.0])[:, None]
    assert torch.allclose(LengthSoftmax("ssmax", 10.0).tau(n, s), s * n.log())


def test_attention_with_it_by_hand():
    """One layer's attention output, recomputed from its own queries, keys and values, key by key."""
    torch.manual_seed(0)
    model = sharpened(scratch_model(30, ScratchConfig(layers=1), 0, 40))
    use_length_softmax(model, LengthSoftmax("log", 5.0))
    attention, seen = model.model.layers[0].self_attn, {}
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(attention, name).register_forward_hook(lambda m, x, y, name=name: seen.update({name: y}))
    attention.o_proj.register_forward_pre_hook(lambda m, x: seen.update(out=x[0]))
    model(torch.randint(2, 30, (2, 9)))
    q, k, v = (seen[name].view(2, 9, 2, 16).transpose(1, 2).double() for name in ("q_proj", "k_proj", "v_proj"))
    for place in range(9):
        tau = math.log(place + 1) / math.log(5)
        logits = tau * (q[:, :, place, None] * k[:, :, : place + 1]).sum(-1) / 4.0
        out = (logits.softmax(-1)[..., None] * v[:, :, : place + 1]).sum(2)
        torch.testing.assert_close(seen["out"][:, place].double(), out.flatten(1), atol=1e-5, rtol=1e-5)


def test_without_effect_where_tau_is_one(model):
    ids = torch.randint(2, 30, (3, 12))
    with torch.no_grad():
        plain = model(ids).logits
        with length_softmax(model, LengthSoftmax("log", 12.0, least=1.0)):
            assert torch.allclose(model(ids).logits, plain, atol=1e-5)
        with length_softmax(model, LengthSoftmax("log", 6.0, least=1.0)):
            longer = model(ids).logits
        assert torch.allclose(longer[:, :6], plain[:, :6], atol=1e-5)
        assert (longer[:, 7:] - plain[:, 7:]).abs().amax(-1).min() > 1e-4
        assert torch.equal(model(ids).logits, plain), "the block leaves the model as it was"


def test_padding_does_not_count(model):
    use_length_softmax(model, LengthSoftmax("log", 4.0))
    row = torch.randint(2, 30, (1, 7))
    with torch.no_grad():
        alone = model(row).logits
        left = torch.cat([torch.zeros(1, 3, dtype=torch.long), row], dim=1)
        mask = torch.tensor([[0] * 3 + [1] * 7])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        padded = model(left, attention_mask=mask, position_ids=positions).logits[:, 3:]
    assert torch.allclose(padded, alone, atol=1e-4)


@pytest.mark.parametrize("count", ["keys", "items"])
def test_generate_with_a_cache_is_the_same_as_without(model, count):
    use_length_softmax(model, LengthSoftmax("log", 4.0, count))
    ids = torch.randint(2, 30, (2, 6))
    with items(torch.tensor([3, 9])), torch.no_grad():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
                               eos_token_id=None, pad_token_id=0)  # fmt: skip
        again = ids
        for _ in range(8):
            again = torch.cat([again, model(again, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, again)


def test_items_hold_for_each_row(model):
    ids = torch.randint(2, 30, (2, 8))
    with torch.no_grad(), length_softmax(model, LengthSoftmax("log", 4.0, "items")):
        with items(torch.tensor([4, 16])):
            both = model(ids).logits
        with items(torch.tensor([4])):
            first = model(ids[:1]).logits
        with items(torch.tensor([16])):
            second = model(ids[1:]).logits
        with pytest.raises(ValueError, match="within `items"):
            model(ids)
        plain = model  # tau is 1 at n0
    assert torch.allclose(both, torch.cat([first, second]), atol=1e-5)
    assert torch.allclose(both[0], plain(ids).logits[0], atol=1e-5)


@pytest.mark.parametrize("rule", ["learn", "ssmax", "log"])
def test_weights_are_learned_and_survive(model, rule, tmp_path):
    use_length_softmax(model, LengthSoftmax(rule, 4.0))
    ids = torch.randint(2, 30, (2, 12))
    model(ids, labels=ids).loss.backward()
    weights = {name: p for name, p in model.named_parameters() if name.endswith(WEIGHT)}
    assert len(weights) == (0 if rule == "log" else 2)
    for parameter in weights.values():
        assert parameter.grad is not None and parameter.grad.abs().min() > 0
        with torch.no_grad():
            parameter.add_(torch.linspace(0.1, 0.4, len(parameter)))
    with torch.no_grad():
        mine = model(ids).logits
        save(model, tmp_path)
        loaded = load(tmp_path).eval()
        assert torch.allclose(loaded(ids).logits, mine, atol=1e-6)
        assert getattr(loaded.config, NAME)["rule"] == rule
        # A plain load has all weights and the plain softmax.
        plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert (plain(ids).logits - mine).abs().max() > 1e-3


def test_switching_off_gives_the_model_back(model):
    ids = torch.randint(2, 30, (2, 8))
    names = [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        before = model(ids).logits
        use_length_softmax(model, LengthSoftmax("ssmax", 3.0))
        assert not torch.allclose(model(ids).logits, before)
        use_length_softmax(model, None)
        assert torch.equal(model(ids).logits, before)
    assert [name for name, _ in model.named_parameters()] == names


def test_refusals(model):
    for bad in ({"rule": "power"}, {"n0": 1.0}, {"n0": math.inf}, {"count": "tokens"}):
        with pytest.raises(ValueError):
            LengthSoftmax(**bad)
    with pytest.raises(ValueError, match="learns weights"), length_softmax(model, LengthSoftmax("learn")):
        pass
    use_length_softmax(model, LengthSoftmax())
    with pytest.raises(ValueError, match="a softmax of its own"), length_softmax(model, LengthSoftmax()):
        pass
