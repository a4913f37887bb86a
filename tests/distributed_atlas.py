"""Run by test_atlas_distributed.py, alone or under torchrun: fit coefficients on a tiny model, save them.

usage: distributed_atlas.py OUT none|fsdp2
"""

import os
import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from tiny_models import char_tokenizer, tiny_llama

out, engine = sys.argv[1:]
processes = int(os.environ.get("WORLD_SIZE", "1"))
torch.set_num_threads(1)
extra = {"use_cpu": True}
if engine == "fsdp2":  # accelerate starts FSDP2 on accelerators only; told that gloo is one, it runs on the CPU too
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    extra = {"ddp_backend": "gloo"}

from steerbook.trainers import Composer, TaskVector  # noqa: E402
from steerbook.trainers.atlas.trainer import AtlasConfig, AtlasTrainer  # noqa: E402

torch.manual_seed(0)
model, tokenizer = tiny_llama(), char_tokenizer()
vectors = [TaskVector({n: 0.05 * torch.randn_like(p) for n, p in model.named_parameters()}) for _ in range(3)]
texts = [("first", chr(97 + i) + "b", "ca" + chr(122 - i)) for i in range(8)]
texts += [("second", chr(97 + i) + "cd", "q" * (1 + i % 3)) for i in range(8)]
rows = Dataset.from_list([{"task": task, "prompt": prompt, "completion": answer} for task, prompt, answer in texts])
composer = Composer(model, vectors)
args = AtlasConfig(
    output_dir=f"{out}/run", max_steps=4, save_strategy="no", logging_steps=1, disable_tqdm=True,
    per_device_train_batch_size=8 // processes // 2, gradient_accumulation_steps=2, **extra,
)  # fmt: skip
trainer = AtlasTrainer(composer, args, rows, tokenizer)
assert trainer.accelerator.num_processes == processes, trainer.accelerator.state
assert trainer.is_fsdp_enabled == (engine == "fsdp2"), trainer.accelerator.state
trainer.train()
assert composer.sharded == (engine == "fsdp2")
trainer.save_model(f"{out}/coefficients")
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print("LOSSES", losses)

PartialState().destroy_process_group()  # else a thread of gloo may outlive the interpreter, which then aborts
