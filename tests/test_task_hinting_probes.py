"""Linear probes against what a model's states are known to hold."""

import numpy as np
import pytest
import torch

from steerbook.data_builders.task_hinting.arrays import NumpyArrays
from steerbook.data_builders.task_hinting.family import make_rows
from steerbook.data_builders.task_hinting.sorting import Sorting
from steerbook.eval.task_hinting.probes import probe
from steerbook.trainers.task_hinting import LengthSoftmax, ScratchConfig, scratch_model
from steerbook.trainers.task_hinting.softmax import items, use_length_softmax


def rows_of(length, count, seed, repetitions=True):
    arrays = NumpyArrays([seed, length])
    lengths = arrays.integers(length, length + 1, (count,))
    return make_rows(Sorting(12, repetitions), arrays, "sort", lengths, length)


@pytest.mark.parametrize("softmax", [None, LengthSoftmax("log", 5.0, "items")])
def test_the_embedding_holds_the_last_number_and_nothing_of_the_list(softmax):
    model = scratch_model(28, ScratchConfig(hidden_size=64, initializer_range=0.5), 0, 40)
    if softmax is not None:
        use_length_softmax(model, softmax)
    tests = {length: rows_of(length, 60, 1) for length in (5, 9)}
    found = probe(model, rows_of(5, 300, 0), tests, 64, items)
    assert set(found) == {"last", "next", "repeats", "rank"}
    for length in (5, 9):
        assert all(len(scores[length]) == 3 for scores in found.values())  # the embedding and two layers
        assert found["last"][length][0] == 1.0
        # From x alone: the best guess of what follows it, which is far from certain.
        assert found["next"][length][0] < 0.6
    counts = []
    for ids in tests[9].ids.tolist():
        answer = ids[10:19]
        counts += [one == other for one, other in zip(answer, answer[1:], strict=False)]
    most = max(np.mean(counts), 1 - np.mean(counts))
    assert abs(found["repeats"][9][0] - most) < 0.1


def test_a_layer_that_is_told_the_next_number_shows_it():
    """States with the next token's one-hot added to them, by a hook."""
    model = scratch_model(28, ScratchConfig(layers=1, hidden_size=64), 0, 40)
    seen = {}
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.update(ids=kwargs["input_ids"]), with_kwargs=True)

    def tell(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        following = torch.cat([seen["ids"][:, 1:], seen["ids"][:, :1]], dim=1)
        told = hidden + 5 * torch.nn.functional.one_hot(following, 64)
        return (told, *output[1:]) if isinstance(output, tuple) else told

    model.model.layers[0].register_forward_hook(tell)
    tests = {4: rows_of(4, 50, 1, False), 8: rows_of(8, 50, 1, False)}
    found = probe(model, rows_of(4, 300, 0, False), tests)
    assert "repeats" not in found  # all numbers differ
    assert found["next"][4][1] == found["next"][8][1] == 1.0 and found["next"][8][0] < 0.8
    with pytest.raises(ValueError, match="at least two items"):
        probe(model, rows_of(1, 5, 0), {})
