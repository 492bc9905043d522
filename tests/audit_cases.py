"""What the ranks of the tests of the audit compute; importable, since other processes run it."""

import torch
import torch.distributed as dist
from torch import Tensor

from transnormer.parallel.collectives import Copy
from transnormer.parallel.layout import Layout
from transnormer.parallel.mesh import Axes
from transnormer.train import RunConfig
from transnormer.train.adapter_layout import AdapterLayout
from transnormer.train.audit import Audit, run_audit


def audit_in_layout(group: dist.ProcessGroup, config: RunConfig, axes: Axes, broken: bool) -> Audit:
    """An audit of a layout; a broken one does not sum gradients over the ranks of a layer."""
    table = {**axes._asdict(), "sp_exchange": "gather"}
    config = RunConfig.model_validate({**config.model_dump(), "parallel": table})
    whole = Copy.__dict__["backward"]
    if broken:
        Copy.backward = staticmethod(_not_summed)
    try:
        kind = Layout if config.lora is None else AdapterLayout
        return run_audit(config, sync=kind(axes, torch.device("cpu")))
    finally:
        Copy.backward = whole


def _not_summed(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None
