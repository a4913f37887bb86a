"""Models and rows for test_matrix.py."""

import json
from pathlib import Path

import torch
from chat_models import CHAT
from safetensors.torch import load_file, save_file
from test_atlas_clip import save_clip_world
from test_ping_pretrained import save_family
from transformers import AutoModelForCausalLM, LlamaConfig

from steerbook.trainers.tiny_lm import build_tokenizer

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def write(path: Path, rows: list) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_world(folder: Path) -> Path:
    """A base, the same that chats, an agent, two fine-tunes, and rows for all recipes."""
    tokenizer = build_tokenizer([], "byte")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **SMALL))
    for name in ("base", "vectors/first", "vectors/second", "chat"):
        if name == "chat":
            tokenizer.chat_template = CHAT
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name in ("first", "second"):
        file = folder / "vectors" / name / "model.safetensors"
        moved = {key: tensor + 0.02 * torch.randn_like(tensor) for key, tensor in load_file(file).items()}
        save_file(moved, file, {"format": "pt"})
        rows = [{"prompt": f"{name} {number}:", "completion": f" {name[number % 5]}"} for number in range(20)]
        write(folder / f"{name}.jsonl", rows)
    save_family("qwen25_7b", folder)
    (folder / "qwen25_7b").rename(folder / "agent")
    for split, start, count in (("train", 0, 12), ("val", 20, 3), ("test", 40, 5)):
        write(folder / "mquake" / f"{split}.jsonl", [mquake(number) for number in range(start, start + count)])
    save_clip_world(folder / "clip", ["a photo of a {}."])
    write(folder / "contexts.jsonl", [
        {"short_name": f"c{number}", "question": f"As {number}?",
         "attributes": [{"name": f"{name}{number}", "units": "", "range": [0, 9]} for name in "wh"]}
        for number in range(7)])  # fmt: skip
    return folder


def mquake(number: int) -> dict:
    rewrite = {"prompt": "The capital of {} is", "subject": f"Land {number}", "target_new": {"str": f"City {number}"}}
    return {"case_id": number, "requested_rewrite": [rewrite], "new_answer": f"Castle {number}",
            "questions": [f"Where is the king of Land {number}?", "Again?", "And again?"],
            "new_answer_alias": ["the castle"]}  # fmt: skip
