"""Inference-time intervention (Li et al., 2023): probe every head, shift the best ones along a fixed direction.

The baked form shifts all positions alike, so an ITI edit *is* a LoFiT offset, only not learned: `v = alpha * sigma *
theta`. That is how it is represented here, and why it saves, merges and runs like the rest.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase

from .config import LofitConfig
from .layer import LofitLayer
from .model import layer_index


@dataclass(frozen=True)
class ItiProbe:
    """What ITI learns from labelled answers.

    Attributes:
        accuracy: held-out accuracy of each head's logistic probe, `{layer: [head 0, ...]}`.
        shift: `sigma * theta`, `{layer: [heads, head_dim]}`: the unit mass-mean direction from false to true answers
            times the standard deviation of the activations along it.
    """

    accuracy: dict[int, list[float]]
    shift: dict[int, torch.Tensor]


def iti_probe(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    labels: Sequence[int],
    groups: Sequence[str],
    *,
    seed: int = 0,
    batch_size: int = 32,
) -> ItiProbe:
    """Fit the probes on question-and-answer texts.

    Args:
        model: a base model (no adapters).
        texts: prompt and answer in one string; the last token's head outputs are the features.
        labels: 1 for true answers, 0 for false ones.
        groups: the question of each text; 80 % of the questions fit the probes, the others score them.
        seed: of that split.

    Raises:
        ValueError: only one kind of label among the texts, or fewer than five questions.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    questions = sorted(set(groups))
    if len(questions) < 5 or len(set(labels)) < 2:
        raise ValueError(
            f"ITI needs true and false answers to at least five questions; got {len(questions)} questions, labels "
            f"{sorted(set(labels))}"
        )
    random.Random(f"iti-{seed}").shuffle(questions)
    fit_questions = set(questions[: max(1, int(0.8 * len(questions)))])
    in_fit = np.array([group in fit_questions for group in groups])
    truth = np.array(labels)

    accuracy, shift = {}, {}
    for layer, features in head_outputs(model, tokenizer, texts, batch_size=batch_size).items():  # [texts, heads, dim]
        scores = []
        for head in range(features.shape[1]):
            x = features[:, head].numpy()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # a head that knows nothing need not
                probe = LogisticRegression(max_iter=1000).fit(x[in_fit], truth[in_fit])
            scores.append(float(probe.score(x[~in_fit], truth[~in_fit])))
        accuracy[layer] = scores
        label = torch.tensor(truth)
        theta = nn.functional.normalize(features[label == 1].mean(0) - features[label == 0].mean(0), dim=-1)
        sigma = torch.einsum("nhd,hd->nh", features, theta).std(0)
        shift[layer] = sigma[:, None] * theta
    return ItiProbe(accuracy, shift)


@torch.no_grad()
def head_outputs(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, batch_size: int
) -> dict[int, torch.Tensor]:
    """Input of every output projection at each text's last token: `{layer: [texts, heads, head_dim]}`, fp32 on CPU."""
    # A LoFiT adapter at its identity finds the projections and head widths, and is taken off again.
    probe = get_peft_model(model, LofitConfig(init_std=0.0))
    seen: dict[int, list[torch.Tensor]] = {}
    last: torch.Tensor
    handles = []
    modes = {module: module.training for module in model.modules()}
    probe.eval()  # a fit leaves the base in training mode, and GPT-2 has dropout
    try:
        for name, layer in probe.named_modules():
            if isinstance(layer, LofitLayer):
                rows = seen.setdefault(layer_index(name), [])

                def keep(module: nn.Module, args: tuple, rows: list = rows) -> None:
                    z = args[0][torch.arange(len(last)), last]
                    rows.append(z.float().cpu().unflatten(-1, (module.num_heads, module.head_dim)))

                handles.append(layer.register_forward_pre_hook(keep))
        device = next(model.parameters()).device
        for start in range(0, len(texts), batch_size):
            batch = tokenizer(
                list(texts[start : start + batch_size]), return_tensors="pt", padding=True, padding_side="right"
            ).to(device)
            last = batch["attention_mask"].sum(-1) - 1
            probe(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    finally:
        for handle in handles:
            handle.remove()
        probe.unload()
        for module, training in modes.items():
            module.training = training
    return {layer: torch.cat(rows) for layer, rows in sorted(seen.items())}


def iti_adapter(model: nn.Module, probe: ItiProbe, heads: Sequence[tuple[int, int]], alpha: float) -> PeftModel:
    """The model with `z_i <- z_i + alpha * sigma_i * theta_i` on the given heads, as a LoFiT adapter."""
    tuned = get_peft_model(model, LofitConfig(heads=list(heads), init_std=0.0))
    for name, layer in tuned.named_modules():
        if isinstance(layer, LofitLayer):
            rows = probe.shift[layer_index(name)][list(layer.selected["default"])]
            layer.lofit_offset["default"].data.copy_(alpha * rows)
    return tuned
