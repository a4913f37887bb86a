"""RED (Wu et al., 2024): `h -> s * h + b` on the output of every MLP, a pair of vectors per layer."""

from __future__ import annotations

import warnings

from peft import BeftConfig, IA3Config, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTuner
from transformers import PreTrainedModel

# The MLP's output projection.
MLP_OUTPUTS = {
    **dict.fromkeys(
        ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text", "phi3", "olmo2", "smollm3"],
        "down_proj",
    ),
    "gpt_neox": "dense_4h_to_h",
    "opt": "fc2",
}


def red_model(model: PreTrainedModel) -> PeftModel:
    """The model with RED's `2 * hidden_size * layers` trainable numbers, starting at the identity.

    Built from two of PEFT's tuners on the same projection: IA3 scales its output, BEFT adds a bias to that.

    Raises:
        ValueError: the architecture's MLP output is not known (or not linear in PEFT's sense, as GPT-2's).
    """
    model_type = model.config.model_type
    if model_type not in MLP_OUTPUTS:
        raise ValueError(f"RED does not know the MLP output of {model_type!r}; known: {', '.join(MLP_OUTPUTS)}")
    target = MLP_OUTPUTS[model_type]
    tuned = get_peft_model(model, IA3Config(target_modules=[target], feedforward_modules=[], task_type="CAUSAL_LM"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are two tuners on one model, and that BEFT's bias cannot merge
        inject_adapter_in_model(BeftConfig(target_modules=[target]), tuned.get_base_model(), "red_bias")
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad = "ia3_l" in name or "beft_bias" in name
    return tuned


def unload_red(tuned: PeftModel) -> None:
    """Take RED off its base, which is bare again. IA3's own `unload` refuses quantised bases, as if it merged."""
    BaseTuner._unload_and_optionally_merge(tuned.base_model, merge=False)
