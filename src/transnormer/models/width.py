"""Width transfer: rates and initial values that are right at one width, at every width (muP)."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transnormer.models.decoder import Decoder


class Scale(NamedTuple):
    """By what a parameter's initial values and its learning rate are multiplied."""

    init: float
    lr: float


def width_scales(model: Decoder, base_dim: int) -> dict[str, Scale]:
    """The scales of the parameters that have any, by name, for rates tuned at base_dim.

    With r = base_dim / model_dim, after Yang et al. 2022 (arXiv:2203.03466, table 3, Adam):
    matrices of the blocks have initial values times sqrt(r) and rates times r; the head r and r;
    the embedding, which the model multiplies by sqrt(model_dim), sqrt(r) and sqrt(r), where it does
    not, 1 and 1. Vectors stay as they are. All widths of the model must grow together: model_dim,
    that of the channel mixers, and heads or their dims.

    Raises:
        ValueError: base_dim below 1, or a tied head: one matrix cannot have the scales of both.
    """
    config = model.config
    if base_dim < 1:
        raise ValueError(f"base_dim is {base_dim}; expected at least 1")
    if config.tie_embeddings:
        raise ValueError(
            f"base_dim is {base_dim} and tie_embeddings true; expected false: embedding and head "
            "need different rates; set model.tie_embeddings = false"
        )
    ratio = base_dim / config.model_dim
    scales = {"lm_head.weight": Scale(ratio, ratio)}
    if config.embedding_scale:
        scales["embedding.weight"] = Scale(ratio**0.5, ratio**0.5)
    for name, module in model.blocks.named_modules():
        if isinstance(module, nn.Linear):
            scales[f"blocks.{name}.weight"] = Scale(ratio**0.5, ratio)
    return scales


@torch.no_grad()
def scale_initial_values(values: Mapping[str, Tensor], scales: Mapping[str, Scale]) -> None:
    """Multiply the initial values of a new model in place; values are some or all, by name."""
    for name, x in values.items():
        if name in scales:
            x.mul_(scales[name].init)
