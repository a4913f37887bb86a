"""Run by test_lofit_distributed.py under torchrun: fit scales with the L1 penalty on a tiny model, save them.

By hand under DeepSpeed: accelerate launch --config_file YAML tests/distributed_lofit.py OUT gloo
"""

import os
import sys

import torch
from accelerate.state import PartialState
from datasets import Dataset
from tiny_models import char_tokenizer, tiny_llama

from steerbook.trainers.lofit import LofitConfig, LofitSFTConfig, LofitSFTTrainer

out, flags = sys.argv[1], sys.argv[2:]
processes = int(os.environ.get("WORLD_SIZE", "1"))
torch.set_num_threads(1)
torch.manual_seed(0)
model, tokenizer = tiny_llama(), char_tokenizer()
rows = Dataset.from_list([{"prompt": chr(97 + i) + "b", "completion": "ca" + chr(122 - i)} for i in range(16)])
extra = {"ddp_backend": "gloo"} if flags else {"use_cpu": True}
args = LofitSFTConfig(
    output_dir=f"{out}/run", l1_lambda=5e-2, learning_rate=1e-2, max_steps=4, save_strategy="no", logging_steps=1,
    per_device_train_batch_size=8 // processes // 2, gradient_accumulation_steps=2, disable_tqdm=True, **extra,
)  # fmt: skip
trainer = LofitSFTTrainer(
    model, args=args, train_dataset=rows, processing_class=tokenizer,
    peft_config=LofitConfig(component="scale", init_std=1e-2),
)  # fmt: skip
assert trainer.accelerator.num_processes == processes, trainer.accelerator.state
trainer.train()
trainer.save_model(f"{out}/adapter")

PartialState().destroy_process_group()  # else a thread of gloo may outlive the interpreter, which then aborts
