"""Run by test_task_hinting_distributed.py, alone or under torchrun: train a small model on a stream, save it.

usage: distributed_hinting.py OUT NORMALISE
"""

import json
import os
import sys

import torch
from accelerate.state import PartialState

from steerbook.data_builders.task_hinting import HintingDataArguments, make_stream
from steerbook.trainers.task_hinting import LengthSoftmax, ScratchConfig, named_tokenizer, scratch_model
from steerbook.trainers.task_hinting.softmax import use_length_softmax
from steerbook.trainers.task_hinting.trainer import HintingConfig, HintingTrainer

out, normalise = sys.argv[1:]
processes = int(os.environ.get("WORLD_SIZE", "1"))
torch.set_num_threads(1)
stream = make_stream(HintingDataArguments(values=20, longest=4, test_lengths=[4], main_rows=6, hint_rows=2))
vocabulary = stream.family.vocabulary
model = scratch_model(len(vocabulary), ScratchConfig(), 0, 40)
use_length_softmax(model, LengthSoftmax("learn", 2.0, "items"))
args = HintingConfig(
    output_dir=f"{out}/run", max_steps=4, save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=True,
    per_device_train_batch_size=4 // processes, gradient_accumulation_steps=2, learning_rate=0.05, optim="sgd",
    lr_scheduler_type="constant", report_to="none", normalise=normalise, weights=["successor=anneal:3"],
)  # fmt: skip
trainer = HintingTrainer(model, args, stream=stream, processing_class=named_tokenizer(vocabulary))
assert trainer.accelerator.num_processes == processes, trainer.accelerator.state
trainer.train()
trainer.save_model(f"{out}/model")
if trainer.is_world_process_zero():
    with open(f"{out}/log.json", "w") as file:
        json.dump([entry for entry in trainer.state.log_history if "loss" in entry], file)

PartialState().destroy_process_group()  # else a thread of gloo may outlive the interpreter, which then aborts
