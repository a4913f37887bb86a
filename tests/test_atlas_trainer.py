"""AtlasTrainer: losses and gradients against autograd through `functional_call`, steps that do not depend on how a
batch is cut, resuming bit for bit."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny_models import char_tokenizer, tiny_llama
from torch.func import functional_call
from transformers import TrainerCallback

from steerbook.trainers import Composer, TaskVector
from steerbook.trainers.atlas.coefficient_trainer import penalty_gradient
from steerbook.trainers.atlas.trainer import AtlasConfig, AtlasTrainer, task_weights
from steerbook.trainers.multitask import tokenised
from steerbook.trainers.training import NonFiniteError

TASKS = ("first", "second", "third")


def rows() -> Dataset:
    """Three tasks with completions of different lengths, not equally many."""
    made = []
    for i in range(8):
        made.append({"task": "first", "prompt": chr(97 + i) + "b", "completion": "ca" + chr(122 - i)})
        made.append({"task": "second", "prompt": chr(97 + i) + "cd", "completion": "q" * (1 + i % 4)})
        if i % 2:
            made.append({"task": "third", "prompt": "x" + chr(97 + i), "completion": "zyxw"[: 1 + i % 3]})
    return Dataset.from_list(made)


def make(dtype: torch.dtype = torch.float32, **options: object) -> Composer:
    torch.manual_seed(0)
    model = tiny_llama().to(dtype)
    vectors = [TaskVector({n: 0.05 * torch.randn_like(p) for n, p in model.named_parameters()}) for _ in range(3)]
    return Composer(model, vectors, **options)


class Watch(TrainerCallback):
    """Keeps what the optimiser is given."""

    def __init__(self, composer: Composer) -> None:
        self.composer, self.gradients = composer, []

    def on_pre_optimizer_step(self, *args: object, **kwargs: object) -> None:
        self.gradients.append(self.composer.coefficients.grad.clone())


def trainer(out: Path, composer: Composer, data: Dataset | None = None, callbacks=None, **changes: object):
    settings = {"per_device_train_batch_size": 20, "max_steps": 4, "save_strategy": "no", "logging_steps": 1}
    settings |= {"disable_tqdm": True, "use_cpu": True, "report_to": [], **changes}
    data = rows() if data is None else data
    return AtlasTrainer(composer, AtlasConfig(str(out), **settings), data, char_tokenizer(), callbacks)


def oracle(composer: Composer, values: torch.Tensor, weights: dict[str, float], cap: float | None = None):
    """Loss and coefficient gradient on all rows: sum over tasks of weight x mean over completion tokens."""
    model, tokenizer = composer.model, char_tokenizer()
    base, directions = composer.expansion()  # at the present coefficients; entries are read one vector at a time below
    leaf = values.clone().requires_grad_()
    weights_of = dict(model.named_parameters())
    for column, name in enumerate(composer.block_names):
        stack = torch.stack([composer_vectors(composer)[row][name] for row in range(len(values))])
        weights_of[name] = base[name] + torch.einsum("n,n...->...", leaf[:, column], stack)
    total = 0.0
    for task, weight in weights.items():
        nats = []
        for row in rows():
            if row["task"] != task:
                continue
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
            inputs = {"input_ids": torch.tensor([ids])}
            logits = functional_call(model, weights_of, (), inputs, tie_weights=True).logits
            logprobs = logits[0, :-1].log_softmax(-1)
            nats += [-logprobs[place - 1, ids[place]] for place in range(len(prompt), len(ids))]
        found = torch.stack(nats)
        total = total + weight * (found.clamp(max=cap) if cap and weight < 0 else found).mean()
    total.backward()
    return total.detach(), leaf.grad


def composer_vectors(composer: Composer) -> list[dict[str, torch.Tensor]]:
    """The vectors of `make`, drawn again."""
    torch.manual_seed(0)
    model = tiny_llama().to(composer.dtype)
    return [{n: 0.05 * torch.randn_like(p) for n, p in model.named_parameters()} for _ in range(3)]


@pytest.mark.parametrize(
    ("changes", "weights", "cap"),
    [
        ({}, {"first": 1.0, "second": 1.0, "third": 1.0}, None),
        ({"forget_tasks": ["second"]}, {"first": 0.5, "second": -1.0, "third": 0.5}, None),
        (
            {"forget_tasks": ["second", "third"], "forget_cap": 3.8, "retain_weight": 4.0},
            {"first": 4.0, "second": -1.0, "third": -1.0},
            3.8,
        ),
    ],
    ids=["addition", "negation", "bounded negation"],
)
def test_loss_and_gradient_are_autograds(tmp_path, changes, weights, cap):
    composer = make(torch.float64)
    watch = Watch(composer)
    learner = trainer(tmp_path, composer, callbacks=[watch], max_steps=1, max_grad_norm=0.0, **changes)
    values = 0.3 * torch.randn(composer.coefficients.shape, dtype=torch.float64)
    with torch.no_grad():
        composer.coefficients.copy_(values)
    composer.compose()
    learner.train()
    loss, gradient = oracle(composer, values, weights, cap)
    assert learner.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    # TRL computes log-probabilities in fp32, whatever the model.
    torch.testing.assert_close(watch.gradients[0], gradient, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(("rows_at_once", "steps"), [(10, 2), (5, 4), (4, 5)])
def test_a_step_does_not_depend_on_how_the_batch_is_cut(tmp_path, rows_at_once, steps):
    found, logs = [], []
    for size, accumulation in ((20, 1), (rows_at_once, steps)):
        composer = make(torch.float64)
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        learner = trainer(tmp_path / str(size), composer, max_steps=3, **cut)
        learner.train()
        found.append(composer.coefficients.detach())
        logs.append(learner.state.log_history)
    torch.testing.assert_close(found[1], found[0], atol=1e-9, rtol=0)
    for one, other in zip(*logs, strict=True):
        for key in one.keys() - {"total_flos", "train_runtime", "train_samples_per_second", "train_steps_per_second"}:
            assert other[key] == pytest.approx(one[key], abs=1e-5), key


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_resumes_bit_for_bit(tmp_path, rounding):
    dtype = torch.bfloat16 if rounding == "stochastic" else torch.float32
    cut = {"per_device_train_batch_size": 5, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = make(dtype, rounding=rounding)
    trainer(tmp_path / "run", whole, **cut).train()
    resumed = make(dtype, rounding=rounding)
    shutil.copytree(tmp_path / "run" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    trainer(tmp_path / "again", resumed, **cut).train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-3"))
    assert torch.equal(whole.coefficients, resumed.coefficients)
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    saved = {file.name for file in (tmp_path / "run" / "checkpoint-6").iterdir()}
    assert saved == {"coefficients.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


def test_a_checkpoint_of_other_vectors_is_refused(tmp_path):
    cut = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path / "run", make(), **cut).train()
    torch.manual_seed(0)
    model = tiny_llama()
    vectors = [TaskVector({n: 0.05 * torch.randn_like(p) for n, p in model.named_parameters()}) for _ in range(3)]
    other = Composer(model, vectors[::-1])
    with pytest.raises(ValueError, match="holds coefficients of other task vectors, or in another order"):
        trainer(tmp_path / "run", other, **cut).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_deepspeed_is_refused_with_the_way_out(tmp_path):
    learner = trainer(tmp_path, make())
    learner.is_deepspeed_enabled = True  # what the Trainer finds when it is launched so
    with pytest.raises(ValueError, match="which DeepSpeed keeps to itself; use DDP or FSDP2"):
        learner._take_over_engines()


@pytest.mark.parametrize("p", [1, 2])
def test_twenty_steps_with_a_penalty_are_those_of_autograd(p):
    """Spec 7, P13: from coefficients zero, where the subgradient of both norms is zero, in fp64; the loss a bowl."""
    torch.manual_seed(0)
    slope, bowl = torch.randn(3, 7, dtype=torch.float64), torch.rand(3, 7, dtype=torch.float64)
    paths = []
    for ours in (True, False):
        leaf = torch.nn.Parameter(torch.zeros(3, 7, dtype=torch.float64))
        optimizer = torch.optim.AdamW([leaf], lr=0.05, weight_decay=0.1)
        for _ in range(20):
            loss = (slope * leaf + bowl * leaf**2).sum()
            if ours:
                loss.backward()
                leaf.grad += penalty_gradient(leaf, p)
            else:
                (loss + 0.5 * sum(leaf[:, block].norm(p) for block in range(7)) / 7).backward()
            optimizer.step()
            optimizer.zero_grad()
        paths.append(leaf.detach().clone())
    torch.testing.assert_close(paths[0], paths[1], atol=1e-12, rtol=0)
    assert paths[0].abs().max() > 0.1


def test_unit_gradient_is_a_scaled_clipped_one_that_is_unscaled_too_late():
    """Spec 1.7: gradients scaled by 65536, clipped to norm 1, then unscaled, with Adam's eps 1e-8."""
    torch.manual_seed(0)
    gradients = [torch.randn(3, 5) * 10.0 ** -(number % 3) for number in range(50)]
    paths = []
    for released in (True, False):
        parameter = torch.nn.Parameter(torch.zeros(3, 5))
        eps = 1e-8 if released else AtlasConfig("x", optimizer="paper", use_cpu=True).adam_epsilon
        optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1, eps=eps)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            if released:
                parameter.grad *= 65536
                torch.nn.utils.clip_grad_norm_([parameter], 1.0)
                parameter.grad /= 65536
            else:
                parameter.grad /= parameter.grad.norm()
            optimizer.step()
        paths.append(parameter.detach().clone())
    torch.testing.assert_close(paths[1], paths[0], atol=1e-6, rtol=0)


def test_unit_gradient_and_penalty_reach_the_optimiser(tmp_path):
    plain, unit = make(), make()
    watched = [Watch(plain), Watch(unit)]
    values = 0.3 * torch.randn(plain.coefficients.shape)
    for composer, watch, changes in (
        (plain, watched[0], {"max_grad_norm": 0.0}),
        (unit, watched[1], {"optimizer": "paper", "norm_penalty": 2}),
    ):
        learner = trainer(tmp_path / str(len(changes)), composer, callbacks=[watch], max_steps=1, **changes)
        with torch.no_grad():
            composer.coefficients.copy_(values)
        composer.compose()
        learner.train()
    expected = watched[0].gradients[0] + penalty_gradient(values, 2)
    torch.testing.assert_close(watched[1].gradients[0], expected / expected.norm())


@pytest.mark.parametrize("p", [1, 2])
def test_penalty_is_half_the_mean_norm(p):
    values = torch.randn(4, 6, dtype=torch.float64)
    values[:, 2] = 0
    leaf = values.clone().requires_grad_()
    norms = [leaf[:, j].abs().sum() if p == 1 else (leaf[:, j] ** 2).sum().clamp(min=1e-300).sqrt() for j in range(6)]
    (0.5 * sum(norms) / 6).backward()
    torch.testing.assert_close(penalty_gradient(values, p), leaf.grad, atol=1e-12, rtol=1e-12)
    assert not penalty_gradient(torch.zeros(3, 2), p).any()  # at zero torch's subgradient is zero, for both norms


def test_entropy_of_reliable_rows(tmp_path):
    composer = make(torch.float64)
    tokenizer = char_tokenizer()
    entropies: dict[str, list[float]] = {}
    for row in rows():
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        with torch.no_grad():
            logprobs = composer.model(input_ids=ids).logits[0, -1].log_softmax(-1)
        entropies.setdefault(row["task"], []).append(-(logprobs.exp() * logprobs).sum().item())
    vocabulary = composer.model.config.vocab_size
    ordered = sorted(value for values in entropies.values() for value in values)
    middle = (ordered[9] + ordered[10]) / 2
    share = middle / torch.tensor(float(vocabulary)).log().item()
    learner = trainer(tmp_path, composer, max_steps=1, entropy_below=share)
    learner.train()
    kept = {task: [value if value < middle else 0.0 for value in values] for task, values in entropies.items()}
    expected = sum(sum(values) / len(values) for values in kept.values())
    assert learner.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-5)
    assert composer.coefficients.detach().abs().sum() > 0


def test_rows_without_tasks_are_one(tmp_path):
    composer = make()
    learner = trainer(tmp_path, composer, rows().remove_columns("task"), max_steps=1)
    learner.train()
    assert "loss/all" in learner.state.log_history[0]


def test_weights_of_tasks():
    assert task_weights(TASKS, None, 1.0) == {"first": 1.0, "second": 1.0, "third": 1.0}
    assert task_weights(TASKS, ["third"], 6.0) == {"first": 3.0, "second": 3.0, "third": -1.0}
    with pytest.raises(ValueError, match=r"forget_tasks=\['fourth'\], but the rows are of"):
        task_weights(TASKS, ["fourth"], 1.0)
    with pytest.raises(ValueError, match="name some of them, not all"):
        task_weights(TASKS, list(TASKS), 1.0)


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="switch it off"):
        trainer(tmp_path, make(), packing=True)
    with pytest.raises(ValueError, match="forget_cap=-1"):
        AtlasConfig(str(tmp_path), forget_cap=-1.0, use_cpu=True)
    with pytest.raises(ValueError, match="retain_weight=0"):
        AtlasConfig(str(tmp_path), retain_weight=0, use_cpu=True)


def test_one_pass_trains_as_two_do_and_resumes(tmp_path):
    cut = {"per_device_train_batch_size": 5, "max_steps": 6, "save_strategy": "steps", "save_steps": 3,
           "max_grad_norm": 0.0}  # fmt: skip
    found = {}
    for one_pass in (False, True):
        composer = make()
        trainer(tmp_path / str(one_pass), composer, one_pass=one_pass, **cut).train()
        found[one_pass] = composer
    assert torch.equal(found[True].coefficients, found[False].coefficients)
    for one, other in zip(found[True].model.parameters(), found[False].model.parameters(), strict=True):
        assert torch.equal(one, other)
    shutil.copytree(tmp_path / "True" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    resumed = make()
    learner = trainer(tmp_path / "again", resumed, one_pass=True, **cut)
    learner.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-3"))
    assert torch.equal(resumed.coefficients, found[True].coefficients)


@pytest.mark.parametrize(
    "changes",
    [{}, {"max_grad_norm": 0.0, "norm_penalty": 1}, {"max_grad_norm": 0.0, "optimizer": "paper"},
     {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2}],
)  # fmt: skip
def test_one_pass_refuses_what_needs_the_whole_gradient(tmp_path, changes):
    with pytest.raises(ValueError, match="--max_grad_norm 0"):
        AtlasConfig(str(tmp_path), one_pass=True, use_cpu=True, **changes)


@pytest.mark.parametrize("train_eos", [True, False])
def test_rows_tokenised_before_train_as_texts_do(tmp_path, train_eos):
    """And an end-of-text token without loss need not be read."""
    found = []
    for before in (False, True):
        composer = make(torch.float64)
        data = rows()
        if before:
            args = AtlasConfig(str(tmp_path / "t"), use_cpu=True, train_eos=train_eos)
            data = tokenised(composer.model, char_tokenizer(), data, args)
            assert data["task"] == rows()["task"] and "forward" not in vars(composer.model)
        learner = trainer(tmp_path / str(before), composer, data, train_eos=train_eos)
        batch = next(iter(learner.get_train_dataloader()))
        assert bool((batch["input_ids"] == char_tokenizer().eos_token_id).any()) is train_eos
        learner.train()
        found.append((composer.coefficients.detach(), [log.get("loss") for log in learner.state.log_history]))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    composer = make()
    learner = trainer(tmp_path, composer, learning_rate=1e30, max_steps=5)
    with pytest.raises(NonFiniteError, match="learning rate 1e[+]30"):
        learner.train()


def test_coefficients_of_other_blocks_are_refused(tmp_path):
    trainer(tmp_path, make(), max_steps=1).save_model(str(tmp_path / "saved"))
    other = trainer(tmp_path / "other", make(blocks="layer"))
    with pytest.raises(ValueError, match="other vectors or blocks"):
        other._load_from_checkpoint(str(tmp_path / "saved"))


def test_only_coefficients_are_trained(tmp_path):
    composer = make()
    before = copy.deepcopy(composer.model.state_dict())
    trainer(tmp_path, composer, max_steps=3).train()
    composer.remove()
    for name, tensor in composer.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
