"""The model and the optimizer of a run, before its first step."""

from pathlib import Path
from typing import NamedTuple

import torch

from transnormer.models import checkpoint
from transnormer.models.compilation import compile_blocks
from transnormer.models.decoder import Decoder
from transnormer.models.recompute import set_checkpointing
from transnormer.models.width import Scale, scale_initial_values, width_scales
from transnormer.optim import Optimizer, build_optimizer
from transnormer.train.adapters import add_adapters
from transnormer.train.objectives import Objective
from transnormer.train.recipe import RunConfig
from transnormer.train.sync import GradSync


class Trained(NamedTuple):
    """What a run changes: its model, on the device, and the optimizer of its parameters."""

    model: checkpoint.AnyModel
    optimizer: Optimizer


def set_up(
    config: RunConfig,
    objective: Objective,
    found: Path | None,
    device: torch.device,
    sync: GradSync,
) -> Trained:
    """Build the model as a run begins it, or in the form of the checkpoint `found`, unfilled."""
    # Of a run that goes on, model.init_from may be gone.
    model = objective.build_model() if found is None else checkpoint.new_like(found)
    scales: dict[str, Scale] = {}
    if config.optimizer.base_dim is not None:
        assert isinstance(model, Decoder)
        scales = width_scales(model, config.optimizer.base_dim)
        if found is None:
            scale_initial_values(model, scales)
    if config.lora is not None:
        add_adapters(model, config.lora, config.model.init_from or "")
    dtype = torch.bfloat16 if config.train.weights == "bfloat16" else None
    model = model.to(device, dtype)
    for module in model.modules():
        if isinstance(module, Decoder):
            module.autocast_residual = config.train.residual == "bfloat16"
    set_checkpointing(model, config.train.checkpointing)
    if config.train.compile:
        # Between processes messages pass in the middle of a block: states of parts of a sequence, sums,
        # and parameters of norms and angles, which are gathered on their own.
        whole = sync.devices == 1
        compile_blocks(model, activation_memory=config.train.activation_memory, whole=whole)
    model = sync.wrap(model)
    rates = {name: scale.lr for name, scale in scales.items()}
    backend = "inductor" if config.train.compile else None
    optimizer = build_optimizer(model, config.optimizer, rates, compile_backend=backend)
    return Trained(model, optimizer)
