"""Fine-tuning agents on trajectories, and two ways to keep their refusals while doing so (spec 1, 8)."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from jinja2 import TemplateError
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from ..training import FiniteTrainer, HouseArguments

FIRST, NEXT = 5.0, 20.0  # times beta on the first token of a turn, and on the second to the fifth (arXiv 2406.05946)
LEAST = 1e-3


@dataclass
class AgentSFTConfig(HouseArguments, SFTConfig):  # type: ignore[misc]
    """`SFTConfig` for `AgentSFTTrainer`: the paper's values for full fine-tuning (arXiv 2508.14031, spec 1)."""

    learning_rate: float = field(default=1e-5, metadata={"help": "TRL: 2e-5."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "TRL: linear."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Below 1 a share of all steps (TRL: 0)."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "TRL: 3."})
    per_device_train_batch_size: int = field(default=2, metadata={"help": "Paper: 2, times 8 steps and 8 GPUs."})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "As TRL: conversations are long."})
    max_length: int | None = field(default=16384, metadata={"help": "Longest conversation in tokens (TRL: 1024)."})
    assistant_only_loss: bool = field(default=True, metadata={"help": "Loss on turns of the assistant (TRL: all)."})
    constrained: float = field(
        default=0.0,
        metadata={"help": "Beta of constrained fine-tuning: the first tokens of turns stay close to the model that "
                  "training began with. 0: off; its paper: 0.1."},
    )  # fmt: skip


class AgentSFTTrainer(FiniteTrainer, SFTTrainer):  # type: ignore[misc]
    """`SFTTrainer` on conversations with tools, loss on the assistant's turns alone.

    Args: as `SFTTrainer`. Rows have `messages`, and may have `tools` and `loss`: of every turn of the assistant,
        whether it is trained on.

    Raises:
        ValueError: a tokenizer without a chat template, a template that does not mark what the assistant says, loss on
            more than that, turns that do not fit the template's marks, or a constraint below 0.
    """

    def __init__(
        self,
        model: Any,
        args: AgentSFTConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        if args.constrained < 0:
            raise ValueError(f"--constrained {args.constrained}: a beta of at least 0")
        if not args.assistant_only_loss:
            raise ValueError("the loss is on the assistant's turns: what users and tools say is not learned")
        if processing_class is None:
            raise ValueError("give the tokenizer, as processing_class: its chat template says what is trained on")
        template = training_template(processing_class)
        both = (train_dataset, eval_dataset)
        if any(_partly(rows) for rows in both):  # tokens and labels of our own; else TRL makes them
            train_dataset, eval_dataset = (_masked(rows, processing_class, template, args.max_length) for rows in both)
            args = copy.copy(args)
            args.assistant_only_loss = False  # TRL would ask for conversations
        else:
            train_dataset, eval_dataset = (_whole(rows) for rows in both)
        if args.constrained > 0 and isinstance(model, PeftModel | str):
            raise ValueError(
                "--constrained holds on to the model that training begins with: give a loaded model, without an "
                "adapter (merge one that is there, and give peft_config for a new one)"
            )
        self.reference: Any = None
        if args.constrained > 0 and kwargs.get("peft_config") is None:
            self.reference = copy.deepcopy(model).eval().requires_grad_(False)
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset,
                         processing_class=processing_class, **kwargs)  # fmt: skip
        if self.reference is not None:
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:
                raise ValueError(
                    "--constrained with all weights keeps a whole copy of the model on every device, which ZeRO and "
                    "FSDP are there to avoid: train an adapter, whose base is the copy"
                )
            self.reference.to(self.args.device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """With a constraint a token's loss has the weight `2 (1 - sigmoid(beta_t (log p - log p_before)))`, at least
        0.001: small where the model already says it more readily than before. `beta_t` is 5 beta on the first token of
        a turn, 20 beta on the next four, and beta behind (constrained SFT, equation 3 of arXiv 2406.05946)."""
        if self.args.constrained == 0:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs["use_cache"] = False
        outputs = model(**inputs, fused_lm_head=True)
        before = self._before(model, inputs)
        mask = inputs["labels"][:, 1:] != -100
        weights = constraint_weights(outputs.log_probs, before, mask, self.args.constrained)
        count = mask.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = -(weights * outputs.log_probs * mask).sum() / count.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the count is of all processes, whose losses are averaged
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["constraint_weight"].append(float((weights * mask).sum() / mask.sum().clamp(min=1)))
        return (loss, outputs) if return_outputs else loss

    def _before(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Log-probabilities of the labels under the model that training began with, `[rows, tokens - 1]`."""
        with torch.no_grad():
            if self.reference is None:
                bare = self.accelerator.unwrap_model(model)
                with bare.disable_adapter() if isinstance(bare, PeftModel) else nullcontext():
                    return model(**inputs, fused_lm_head=True).log_probs
            known = {key: value for key, value in inputs.items() if key != "labels"}
            logs = self.reference(**known).logits[:, :-1].float().log_softmax(-1)
            labels = inputs["labels"][:, 1:]
            return logs.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)


def constraint_weights(log_probs: torch.Tensor, before: torch.Tensor, mask: torch.Tensor, beta: float) -> torch.Tensor:
    """Weights of constrained SFT, without gradient; all `[rows, tokens]`. `mask`: what is trained on; each run of it
    is a turn, whose first five tokens are held more tightly."""
    place = torch.zeros_like(mask, dtype=torch.long)
    run = torch.zeros_like(place[:, 0])
    for column in range(mask.shape[1]):
        run = torch.where(mask[:, column], run + 1, 0)
        place[:, column] = run
    factor = torch.ones_like(log_probs)
    factor[place == 1] = FIRST
    factor[(place >= 2) & (place <= 5)] = NEXT
    weights = 2 * (1 - torch.sigmoid(beta * factor * (log_probs.detach() - before)))
    return weights.clamp(min=LEAST)


def training_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template, or TRL's of the same family, which marks what the assistant says. ValueError
    where there is neither."""
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template; take an instruct model, or give --chat_template_path")
    if has_generation_markers(tokenizer.chat_template):
        return str(tokenizer.chat_template)
    try:
        found = get_training_chat_template(tokenizer)
    except ValueError as error:
        raise ValueError(
            "the chat template does not mark what the assistant says ({% generation %}), so that the loss cannot be "
            "on its turns alone, and TRL knows none of this family that does: give one with --chat_template_path"
        ) from error
    return str(found)


def check_rows(tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> None:
    """ValueError for a template that `training_template` refuses, or a conversation that it cannot write (some take
    one call a turn, others no system message), with its row."""
    template = training_template(tokenizer)
    for row in rows:
        try:
            tokenizer.apply_chat_template(row["messages"], tools=row.get("tools") or None, chat_template=template,
                                          tokenize=False)  # fmt: skip
        except TemplateError as error:
            raise ValueError(f"row {row.get('id')}: the chat template cannot write it: {error}") from error


def _partly(rows: Dataset | None) -> bool:
    """Whether some turn of the assistant is not trained on."""
    return rows is not None and "loss" in rows.column_names and not all(all(kept or ()) for kept in rows["loss"])


def _whole(rows: Dataset | None) -> Dataset | None:
    return rows.remove_columns("loss") if rows is not None and "loss" in rows.column_names else rows


def _masked(
    rows: Dataset | None, tokenizer: PreTrainedTokenizerBase, template: str, longest: int | None
) -> Dataset | None:
    """Rows as tokens and labels of the turns that are trained on; without `loss` all of the assistant's."""
    if rows is None:
        return None

    def tokens(row: dict[str, Any]) -> dict[str, list[int]]:
        made: Any = tokenizer.apply_chat_template(
            row["messages"], tools=row.get("tools") or None, chat_template=template, return_dict=True,
            return_assistant_tokens_mask=True,
        )  # fmt: skip
        ids, mask = made["input_ids"][:longest], made["assistant_masks"]
        starts = [place for place, one in enumerate(mask) if one and not (place and mask[place - 1])]
        kept = row.get("loss") or [True] * len(starts)
        if len(starts) != len(kept):
            raise ValueError(
                f"row {row.get('id')}: {len(kept)} turns of the assistant, and the chat template marks {len(starts)}"
            )
        labels, turn = [], -1
        for place, token in enumerate(ids):
            turn += turn + 1 < len(starts) and place == starts[turn + 1]
            labels.append(token if mask[place] and kept[turn] else -100)
        return {"input_ids": list(ids), "labels": labels}

    return rows.map(tokens, remove_columns=rows.column_names, desc="turns that are trained on")
