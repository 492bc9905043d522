"""Model FLOPs utilisation (MFU): what a step's model needs, over what the device could do."""

from typing import Any

import torch
from torch import nn

from transnormer.models.checkpoint import AnyModel
from transnormer.models.cost import Flops, ModelCost
from transnormer.models.decoder import Block, Decoder
from transnormer.models.device_peaks import Peak
from transnormer.nn.token_mixers import TokenMixer
from transnormer.train.adapters import add_adapters
from transnormer.train.recipe import RunConfig


def training_flops(config: RunConfig, model: AnyModel) -> float | None:
    """Operations of a token's forward and backward pass, three times those of a forward pass.

    With adapters those of ``partly_trained_flops``.

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
    context = (seq + 1) // 2 if model.config.causal else seq
    if config.lora is None:
        return 3 * cost.flops(context).total
    with torch.device("meta"):
        # The model itself may be cut among processes.
        adapted = Decoder(model.config)
        add_adapters(adapted, config.lora, "")
    return partly_trained_flops(adapted, context).total


def partly_trained_flops(model: Decoder, context: int) -> Flops:
    """Operations of a token's forward and backward pass where some parameters are frozen.

    A product with a matrix is done once more for its gradient, where it is trained, and once more
    for that of its input, where something before it is. Mixing is done twice more where something
    before a mixer's last frozen projection is trained.

    Args:
        model: on the meta device, with its adapters; it is run once.
        context: tokens that the token sees, itself included.
    """
    # By module, in the order of the calls: whether its input depends on what is trained.
    reads: dict[nn.Module, bool] = {}

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        reads[module] = arguments[0].requires_grad

    hooks = [
        module.register_forward_pre_hook(note)
        for module in model.blocks.modules()
        if isinstance(module, nn.Linear | TokenMixer)
    ]
    model.hidden(torch.zeros(1, 2, dtype=torch.int64, device="meta"))
    for hook in hooks:
        hook.remove()
    products = mixing = 0.0
    for module, reads_trained in reads.items():
        if isinstance(module, nn.Linear):
            passes = 1 + module.weight.requires_grad + reads_trained
            products += 2.0 * passes * module.weight.numel()
    for block in model.blocks:
        assert isinstance(block, Block)
        mixer = block.token_mixer
        inside = set(mixer.modules())
        trained = [
            m.weight.requires_grad for m in reads if m in inside and isinstance(m, nn.Linear)
        ]
        last = max((i for i, is_trained in enumerate(trained) if not is_trained), default=0)
        goes_back = reads[mixer] or any(trained[:last])
        mixing += (3 if goes_back else 1) * mixer.mixing_flops(context)
    head = model.head_weight
    return Flops(products, mixing, 2.0 * (2 + head.requires_grad) * head.numel())


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
