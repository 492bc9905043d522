"""Model FLOPs utilisation (MFU): what a step's model needs, over what the device could do."""

import torch

from transnormer.models.checkpoint import AnyModel
from transnormer.models.cost import ModelCost
from transnormer.models.decoder import Decoder
from transnormer.models.device_peaks import Peak
from transnormer.train.recipe import RunConfig


def training_flops(config: RunConfig, model: AnyModel) -> float | None:
    """Operations of a token's forward and backward pass, three times those of a forward pass.

    What is computed again (checkpointing, segments, logits) does not count (Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B); the mean context of a sample of data.seq tokens does. None where
    that is unknown: texts of any length, or packed documents under attention that grows with them.
    """
    if not isinstance(model, Decoder) or config.objective.kind == "classification":
        return None
    cost = ModelCost.of(model.config, torch.float32)
    if config.data.packing == "documents" and cost.state_bytes_per_token:
        return None
    seq = config.data.seq
    return 3 * cost.flops((seq + 1) // 2 if model.config.causal else seq).total


def token_share(
    config: RunConfig, model: AnyModel, peak: Peak | None, precision: str
) -> float | None:
    """The share of a device's second that a trained token needs at least; None where unknown.

    Times tokens a second it is the MFU.
    """
    if peak is None:
        return None
    flops = training_flops(config, model)
    return None if flops is None else flops / peak.flops(precision)
