"""Fully sharded data parallelism (FSDP2), and its hybrid with replicas (HSDP)."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from transnormer.models.decoder import Block
from transnormer.nn.precision import KeepPrecision


def apply_fsdp(
    model: nn.Module, mesh: DeviceMesh, *, gather_dtype: torch.dtype | None = None
) -> nn.Module:
    """Keep a share of every parameter on each rank; layers gather theirs when they run.

    Gradients are summed over all ranks of the mesh, in float32 (the parameters' own dtype if that is
    wider), and stay shared out; so do the optimizer's states. Each block is gathered on its own, and
    what lies outside of the blocks as one (Zhao et al. 2023, arXiv:2304.11277; ``fully_shard``).

    Args:
        model: on its device; changed in place. ``forward``, ``loss`` and ``label_scores`` gather what
            they need.
        mesh: one axis of shards, or an axis of replicas and one of shards.
        gather_dtype: blocks are gathered and computed in it, under an autocast of the same dtype,
            which would have rounded their matrices anyway. Embedding, head, norms, angles and
            decays keep the parameters' dtype. None rounds nothing.

    Returns:
        the model.
    """
    own = MixedPrecisionPolicy(reduce_dtype=_reduce_dtype(model), cast_forward_inputs=False)
    rounded = MixedPrecisionPolicy(
        param_dtype=gather_dtype, reduce_dtype=own.reduce_dtype, cast_forward_inputs=False
    )
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        if gather_dtype is not None:
            for part in _kept_precise(block):
                fully_shard(part, mesh=mesh, mp_policy=own)
        fully_shard(block, mesh=mesh, mp_policy=rounded)
    fully_shard(model, mesh=mesh, mp_policy=own)
    for module in _shared(model):
        # The loss is divided by the labels of all ranks: gradients are sums.
        module.set_gradient_divide_factor(1.0)
        # A factor in the reduction is not known to every backend, and 1 needs none.
        module.set_force_sum_reduction_for_comms(True)
    for method in ("loss", "label_scores", "gather_parameters", "read_turn", "share_gradients"):
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)
    return model


def hold_whole(model: nn.Module) -> None:
    """Gather all parameters and keep them, and let gradients add up whole, until ``share_out``.

    Call it in a method that is registered as a forward one.
    """
    for module in _shared(model):
        module.set_requires_gradient_sync(False, recurse=False)
        module.set_reshard_after_backward(False, recurse=False)
        if module is not model:
            module.set_reshard_after_forward(False, recurse=False)
        module.unshard()


def share_out(model: nn.Module) -> None:
    """Let the next backward pass sum all gradients over the ranks and keep shares alone again."""
    for module in _shared(model):
        module.set_requires_gradient_sync(True, recurse=False)
        module.set_reshard_after_backward(True, recurse=False)
        if module is not model:
            module.set_reshard_after_forward(True, recurse=False)


def _shared(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _reduce_dtype(model: nn.Module) -> torch.dtype:
    widest = torch.float32
    for parameter in model.parameters():
        widest = torch.promote_types(widest, parameter.dtype)
    return widest


def _kept_precise(block: Block) -> list[nn.Module]:
    """Modules whose own parameters 16 bits must not round: angles, decays and norms."""
    kept = []
    for module in block.modules():
        own = list(module.parameters(recurse=False))
        if own and (isinstance(module, KeepPrecision) or all(p.ndim < 2 for p in own)):
            kept.append(module)
    return kept
