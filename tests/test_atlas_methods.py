"""Selection of vectors, the linearised variant, and the baselines, each against brute force or autograd in fp64."""

import itertools

import pytest
import torch
from tiny_models import IDS, tiny_llama
from torch.func import functional_call, jvp

from steerbook.trainers import Composer, TaskVector
from steerbook.trainers.atlas import LowRank
from steerbook.trainers.atlas.baselines import dare_vector, search_weights, ties_vector
from steerbook.trainers.atlas.linearized import linearized_step
from steerbook.trainers.atlas.selection import (
    blockwise_vectors,
    gradient_scores,
    random_vectors,
    vectors_by_feature,
    vectors_by_gradient,
)


def model64() -> torch.nn.Module:
    return tiny_llama().double()


def vectors_of(model: torch.nn.Module, count: int = 4) -> list[TaskVector]:
    torch.manual_seed(1)
    return [TaskVector({n: 0.05 * torch.randn_like(p) for n, p in model.named_parameters()}) for _ in range(count)]


def losses(model: torch.nn.Module, batches: int = 3):
    for shift in range(batches):
        ids = (IDS + shift) % 48
        logprobs = model(input_ids=ids).logits[:, :-1].log_softmax(-1)  # transformers' own loss is computed in fp32
        yield -logprobs.gather(-1, ids[:, 1:, None]).mean()


@pytest.mark.parametrize("blocks", ["tensor", "layer", "isotropic"])
def test_gradient_scores_are_the_composers_gradient_at_zero(blocks):
    model = model64()
    vectors = vectors_of(model)
    scores, cut = gradient_scores(model, vectors, losses(model), blocks)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    composer = Composer(model, vectors, blocks)
    (sum(losses(model)) / 3).backward()
    assert list(cut) == composer.block_names
    # Llama's norms compute in fp32, whatever the weights.
    torch.testing.assert_close(scores, composer.coefficients.grad, atol=1e-7, rtol=1e-4)


def test_gradient_scores_are_exact():
    torch.manual_seed(0)
    model, batches = Net(), [torch.randn(4, 6).double() for _ in range(3)]
    vectors = vectors_of(model)
    scores, _ = gradient_scores(model, vectors, (model(batch)["logits"].square().mean() for batch in batches))
    composer = Composer(model, vectors)
    (sum(model(batch)["logits"].square().mean() for batch in batches) / 3).backward()
    torch.testing.assert_close(scores, composer.coefficients.grad, atol=1e-14, rtol=1e-12)


def test_gradient_scores_of_factors_are_those_of_their_products():
    model = model64()
    names = [n for n, p in model.named_parameters() if "q_proj" in n or "down_proj" in n]
    sizes = {n: p.shape for n, p in model.named_parameters()}
    low = [
        TaskVector(
            {
                n: LowRank(torch.randn(2, sizes[n][1]).double(), torch.randn(sizes[n][0], 2).double(), 0.3)
                for n in names
            }
        )
        for _ in range(2)
    ]
    dense = [TaskVector({n: vector.dense(n) for n in names}) for vector in low]
    one, _ = gradient_scores(model, low, losses(model))
    other, _ = gradient_scores(model, dense, losses(model))
    torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)


def test_selection_by_gradient_whole_and_by_block():
    model = model64()
    vectors = vectors_of(model)
    scores, cut = gradient_scores(model, vectors, losses(model), "layer")
    sums = [sum(abs(value) for value in row) for row in scores.tolist()]
    assert vectors_by_gradient(scores, 2) == sorted(range(4), key=lambda i: -sums[i])[:2]
    picked = blockwise_vectors(vectors, scores, cut, 2)
    assert len(picked) == 2
    for column, names in enumerate(cut.values()):
        order = sorted(range(4), key=lambda i: -abs(scores[i, column].item()))
        for rank, name in itertools.product(range(2), names):
            assert torch.equal(picked[rank][name], vectors[order[rank]][name])
    composer = Composer(model, picked, "layer")
    assert composer.coefficients.shape == (2, len(cut))


def test_selection_by_chance_and_by_features():
    assert random_vectors(9, 4, 3) == random_vectors(9, 4, 3) and len(set(random_vectors(9, 4, 3))) == 4
    features = torch.tensor([[1.0, 0.0], [5.0, 5.0], [-1.0, 0.2]])
    assert vectors_by_feature(features, torch.tensor([0.1, 0.1]), 2) == [1, 0]
    for budget in (0, 10):
        with pytest.raises(ValueError, match=f"a budget of {budget} out of 9"):
            random_vectors(9, budget, 0)


class Net(torch.nn.Module):
    """Two layers in fp64, called as transformers' models are (whose eager attention computes its softmax in fp32)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 9).double(), torch.nn.Linear(9, 5).double()

    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.second(self.first(inputs).tanh())}


@pytest.mark.parametrize(("kind", "tolerance"), [("net", 1e-12), ("llama", 1e-7)])
def test_linearised_loss_and_gradient_are_those_of_autograd_through_jvp(kind, tolerance):
    torch.manual_seed(0)
    model = Net() if kind == "net" else tiny_llama(attn_implementation="eager").double()
    inputs = {"inputs": torch.randn(4, 6).double()} if kind == "net" else {"input_ids": IDS}
    vectors = vectors_of(model)
    composer = Composer(model, vectors, exclude=())
    values = 0.3 * torch.randn(composer.coefficients.shape, dtype=torch.float64)
    with torch.no_grad():
        composer.coefficients.copy_(values)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    target = torch.randn(model(**inputs)["logits"].shape, dtype=torch.float64)

    def loss_of(logits: torch.Tensor) -> torch.Tensor:
        return (logits.log_softmax(-1) * target).mean()

    found, output = linearized_step(composer, inputs, "logits", loss_of)

    leaf = values.clone().requires_grad_()
    delta = {
        name: sum(leaf[row, column] * vectors[row][name] for row in range(4))
        for column, name in enumerate(composer.block_names)
    }

    def forward(weights):
        return functional_call(model, weights, (), inputs, tie_weights=True)["logits"]

    at_base, change = jvp(forward, ({n: base[n] for n in delta},), (delta,))
    expected = loss_of(at_base + change)
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), abs=tolerance)
    torch.testing.assert_close(output, (at_base + change).detach(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(composer.coefficients.grad, leaf.grad, atol=tolerance, rtol=tolerance)


def test_ties_by_hand():
    """Half of the entries kept; signs by the sum; the mean of those that agree."""
    one = TaskVector({"w": torch.tensor([4.0, -3.0, 0.1, 0.2])})
    two = TaskVector({"w": torch.tensor([-1.0, -5.0, 0.3, 2.0])})
    merged = ties_vector([one, two], 0.5)
    # kept: [4, -3, 0, 0] and [0, -5, 0, 2]; signs +, -, ., +
    assert torch.equal(merged["w"], torch.tensor([4.0, -4.0, 0.0, 2.0]))
    assert merged.shapes == {"w": torch.Size([4])}


def test_dare_keeps_the_mean_and_the_random_state():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    vector = TaskVector({"w": torch.ones(200, 200), "v": torch.ones(50)})
    merged = dare_vector([vector, vector], 0.25, seed=3)
    values = merged["w"]
    assert set(values.unique().tolist()) <= {0.0, 4.0, 8.0}
    assert values.mean().item() == pytest.approx(2.0, abs=0.05)
    assert torch.equal(values, dare_vector([vector, vector], 0.25, seed=3)["w"])
    assert not torch.equal(values, dare_vector([vector, vector], 0.25, seed=4)["w"])
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="no task vectors"):
        dare_vector([], 0.5)


def test_search_finds_the_bottom_of_a_bowl_within_its_budget_and_bounds():
    target = [0.6, -0.4, 3.0]
    calls = []

    def loss(weights: list[float]) -> float:
        calls.append(weights)
        return sum((w - t) ** 2 for w, t in zip(weights, target, strict=True))

    weights, seen = search_weights(loss, 3, 300)
    assert len(calls) == len(seen) <= 300
    assert all(-1.5 <= w <= 1.5 for w in weights)
    assert weights == pytest.approx([0.6 - 0.05 / 6, -0.4 + 0.05 / 6, 1.5], abs=1e-3)
    assert min(seen) == pytest.approx(loss(weights) + 0.05 * sum(map(abs, weights)) / 3, abs=1e-9)
