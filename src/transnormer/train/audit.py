"""One batch of a run on one process and on a layout: the same loss and gradients, or a wrong layout."""

import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transnormer.train.adapters import open_adapters
from transnormer.train.backward import make_backward
from transnormer.train.batches import Batches
from transnormer.train.model_setup import set_up
from transnormer.train.objectives import OBJECTIVES, Objective, Setting
from transnormer.train.precision import choose_device
from transnormer.train.processes import first_then_others, join_processes
from transnormer.train.recipe import RunConfig
from transnormer.train.sync import GradSync, OneProcess

# What float32 sums in another order may differ by, with room for long ones: a wrong reduction is off
# by its whole share.
TOLERANCE = 1e-3
# Settings under which one batch has one answer up to the order of sums: float32, no dropout, no graphs.
_EXACT: dict[str, dict[str, Any]] = {
    "train": {
        "precision": "float32",
        "weights": "float32",
        "residual": "float32",
        "float8": "none",
        "compile": False,
        "activation_memory": 1.0,
        "cuda_graph": False,
    },
    "model": {"dropout": 0.0},
    "guard": {"action": "off"},
    "parallel": {"outer": None},
}


class Deviation(NamedTuple):
    """One quantity on one process and on the layout.

    Attributes:
        name: "loss", "gradient norm", or the parameter whose gradient it is.
        size: largest absolute value on one process.
        deviation: largest absolute difference, divided by size; 0 where both are 0.
    """

    name: str
    size: float
    deviation: float


class Audit(NamedTuple):
    """What an audit found, the loss and the norm first.

    Attributes:
        ranks: processes of the layout.
        parallel: the axes of the layout.
        tolerance: the most that a deviation may be.
        deviations: of every quantity.
    """

    ranks: int
    parallel: dict[str, int]
    tolerance: float
    deviations: list[Deviation]

    @property
    def wrong(self) -> list[Deviation]:
        """What deviates by more than the tolerance, or is not a number."""
        return [found for found in self.deviations if not found.deviation <= self.tolerance]


class _Pass(NamedTuple):
    loss: float
    norm: float
    gradients: dict[str, Tensor]


def run_audit(
    config: RunConfig, *, tolerance: float = TOLERANCE, sync: GradSync | None = None
) -> Audit:
    """Make the gradients of a run's first batch on one process and on its layout, and compare them.

    Every process of the layout calls it. In float32, without dropout, compilation and outer steps;
    the first process holds the whole model and its gradient twice. Nothing is written but a temporary
    copy of the data.

    Args:
        config: the run.
        tolerance: of a relative deviation.
        sync: how this process works with others; None joins those that the launcher started.

    Returns:
        what was found, the same on every process.

    Raises:
        ValueError: there is one process alone; the configuration or the corpus is not usable.
        NotImplementedError: a setting that exists for one process alone.
    """
    config = _exact(config)
    device = choose_device(config.train.device)
    if sync is None:
        sync, device = join_processes(config, device)
    if sync.devices == 1:
        raise ValueError(
            "audit has 1 process; expected at least 2, which it compares with one; pass --ranks"
        )
    folder = Path(sync.from_first(lambda: tempfile.mkdtemp(prefix="transnormer-audit-")))
    try:
        many = _pass(config, folder, sync, device)
        return sync.from_first(lambda: _compare(config, folder, sync, device, many, tolerance))
    finally:
        if sync.is_first:
            shutil.rmtree(folder)


def _compare(
    config: RunConfig,
    folder: Path,
    sync: GradSync,
    device: torch.device,
    many: _Pass,
    tolerance: float,
) -> Audit:
    one = _pass(config, folder, OneProcess(), device)
    found = [_scalar("loss", one.loss, many.loss), _scalar("gradient norm", one.norm, many.norm)]
    found += [_deviation(name, x, many.gradients[name]) for name, x in one.gradients.items()]
    axes = config.parallel.axes(sync.devices)._asdict()
    return Audit(sync.devices, axes, tolerance, found)


def _exact(config: RunConfig) -> RunConfig:
    data = config.model_dump()
    for table, values in _EXACT.items():
        data[table] |= values
    for table in ("objective", "lora"):
        if "dropout" in (data[table] or {}):
            data[table]["dropout"] = 0.0
    return RunConfig.model_validate(data)


def _pass(config: RunConfig, folder: Path, sync: GradSync, device: torch.device) -> _Pass:
    """Loss, norm and whole gradients of the first step; gradients on the first process alone."""
    setting = Setting(config, folder / "data", _quiet, None, sync.rank, sync.world_size)
    objective: Objective[Any, Any] = first_then_others(
        sync, lambda: OBJECTIVES[config.objective.kind](setting)
    )
    torch.manual_seed(config.train.seed)
    model, optimizer = set_up(config, objective, None, device, sync)
    if config.lora is not None:
        open_adapters(model)
    backward = make_backward(objective, model, device, "float32", config.train.segment_tokens)
    batches = Batches(objective, config.samples_per_step, config.batch_over(sync.world_size)).take(
        0
    )
    labels = max(float(sync.total(batches.counts)[0]), 1.0)
    model.train()
    nats = torch.zeros(1, dtype=torch.float64, device=device)
    for part in batches.parts:
        nats += backward(model, part, labels)
    sync.after_backward(model)
    loss, norm = float(sync.total(nats)) / labels, float(sync.total_norm(model))
    with torch.no_grad():
        for parameter in model.parameters():
            # Whole tensors of a model are what every layout can give.
            parameter.copy_(
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )
    whole = sync.whole(model, optimizer)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    named = () if whole is None else whole[0].named_parameters()
    gradients = {name: p.detach().cpu() for name, p in named if name in trained}
    return _Pass(loss, norm, gradients)


def _quiet(text: str) -> None:
    """Drop a line about the data."""


def _scalar(name: str, one: float, many: float) -> Deviation:
    exact = torch.float64
    return _deviation(name, torch.tensor([one], dtype=exact), torch.tensor([many], dtype=exact))


def _deviation(name: str, one: Tensor, many: Tensor) -> Deviation:
    size = float(one.abs().max()) if one.numel() else 0.0
    difference = float((one - many).abs().max()) if one.numel() else 0.0
    relative = difference if difference == 0 else difference / size if size else float("inf")
    return Deviation(name, size, relative)
