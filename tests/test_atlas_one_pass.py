"""One pass over the vectors a step: the same losses and coefficients as AdamW, then composing (spec P10)."""

import pytest
import torch
from composed_models import inputs, loss_of, make, vectors_for, weights

from steerbook.trainers import Composer
from steerbook.trainers.atlas.one_pass import OnePassAdamW

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}


def run(name, optimizer_class, steps=12, dtype=torch.float64, **options):
    model = make(name, dtype)
    composer = Composer(model, vectors_for(model), **options)
    one = optimizer_class is OnePassAdamW
    optimizer = optimizer_class(composer if one else [composer.coefficients], **SETTINGS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for step in range(steps):
        batch = inputs(name, slice(step % 2, None))
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].to(dtype)
        loss = loss_of(name, model(**batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if not one:
            composer.compose()
        losses.append(loss.item())
    return losses, composer, optimizer


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama_tied", {"exclude": ()}),
        ("llama_tied", {"blocks": "layer"}),
        ("gpt2", {"blocks": "fused_qkv"}),
        ("clip_vision", {"blocks": "isotropic"}),
        ("clip_vision", {"partitions": 3}),
        ("llama", {"dtype": torch.float32, "exclude": ()}),
        ("llama", {"rounding": "stochastic"}),
        ("llama", {"placement": "stream"}),
    ],
)
def test_one_pass_is_two_passes_bit_for_bit(name, options):
    dtype = torch.bfloat16 if "rounding" in options else options.get("dtype", torch.float64)
    options = {key: value for key, value in options.items() if key != "dtype"}
    losses, composer, optimizer = run(name, OnePassAdamW, dtype=dtype, **options)
    expected, other, reference = run(name, torch.optim.AdamW, dtype=dtype, **options)
    assert losses == expected and len(set(losses)) == len(losses)
    assert torch.equal(composer.coefficients, other.coefficients) and other.coefficients.abs().min() > 0
    assert all(torch.equal(a, b) for a, b in zip(composer.model.parameters(), other.model.parameters(), strict=True))
    assert composer.compositions == other.compositions
    for key, value in reference.state[other.coefficients].items():
        assert torch.equal(optimizer.state[composer.coefficients][key], value)


def test_blocks_without_a_gradient_move_as_adamw_moves_them():
    """Unused parameters still decay and keep their momentum."""

    def run_with_unused(optimizer_class):
        model = torch.nn.ModuleDict({"used": torch.nn.Linear(4, 3), "other": torch.nn.Linear(3, 3)}).double()
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        composer = Composer(model, vectors_for(model), blocks="module")
        one = optimizer_class is OnePassAdamW
        optimizer = optimizer_class(composer if one else [composer.coefficients], **SETTINGS)
        x = torch.ones(2, 4, dtype=torch.float64)
        for step in range(6):
            hidden = model["used"](x)
            (model["other"](hidden) if step % 2 == 0 else hidden).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if not one:
                composer.compose()
        return composer.coefficients.detach(), weights(model)

    found, expected = run_with_unused(OnePassAdamW), run_with_unused(torch.optim.AdamW)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], value) for name, value in expected[1].items())


def test_a_step_without_a_backward_pass_does_nothing():
    model = make("llama")
    composer = Composer(model, vectors_for(model))
    before = weights(model)
    optimizer = OnePassAdamW(composer, **SETTINGS)
    optimizer.step()
    assert not composer.coefficients.any()
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)
