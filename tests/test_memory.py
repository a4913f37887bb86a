"""Estimated memory of a step against the bytes that PyTorch's profiler saw, and the engines' formulas by hand."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
import trl.kernels.chunked_logprob
import trl.trainer.utils
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_models import char_tokenizer
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Qwen3Config,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from steerbook.arguments import RecipeArguments
from steerbook.trainers import Composer, LowRankComposer, TaskVector, memory
from steerbook.trainers.activations import model_sizes
from steerbook.trainers.atlas import LowRank
from steerbook.trainers.atlas.arguments import ArmArguments
from steerbook.trainers.atlas.dry_run import check_engine, dense_composing, low_rank_composing
from steerbook.trainers.atlas.trainer import AtlasConfig, AtlasTrainer
from steerbook.trainers.dry_run import launch_of, show_dry_run
from steerbook.trainers.lofit import LofitConfig, LofitDPOConfig, LofitDPOTrainer, LofitSFTConfig, LofitSFTTrainer
from steerbook.trainers.memory import Composition, Launch, largest_batch, memory_estimate

TOKENS, LAYERS = 96, 6
FORWARD = "the forward pass"
SETTINGS = {"max_steps": 2, "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_strategy": "no",
            "disable_tqdm": True, "train_sampling_strategy": "sequential"}  # fmt: skip
_COMMON = {"vocab_size": 1920, "hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
           "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_GQA = {**_COMMON, "intermediate_size": 176, "num_key_value_heads": 2}
CONFIGS = {
    "llama": lambda **more: LlamaConfig(**{**_GQA, **more}),
    "qwen3": lambda **more: Qwen3Config(**_GQA, head_dim=24, **more),
    "gpt2": lambda **more: GPT2Config(**_COMMON, **{"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, **more}),
    "opt": lambda **more: OPTConfig(**_COMMON, ffn_dim=256, word_embed_proj_dim=64, dropout=0.0, **more),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """TRL's head works on tiles that are made for vocabularies of 100,000; beside 1,920 words one would be all."""
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 512)
    monkeypatch.setattr(memory, "TILE", (memory.TILE[0], 512))


@pytest.fixture(autouse=True, scope="module")
def old_objects_left_alone():
    """accelerate collects garbage after every training: half a second over all that the libraries have made."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Profiled(TrainerCallback):
    """Bytes alive at most in the last step, and after its forward pass, above those alive at its start, as the CPU's
    allocator reports them."""

    def start(self):
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()

    def stop(self):
        self.profile.__exit__(None, None, None)
        events = self.profile.profiler.kineto_results.events()
        forward = min((event.end_ns() for event in events if event.name() == FORWARD), default=0)
        alive = self.peak = self.kept = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                alive += event.nbytes()
                self.peak = max(self.peak, alive)
                self.kept = alive if event.start_ns() <= forward else self.kept

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps - 1:
            self.start()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            self.stop()


def measured(trainer, held=()) -> tuple[int, int]:
    """Weights, the optimiser's state and `held`, and what the second step adds to them at most; what its forward pass
    leaves behind."""
    watch, compute_loss = Profiled(), trainer.compute_loss

    def marked(*args, **kwargs):
        with record_function(FORWARD):
            return compute_loss(*args, **kwargs)

    trainer.compute_loss = marked
    trainer.add_callback(watch)
    trainer.train()
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    return stored([*trainer.model.parameters(), *held, *states]) + watch.peak, watch.kept


def stored(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def base(kind="llama", **more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[kind](**more))


def token_rows(rows, padded=False):
    ids = torch.randint(4, 256, (2 * rows, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    ids = [row[: TOKENS // 2] if padded and number % rows else row for number, row in enumerate(ids)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def tuned(model, method):
    """The model as a method trains it."""
    conv = model.config.model_type == "gpt2"
    if method.startswith("lofit"):
        heads = [(3, 1), (4, 0), (5, 2)] if method == "lofit offset" else None
        return get_peft_model(model, LofitConfig(component=method.split()[1], heads=heads, task_type="CAUSAL_LM"))
    if method == "last layer":
        model.requires_grad_(False).model.layers[-1].requires_grad_(True)
    if method.startswith("lora"):
        targets = "all-linear" if method != "lora values" else ["c_attn"] if conv else ["v_proj"]
        dropout = 0.1 if method == "lora dropout" else 0.0
        config = LoraConfig(r=4, target_modules=targets, lora_dropout=dropout, fan_in_fan_out=conv)
        return get_peft_model(model, config)
    return model


def make(model, rows, folder, padded=False, **changes):
    lofit = any("lofit" in name for name, _ in model.named_parameters())
    trainer, config = (LofitSFTTrainer, LofitSFTConfig) if lofit else (SFTTrainer, SFTConfig)
    args = config(str(folder), per_device_train_batch_size=rows, max_length=TOKENS, learning_rate=1e-4, **{
        **SETTINGS, "dataset_kwargs": {"skip_prepare_dataset": True}, "bf16": False, **changes})  # fmt: skip
    return trainer(model, args=args, train_dataset=token_rows(rows, padded), processing_class=char_tokenizer())


def close(estimate, found, within=0.03):
    """The peak, and what the forward pass keeps, but for 200 kB that do not grow with the layers: masks, tables, ids,
    the embeddings' output beside its sum with positions. A bound of 20 % would hide a forgotten tensor."""
    peak, kept = found
    assert estimate.peak == pytest.approx(peak, rel=within)
    assert estimate.kinds["activations"] == pytest.approx(kept, rel=within, abs=200_000)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["lofit offset", "lofit scale", "lora", "full"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_peak_of_a_step(kind, method, checkpointing, tmp_path):
    launch = Launch(checkpointing=checkpointing, accelerator=False)
    for rows in (2, 6):
        trainer = make(tuned(base(kind), method), rows, tmp_path, gradient_checkpointing=checkpointing)
        found = memory_estimate(model_sizes(trainer.model, TOKENS, launch), rows, TOKENS, launch)
        close(found, measured(trainer))
        assert max(found.kinds.values()) < 0.7 * found.peak or checkpointing  # no kind is nearly all


@pytest.mark.parametrize(
    ("kind", "method", "more"),
    [
        ("llama", "full", {"bf16": True}),
        ("llama", "lora", {"bf16": True}),
        ("llama", "lofit scale", {"bf16": True}),
        ("llama", "full", {"bf16": True, "gradient_checkpointing": True}),
        ("llama", "lora", {"padded": True}),
        ("llama", "lofit scale", {"padded": True}),
        ("llama", "lora values", {}),
        ("llama", "lora dropout", {}),
        ("llama", "last layer", {}),
        ("llama", "last layer", {"gradient_checkpointing": True}),
        ("gpt2", "full", {"resid_pdrop": 0.1}),
        ("llama", "full", {"tie_word_embeddings": True}),
        ("llama", "full", {"attn_implementation": "eager"}),
        ("llama", "full", {"vocab_size": 256, "rows": 1}),  # at the end, with all gradients
        ("llama", "full", {"vocab_size": 256, "intermediate_size": 704, "gradient_checkpointing": True}),  # a layer
        ("qwen3", "full", {}),
        ("opt", "full", {}),
    ],
)
def test_what_else_changes_the_peak(kind, method, more, tmp_path):
    of_model = {name: more[name] for name in more if name in vars(CONFIGS[kind]()) or name == "attn_implementation"}
    flags = {"gradient_checkpointing": False, "bf16": False}
    flags |= {name: more[name] for name in flags if name in more}
    rows, padded = more.get("rows", 4), more.get("padded", False)
    trainer = make(tuned(base(kind, **of_model), method), rows, tmp_path, padded, **flags)
    launch = Launch(half=flags["bf16"], checkpointing=flags["gradient_checkpointing"], accelerator=False)
    sizes = model_sizes(trainer.model, TOKENS, launch, padded=padded)
    close(memory_estimate(sizes, rows, TOKENS, launch), measured(trainer))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("placement", ["resident", "stream", "low rank"])
def test_the_peak_of_a_step_on_coefficients(placement, checkpointing, tmp_path):
    model, generator = base(), torch.Generator().manual_seed(0)
    if placement == "low rank":
        factors = {name: LowRank(torch.randn(4, p.shape[1], generator=generator), torch.randn(p.shape[0], 4))
                   for name, p in model.named_parameters() if "_proj" in name}  # fmt: skip
        composer = LowRankComposer(model, [TaskVector(factors), TaskVector(factors)])
        composing, held = low_rank_composing(composer), []
    else:
        vectors = [
            TaskVector({name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()})
            for _ in range(3)
        ]
        composing = dense_composing(model, vectors, ArmArguments(placement=placement))
        composer = Composer(model, vectors, placement=placement)
        held = [slot.base for slot in composer._slots]
        held += list(composer._source._stacks.values()) if placement == "resident" else []
        assert sum(composing.memory.held.values()) == stored(held)
    args = AtlasConfig(str(tmp_path), per_device_train_batch_size=4, gradient_checkpointing=checkpointing, **SETTINGS)
    trainer = AtlasTrainer(composer, args, token_rows(4), char_tokenizer())
    launch = Launch(checkpointing=checkpointing, accelerator=False)
    sizes = model_sizes(trainer.model, TOKENS, launch)
    close(memory_estimate(sizes, 4, TOKENS, launch, composition=composing.memory), measured(trainer, held), 0.04)
    assert composing.memory.coefficients == composer.coefficients.numel()


def test_the_peak_of_a_step_on_images():
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(
        text_config={**tower, "vocab_size": 64}, vision_config={**tower, "image_size": 32, "patch_size": 4}
    ))  # fmt: skip
    vector = TaskVector({name: torch.randn(p.shape) for name, p in clip.named_parameters() if "vision_model" in name})
    composing = dense_composing(clip, [vector], ArmArguments())
    composer = Composer(clip, [vector])
    images, tokens, watch = torch.randn(8, 3, 32, 32), clip.vision_model.embeddings.num_positions, Profiled()
    watch.start()
    clip.get_image_features(pixel_values=images).pooler_output.sum().backward()
    composer.compose()
    watch.stop()
    held = [*clip.parameters(), *(slot.base for slot in composer._slots), *composer._source._stacks.values()]
    launch = Launch(accelerator=False)
    sizes = model_sizes(clip, tokens, launch)
    found = memory_estimate(sizes, 8, tokens, launch, composition=composing.memory)
    assert found.peak == pytest.approx(stored(held) + watch.peak, rel=0.05)
    assert found.kinds["output head, for a moment"] == 0


def test_the_peak_of_a_step_on_pairs(tmp_path, capsys):
    rows = [{"prompt": "a" * 40, "chosen": "b" * 55, "rejected": "c" * 55}] * 8
    args = LofitDPOConfig(str(tmp_path), per_device_train_batch_size=4, learning_rate=1e-4, **SETTINGS)
    trainer = LofitDPOTrainer(base(), args=args, train_dataset=Dataset.from_list(rows),
                              processing_class=char_tokenizer(), peft_config=LofitConfig())  # fmt: skip
    show_dry_run(trainer, char_tokenizer())
    shown = capsys.readouterr().out
    assert "4 rows of 96 tokens (on the CPU, engine none, 1 process, no bf16" in shown
    told = int(shown.partition("at most at one time")[2].split()[0].replace(",", ""))
    assert told == pytest.approx(measured(trainer)[0], rel=0.03)


def test_the_largest_batch_that_fits(tmp_path):
    launch = Launch(accelerator=False)
    sizes = model_sizes(tuned(base(), "lora"), TOKENS, launch)
    peaks = [memory_estimate(sizes, rows, TOKENS, launch).peak for rows in range(1, 40)]
    assert peaks == sorted(peaks) and len(set(peaks)) == len(peaks)
    for limit in (peaks[0] - 1, peaks[0], peaks[6], peaks[7] - 1, peaks[20] + 5):
        assert largest_batch(sizes, TOKENS, launch, limit) == sum(peak <= limit for peak in peaks)
    limit = (peaks[6] + peaks[7]) // 2
    trainer = make(tuned(base(), "lora"), largest_batch(sizes, TOKENS, launch, limit), tmp_path,
                   gradient_checkpointing=False)  # fmt: skip
    found, _ = measured(trainer)
    assert 0.85 * limit < found <= limit


def test_the_tiles_are_those_of_the_library(monkeypatch, tmp_path):
    monkeypatch.undo()
    library = (trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE, trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE)
    assert memory.TILE == library
    launch = Launch(accelerator=False)
    trainer = make(base(), 2, tmp_path, gradient_checkpointing=False)
    close(memory_estimate(model_sizes(trainer.model, TOKENS, launch), 2, TOKENS, launch), measured(trainer))


H, V = 64, 1920
LAYER = 2 * H * H + 2 * H * 32 + 3 * H * 176 + 2 * H
ALL = LAYERS * LAYER + 2 * V * H + H


@pytest.mark.parametrize(
    ("engine", "half", "weights", "gradients", "optimiser", "moved"),
    [
        ("none", False, 4 * ALL, 4 * ALL, 8 * ALL, 0),
        ("none", True, 4 * ALL, 4 * ALL, 8 * ALL, 0),  # autocast keeps the weights in fp32
        ("ddp", False, 4 * ALL, 8 * ALL, 8 * ALL, 1.5 * 4 * ALL),
        ("zero2", False, 4 * ALL, ALL, 3 * ALL, 1.5 * 4 * ALL),
        ("zero2", True, 2 * ALL, 0.5 * ALL, 3 * ALL, 1.5 * 2 * ALL),
        ("zero3", True, 0.5 * ALL, 0.5 * ALL, 3 * ALL, 0.75 * 3 * 2 * ALL),
        ("zero3_offload", True, 0, 0, 0, 0.75 * 3 * 2 * ALL),
        ("fsdp2", False, ALL, ALL, 2 * ALL, 0.75 * 3 * 4 * ALL),
    ],
)
def test_what_an_engine_divides_and_moves(engine, half, weights, gradients, optimiser, moved):
    launch = Launch(engine, 1 if engine == "none" else 4, half)
    found = memory_estimate(model_sizes(base(), TOKENS, launch), 2, TOKENS, launch)
    assert [found.kinds[name] for name in ("weights", "gradients", "optimiser (AdamW)")] == [
        weights, gradients, optimiser]  # fmt: skip
    assert found.moved == moved
    if engine in ("zero3", "zero3_offload", "fsdp2"):  # embeddings and head are the largest part
        assert found.kinds["weights put together at a time"] == (2 if half else 4) * (2 * V * H + H)
    offload = engine == "zero3_offload"
    whole = 4 * ALL * (engine not in ("none", "ddp"))  # waits for what is learned
    assert found.host == whole + offload * (0.5 + 0.5 + 3) * ALL and found.moved_host == offload * 1.5 * ALL


def test_engines_with_a_frozen_base():
    model = tuned(base().to(torch.bfloat16), "lora")  # the factors are in fp32
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def found(engine, processes=4):
        launch = Launch(engine, processes, half=True)
        return memory_estimate(model_sizes(model, TOKENS, launch), 2, TOKENS, launch)

    assert found("ddp").kinds["gradients"] == 8 * trained and found("ddp").moved == 1.5 * 4 * trained
    assert found("zero2").kinds["weights"] == 2 * (ALL + trained)  # the base is whole
    assert found("fsdp2").kinds["weights"] == round((2 * ALL + 4 * trained) / 4)
    assert found("ddp", 1).moved == found("zero3", 1).moved == 0
    peaks = [found(engine).peak for engine in ("ddp", "zero2", "zero3", "zero3_offload")]
    assert peaks == sorted(peaks, reverse=True) and found("zero3", 8).peak < found("zero3", 2).peak


def test_composing_under_engines():
    model = base()
    composition = Composition({"resident: task vectors": 4000}, 0, 10)

    def found(engine):
        launch = Launch(engine, 4)
        return memory_estimate(model_sizes(model, TOKENS, launch), 2, TOKENS, launch, composition=composition)

    assert found("ddp").moved == 1.5 * 4 * 10 and found("ddp").kinds["optimiser (AdamW)"] == 80
    assert found("ddp").kinds["gradients"] == 4 * V * H  # one at a time
    assert found("fsdp2").kinds["resident: task vectors"] == 1000
    for engine, low_rank in (("zero3", False), ("zero2", True), ("fsdp2", True)):
        with pytest.raises(ValueError, match=f"engine {engine}: "):
            check_engine(engine, low_rank)
    check_engine("fsdp2", low_rank=False)
    check_engine("ddp", low_rank=True)


def test_the_launch_is_recognised(monkeypatch):
    def args(kind=DistributedType.NO, plugin=None, world=1):
        return SimpleNamespace(distributed_state=SimpleNamespace(distributed_type=kind), deepspeed_plugin=plugin,
                               fsdp=[], world_size=world, bf16=True, fp16=False, gradient_checkpointing=True,
                               device=torch.device("cpu"))  # fmt: skip

    def zero(stage, **more):
        return args(DistributedType.DEEPSPEED, SimpleNamespace(deepspeed_config={"zero_optimization": {
            "stage": stage, **more}}), 8)  # fmt: skip

    offload = {"offload_optimizer": {"device": "cpu"}}
    assert launch_of(args()) == Launch("none", 1, True, True, accelerator=False)
    assert launch_of(args(DistributedType.MULTI_CPU, world=2)) == Launch("ddp", 2, True, True, accelerator=False)
    assert launch_of(zero(2)).engine == "zero2" and launch_of(zero(3)).engine == "zero3"
    assert launch_of(zero(3, **offload)) == Launch("zero3_offload", 8, True, True, accelerator=False)
    assert launch_of(args(), "fsdp2", 16) == Launch("fsdp2", 16, True, True)  # planned for accelerators
    assert launch_of(args(DistributedType.MULTI_GPU, world=8), "none").processes == 1
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert launch_of(args(DistributedType.FSDP, world=2)).engine == "fsdp2"
    with pytest.raises(ValueError, match="stage 1: name the nearest with --dry_engine"):
        launch_of(zero(1))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"dry_engine": "zero3"}, "--dry_engine zero3 is for --dry_run"),
        ({"dry_processes": 8}, "--dry_processes 8 is for --dry_run"),
        ({"dry_memory": 80.0}, "--dry_memory 80.0 is for --dry_run"),
        ({"dry_run": True, "dry_processes": 8}, "--dry_processes 8: say how they share the work: --dry_engine"),
        ({"dry_run": True, "dry_processes": 2, "dry_engine": "none"}, "--dry_processes 2: say how"),
        ({"dry_run": True, "dry_processes": 0}, "--dry_processes 0: at least 1"),
        ({"dry_run": True, "dry_memory": 0.0}, "--dry_memory 0.0: GiB above 0"),
    ],
)
def test_flags(flags, told):
    with pytest.raises(ValueError, match=told):
        RecipeArguments(**flags)


def test_a_dry_run_prints_kinds_movement_and_the_largest_batch(tmp_path, capsys):
    trainer = make(tuned(base(), "lofit offset"), 2, tmp_path, gradient_checkpointing=False)
    show_dry_run(trainer, char_tokenizer())
    shown = capsys.readouterr().out
    assert "--dry_memory GIB says which memory" in shown and "engine none" in shown
    show_dry_run(trainer, char_tokenizer(), engine="zero3_offload", processes=8, memory=0.5)
    shown = " ".join(capsys.readouterr().out.split())
    launch = Launch("zero3_offload", 8)
    sizes = model_sizes(trainer.model, TOKENS, launch)
    most = largest_batch(sizes, TOKENS, launch, 2**29)
    assert "on an accelerator, engine zero3_offload, 8 processes" in shown
    assert f"all parameters {ALL + 48:,} trained parameters 48 weights 0 bytes" in shown
    assert "in the host's memory" in shown and "moved a step to and from the host" in shown
    assert f"fits 0.5 GiB: {most:,} rows of 96 tokens" in shown
    show_dry_run(trainer, char_tokenizer(), memory=0.001)
    assert "Largest batch that fits 0.001 GiB: none; one row needs" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["atlas", "atlas_clip", "lofit", "ping", "self_interpretability", "task_hinting"])
def test_every_recipe_tells_what_a_step_takes(name, load_recipe, tmp_path, capsys):
    load_recipe(name).main([
        "--preset", "smoke", "--dry_run", "true", "--dry_engine", "ddp", "--dry_processes", "2", "--dry_memory", "1",
        "--output_dir", str(tmp_path / "run")])  # fmt: skip
    shown = capsys.readouterr().out
    for text in ("engine ddp, 2 processes", "trained parameters", "weights  ", "gradients  ", "optimiser (AdamW)  ",
                 "activations  ", "at most at one time  ", "moved a step between processes  ",
                 "Largest batch that fits 1 GiB: "):  # fmt: skip
        assert text in shown, text
    assert ("task vectors  " in shown) == name.startswith("atlas")
    moved = shown.partition("moved a step between processes")[2].split()[0]
    assert int(moved.replace(",", "")) > 0 and not (tmp_path / "run").exists()
