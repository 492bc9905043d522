"""The model and the optimizer of a run, before its first step."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from transnormer.models import checkpoint
from transnormer.models.compilation import compile_blocks
from transnormer.models.decoder import Decoder
from transnormer.models.float8 import use_float8
from transnormer.models.initial_values import build_on_meta, initial_values
from transnormer.models.recompute import set_checkpointing
from transnormer.models.width import Scale, scale_initial_values, width_scales
from transnormer.optim import Optimizer, build_optimizer
from transnormer.optim.split_weights import leave_remainder, split
from transnormer.train.adapters import add_adapters, beside_adapters
from transnormer.train.objectives import Objective
from transnormer.train.objectives.base import initial_weights
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
    """Build the model as a run begins it, or in the form of the checkpoint `found`, unfilled.

    One process builds it on its host and moves it to the device. Several begin with the same weights,
    bit for bit, and none of them holds the model: it is laid out without memory, each process gets
    that of its shares, on the device, and fills it a block at a time, see ``initial_values``, or from
    the files of model.init_from. Adapters alone are whole on each host.
    """
    model, values = _begin(config, objective, found, whole=sync.devices == 1)
    scales: dict[str, Scale] = {}
    if config.optimizer.base_dim is not None:
        assert isinstance(model, Decoder)
        scales = width_scales(model, config.optimizer.base_dim)
        if values is not None:
            values = _scaled(values, scales)
        elif found is None:
            scale_initial_values(dict(model.named_parameters()), scales)
    if config.lora is not None:
        add_adapters(model, config.lora, config.model.init_from or "")
        if values is not None:
            values = map(partial(beside_adapters, model), values)
    dtype = torch.bfloat16 if config.train.weights == "bfloat16" else None
    # A run that goes on has it among the optimizer's states.
    keeps_rest = config.splits_weights and found is None and sync.devices == 1
    exact = dict(model.state_dict()) if keeps_rest else {}
    # As Module.to, but for what has no memory yet.
    model._apply(
        lambda x: x.to("meta" if x.is_meta else device, dtype if x.is_floating_point() else None)
    )
    for module in model.modules():
        if isinstance(module, Decoder):
            module.autocast_residual = config.train.residual == "bfloat16"
    use_float8(model, config.train.float8, device)
    set_checkpointing(model, config.train.checkpointing)
    if config.train.compile:
        compile_blocks(
            model, activation_memory=config.train.activation_memory, whole=sync.whole_graphs
        )
    model = sync.wrap(model, values)
    if keeps_rest:
        _keep_rest(model, exact)
    rates = {name: scale.lr for name, scale in scales.items()}
    backend = "inductor" if config.train.compile else None
    optimizer = build_optimizer(
        model, config.optimizer, rates, compile_backend=backend, matrices=sync.matrices()
    )
    return Trained(model, optimizer)


@torch.no_grad()
def _keep_rest(model: checkpoint.AnyModel, exact: Mapping[str, Tensor]) -> None:
    """Leave beside bfloat16 parameters what they round away of the weights that they were."""
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.bfloat16 and exact[name].dtype == torch.float32:
            high, low = split(exact[name].to(parameter.device))
            parameter.copy_(high)
            leave_remainder(parameter, low)


def _begin(
    config: RunConfig, objective: Objective, found: Path | None, *, whole: bool
) -> tuple[checkpoint.AnyModel, Iterable[Mapping[str, Tensor]] | None]:
    """The model of a run; one on the meta device with its values beside it."""
    # Of a run that goes on, model.init_from may be gone.
    build = objective.build_model if found is None else partial(checkpoint.new_like, found)
    if whole:
        return build(), None
    model = build_on_meta(build)
    if not next(model.parameters()).is_meta:
        return model, None
    if found is not None:
        return model, ()
    values = initial_values(model)
    decoder = model if isinstance(model, Decoder) else model.backbone
    stored = initial_weights(decoder, config, objective.tokenizer)
    if stored is not None:
        prefix = "" if decoder is model else "backbone."
        if config.lora is not None:
            # Adapters are drawn next, behind all of a model that is whole in the files.
            deque(values, maxlen=0)
        values = chain(values, [{prefix + name: x for name, x in stored.items()}])
    return model, values


def _scaled(
    values: Iterable[Mapping[str, Tensor]], scales: Mapping[str, Scale]
) -> Iterator[Mapping[str, Tensor]]:
    for some in values:
        scale_initial_values(some, scales)
        yield some
