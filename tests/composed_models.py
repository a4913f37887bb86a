"""Small models of several families in fp64, random task vectors over them, and the loss with an ordinary graph."""

import torch
from tiny_models import IDS, tiny, tiny_llama
from torch.func import functional_call
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from steerbook.trainers import TaskVector
from steerbook.trainers.atlas.partition import partition_indices

N = 3
_TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
_VISION = {**_TOWER, "image_size": 8, "patch_size": 4, "projection_dim": 10, "initializer_range": 0.2}


def clip():
    text = CLIPTextConfig(**_TOWER, vocab_size=48, max_position_embeddings=16, eos_token_id=2, projection_dim=10)
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=CLIPVisionConfig(**_VISION).to_dict(), projection_dim=10)
    )


MODELS = {
    "llama": lambda: tiny_llama(),
    "llama_tied": lambda: tiny_llama(tie_word_embeddings=True),
    "gpt2": lambda: tiny("gpt2"),  # Conv1D and tied
    "clip_vision": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**_VISION)),
    "clip": clip,
}


def make(name, dtype=torch.float64):
    torch.manual_seed(1)
    return MODELS[name]().to(dtype).eval()


def inputs(name, rows=slice(None)):
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    if name == "clip_vision":
        return {"pixel_values": images[rows]}
    if name == "clip":
        return {"pixel_values": images[rows], "input_ids": IDS}
    ids = torch.cat([IDS, IDS.flip(1)])[rows]
    return {"input_ids": ids, "labels": ids}


def loss_of(name, output):
    if name == "clip_vision":
        return (output.image_embeds**2).sum(1).mean()
    if name == "clip":
        return output.logits_per_image.log_softmax(-1)[:, 0].mean()
    return output.loss


def vectors_for(model, n=N, std=0.05, seed=7):
    """One random vector a task over every parameter."""
    generator = torch.Generator().manual_seed(seed)
    return [
        TaskVector(
            {
                name: std * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
                for name, p in model.named_parameters()
            }
        )
        for _ in range(n)
    ]


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def oracle(model, base, vectors, cut, coefficients, name, batch, partitions=1, seed=0):
    """The loss with an ordinary graph through the composed weights."""
    composed = dict(base)
    for column, members in enumerate(cut.values()):
        for member in members:
            shares = [row[column] for row in coefficients]
            if partitions > 1:
                groups = partition_indices(seed, member, slice(0, base[member].numel()), partitions)
                shares = [share[groups.view(base[member].shape)] for share in shares]
            composed[member] = base[member] + sum(s * v[member] for s, v in zip(shares, vectors, strict=True))
    return loss_of(name, functional_call(model, composed, (), batch, tie_weights=True))


def gradients(composer, name, batch):
    loss = loss_of(name, composer.model(**batch))
    loss.backward()
    return loss.detach(), composer.coefficients.grad


def set_random(composer, seed=2, std=0.3):
    """Never test at zero only."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        composer.coefficients.copy_(std * torch.randn(composer.coefficients.shape, generator=generator))
    composer.compose()


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())
