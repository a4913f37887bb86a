"""Task vectors: arithmetic against dense algebra, application, and files."""

import pytest
import torch
from safetensors import safe_open
from tiny_models import tiny, tiny_llama
from torch import nn

from steerbook.trainers import TaskVector
from steerbook.trainers.atlas import LowRank
from steerbook.trainers.atlas.matching import check_same
from steerbook.trainers.fingerprint import model_fingerprint

SHAPES = {"w": (6, 5), "v": (4, 6), "b": (5,)}


def factors(rows, columns, rank=2, scale=0.7, dtype=torch.float64):
    return LowRank(torch.randn(rank, columns).to(dtype), torch.randn(rows, rank).to(dtype), scale)


def dense_vector():
    return TaskVector({name: torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()})


def low_rank_vector(names=("w", "v")):
    return TaskVector({name: factors(*SHAPES[name]) for name in names})


def mixed_vector():
    return TaskVector({"w": factors(6, 5), "v": torch.randn(4, 6).double(), "b": torch.randn(5).double()})


def flat(vector, names=tuple(SHAPES)):
    """All entries in one row, multiplied out here; zeros where there is none."""
    parts = []
    for name in names:
        entry = vector[name] if name in vector else torch.zeros(SHAPES[name], dtype=torch.float64)
        if isinstance(entry, LowRank):
            entry = entry.scale * (entry.b.double() @ entry.a.double())
        parts.append(entry.double().flatten())
    return torch.cat(parts)


PAIRS = {
    "dense": (dense_vector, dense_vector),
    "low rank": (low_rank_vector, low_rank_vector),
    "mixed": (mixed_vector, dense_vector),
    "both mixed": (mixed_vector, mixed_vector),
    "other targets": (low_rank_vector, lambda: low_rank_vector(("v",))),
    "no targets in common": (lambda: low_rank_vector(("w",)), lambda: low_rank_vector(("v",))),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_arithmetic_is_that_of_the_dense_vectors(pair):
    one, other = (make() for make in PAIRS[pair])
    x, y = flat(one), flat(other)
    for found, expected in (
        (one + other, x + y),
        (one - other, x - y),
        (2.5 * one, 2.5 * x),
        (one * 2, 2 * x),
        (-one, -x),
        (0.5 * (one - other) + 2 * other, 0.5 * x + 1.5 * y),
    ):
        assert (flat(found) - expected).abs().max() < 1e-13
        assert found.shapes == {name: torch.Size(SHAPES[name]) for name in found}
        assert found.low_rank == {name for name in found if isinstance(found[name], LowRank)}
    assert one.norm() == pytest.approx(float(x.norm()), rel=1e-13)
    assert one.dot(other) == pytest.approx(float(x @ y), rel=1e-12, abs=1e-12)
    assert one.cosine(other) == pytest.approx(float(x @ y / x.norm() / y.norm()), rel=1e-12, abs=1e-12)
    assert one.cosine(-2 * one) == pytest.approx(-1)


def test_factors_stay_factors():
    one, other = factors(6, 5, rank=2, scale=0.3), factors(6, 5, rank=3, scale=-2.0)
    total = (TaskVector({"w": one}) + TaskVector({"w": other}))["w"]
    assert isinstance(total, LowRank) and total.a.shape == (5, 5) and total.shape == (6, 5)
    scaled = (3 * TaskVector({"w": one}))["w"]
    assert scaled.a is one.a and scaled.b is one.b and scaled.scale == pytest.approx(0.9)
    assert isinstance((TaskVector({"w": one}) + TaskVector({"w": one.dense()}))["w"], torch.Tensor)
    for _ in range(50):  # rounding makes some of the squares negative
        one = factors(6, 5)
        cancelled = TaskVector({"w": one}) - TaskVector({"w": factors(6, 5)}) * 0 - TaskVector({"w": one})
        assert 0 <= cancelled.norm() < 1e-6


def test_bf16_factors_are_summed_without_rounding():
    one, other = factors(6, 5, scale=0.3, dtype=torch.bfloat16), factors(6, 5, scale=0.7, dtype=torch.bfloat16)
    exact = sum(x.scale * x.b.double() @ x.a.double() for x in (one, other))
    total = (TaskVector({"w": one}) + TaskVector({"w": other})).dense("w")
    assert one.dtype == torch.bfloat16 and total.dtype == torch.float32
    assert (total - exact).abs().max() < 1e-6


def test_vectors_that_cannot_be_combined():
    dense = dense_vector()
    short = TaskVector({"w": dense["w"], "v": dense["v"]})
    for one, other in ((dense, short), (short, dense)):
        with pytest.raises(ValueError, match="only one of two task vectors has b; they cannot be combined"):
            one + other
    with pytest.raises(ValueError, match=r"shapes differ .*: w \[5, 6\] and \[6, 5\]|w \[6, 5\] and \[5, 6\]"):
        dense + TaskVector({**dense, "w": dense["w"].T})
    with pytest.raises(ValueError, match=r"two bases \(aa and bb\) cannot be combined"):
        TaskVector(dense, base="aa") - TaskVector(dense, base="bb")
    assert (TaskVector(dense, base="aa") + dense).base == "aa"
    with pytest.raises(ValueError, match="cosine with a zero task vector"):
        dense.cosine(0 * dense)
    with pytest.raises(KeyError):
        (dense + dense)["nothing"]


def test_difference_of_state_dicts_adds_up_to_the_tuned_model():
    base, tuned = tiny_llama(0), tiny_llama(1)
    vector = TaskVector.from_state_dicts(base.state_dict(), tuned.state_dict())
    assert all(tensor.dtype == torch.float32 for tensor in vector.values())
    vector.apply(base)
    for found, expected in zip(base.parameters(), tuned.parameters(), strict=True):
        assert (found - expected).abs().max() < 1e-6
    half = TaskVector.from_state_dicts(base.bfloat16().state_dict(), tuned.bfloat16().state_dict())
    assert all(tensor.dtype == torch.bfloat16 for tensor in half.values())
    kept = TaskVector.from_state_dicts(base.state_dict(), tuned.state_dict(), dtype=torch.float16)
    assert all(tensor.dtype == torch.float16 for tensor in kept.values())


def test_differences_are_taken_in_fp32():
    base, tuned = torch.tensor([1.0]).bfloat16(), torch.tensor([1.0 + 2.0**-20])
    assert TaskVector.from_state_dicts({"w": base}, {"w": tuned})["w"] == 2.0**-20
    counters = {"n": torch.tensor(3), "w": base}
    assert list(TaskVector.from_state_dicts(counters, counters)) == ["w"]  # integers are no directions


def test_state_dicts_name_their_base_and_count_tied_tensors_once():
    base, tuned = tiny_llama(tie_word_embeddings=True), tiny_llama(tie_word_embeddings=True)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(1.0)
    vector = TaskVector.from_state_dicts(base.state_dict(), tuned.state_dict())
    assert "lm_head.weight" in base.state_dict() and set(vector) == {name for name, _ in base.named_parameters()}
    assert vector.norm() == pytest.approx(sum(p.numel() for p in base.parameters()) ** 0.5)
    assert vector.base == model_fingerprint(base)
    with pytest.raises(ValueError, match="was made from the base"):
        vector.apply(tuned)
    with pytest.raises(ValueError, match="tuned has no|base has no"):
        TaskVector.from_state_dicts(base.state_dict(), tiny_llama().state_dict())


def test_a_vector_is_a_number_among_vectors_and_equal_to_itself_alone():
    one, two = dense_vector(), dense_vector()
    total = sum([one, two])
    torch.testing.assert_close(flat(total), flat(one) + flat(two))
    assert one == one and one != two and len({one, two}) == 2
    for wrong in (lambda: one + 1, lambda: one - 1, lambda: one * two, lambda: 1 + one):
        with pytest.raises(TypeError, match="unsupported operand"):
            wrong()


def test_state_dicts_of_different_models():
    base = {"a": torch.ones(2), "model.embed_tokens.weight": torch.ones(10, 2)}
    with pytest.raises(ValueError, match="base has no c; tuned has no a"):
        TaskVector.from_state_dicts(base, {"c": torch.ones(2), **{k: v for k, v in base.items() if k != "a"}})
    with pytest.raises(ValueError, match=r"weight \[10, 2\] and \[12, 2\]; the vocabularies differ"):
        TaskVector.from_state_dicts(base, {**base, "model.embed_tokens.weight": torch.ones(12, 2)})
    with pytest.raises(ValueError, match="x has no t0, t1, t2, t3, t4 and 3 more$"):
        check_same({}, {f"t{i}": torch.Size((1,)) for i in range(8)}, "x", "y")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_adds_once_and_rounds_once(dtype):
    model = tiny_llama(0, tie_word_embeddings=True).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moved = {name: 0.01 * torch.randn(p.shape).bfloat16() for name, p in model.named_parameters()}
    moved["model.norm.weight"] = moved["model.norm.weight"].float()
    moved["model.layers.0.mlp.up_proj.weight"] = factors(48, 32, scale=0.01)
    vector = TaskVector({**moved, "lm_head.weight": moved["model.embed_tokens.weight"]}, base=model_fingerprint(model))
    assert vector.apply(model, -0.3) is model
    for name, found in model.state_dict().items():  # the tied one too, once
        step = vector.dense(name).float() * -0.3
        assert torch.equal(found, (before[name].float() + step).to(dtype))
    with pytest.raises(ValueError, match=f"from the base {vector.base}, but this model is"):
        vector.apply(model)  # it is no longer the base


def test_apply_refuses_what_does_not_fit():
    model = tiny_llama(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fitting = {"model.norm.weight": torch.ones(32)}
    for wrong, message in (
        ({"model.norm.bias": torch.ones(32)}, "the model has no model.norm.bias"),
        ({"lm_head.weight": torch.ones(48, 31)}, r"lm_head.weight \[48, 32\] and \[48, 31\]"),
    ):
        with pytest.raises(ValueError, match=message):
            TaskVector({**fitting, **wrong}).apply(model)
    gpt2 = tiny("gpt2")
    with pytest.raises(ValueError, match="the model has no lm_head.weight|model.norm.weight"):
        TaskVector(fitting).apply(gpt2)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_buffers_are_left_alone():
    model = nn.BatchNorm1d(3)
    vector = TaskVector.from_state_dicts(model.state_dict(), {k: v + 1 for k, v in model.state_dict().items()})
    assert "running_mean" in vector and "num_batches_tracked" not in vector
    vector.apply(model)
    assert not model.running_mean.any() and torch.equal(model.bias, torch.ones(3))


@pytest.mark.parametrize("make", [dense_vector, low_rank_vector, mixed_vector])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_files_hold_everything(make, dtype, tmp_path):
    tensors = {
        name: LowRank(entry.a.to(dtype), entry.b.to(dtype), 1 / 3) if isinstance(entry, LowRank) else entry.to(dtype)
        for name, entry in make().items()
    }
    vector = TaskVector(tensors, base="0123456789abcdef", source="owner/näme")
    vector.save(tmp_path / "deep" / "v.safetensors")
    found = TaskVector.load(tmp_path / "deep" / "v.safetensors")
    assert (found.base, found.source, set(found)) == (vector.base, vector.source, set(vector))
    assert found.shapes == vector.shapes and found.low_rank == vector.low_rank
    for name, entry in vector.items():
        again = found[name]
        if isinstance(entry, LowRank):
            assert torch.equal(again.a, entry.a) and torch.equal(again.b, entry.b) and again.scale == entry.scale
        else:
            assert torch.equal(again, entry)
        assert again.dtype == dtype
    with pytest.raises(KeyError):
        found["nothing"]
    with safe_open(tmp_path / "deep" / "v.safetensors", "pt") as file:
        assert file.metadata()["format"] == "steerbook task vector 1"


def test_a_scalar_parameter_is_saved_too(tmp_path):
    TaskVector({"logit_scale": torch.tensor(0.5)}).save(tmp_path / "v")
    found = TaskVector.load(tmp_path / "v")
    assert found.shapes == {"logit_scale": torch.Size(())} and found["logit_scale"] == 0.5 and found.base is None


def test_an_arithmetic_expression_is_saved_as_its_value(tmp_path):
    one, other = mixed_vector(), mixed_vector()
    (0.3 * one - other).save(tmp_path / "v")
    assert (flat(TaskVector.load(tmp_path / "v")) - (0.3 * flat(one) - flat(other))).abs().max() < 1e-14


def test_files_that_are_no_vectors(tmp_path):
    vector = dense_vector()
    vector.save(tmp_path / "v")
    content = (tmp_path / "v").read_bytes()
    for bad in (b"", content[:-1], content[:20], b"notes" * 20):
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(ValueError, match="bad is not a readable task vector"):
            TaskVector.load(tmp_path / "bad")
    tiny("gpt2").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="is no task vector of ours"):
        TaskVector.load(tmp_path / "model" / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TaskVector.load(tmp_path / "nowhere")


def test_nothing_useless_is_saved(tmp_path):
    vector = dense_vector()
    nan = TaskVector({**vector, "v": torch.full((4, 6), float("nan"))}, source="tuned")
    with pytest.raises(ValueError, match="the task vector tuned: v holds 24 NaN or infinite values"):
        nan.save(tmp_path / "v")
    zero = factors(6, 5)
    for useless in (0 * vector, TaskVector({"w": LowRank(zero.a, 0 * zero.b)})):
        with pytest.raises(ValueError, match="zero everywhere"):
            useless.save(tmp_path / "v")
    assert list(tmp_path.iterdir()) == []
