"""The axes along which the processes of a run lie."""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from transnormer.parallel.world import current_world


class Axes(NamedTuple):
    """Ranks along each axis; a rank is ((replicate, shard), sp, tp), the last one fastest.

    Attributes:
        dp_replicate: copies of the model, each with batches of its own.
        dp_shard: ranks with batches of their own that share the parameters of one copy (FSDP).
        sp: ranks that read each sequence together; they share the parameters too.
        tp: ranks that share the heads and channels of each layer.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    sp: int = 1
    tp: int = 1

    @property
    def ranks(self) -> int:
        """All of them."""
        return math.prod(self)


class Meshes(NamedTuple):
    """The same ranks, seen by what they hold and by what they read.

    Attributes:
        parameters: axes dp_replicate, fsdp (dp_shard and sp as one) and tp.
        tokens: axes dp (dp_replicate and dp_shard as one), sp and tp.
    """

    parameters: DeviceMesh
    tokens: DeviceMesh


def build_meshes(axes: Axes, device_type: str) -> Meshes:
    """Lay the processes of the default group out along the axes; every process calls it.

    Raises:
        ValueError: the axes have another number of ranks than there are processes.
    """
    found = dist.get_world_size()
    if axes.ranks != found:
        shown = " x ".join(f"{name} {size}" for name, size in axes._asdict().items())
        raise ValueError(
            f"parallel is {shown}, {axes.ranks} ranks; expected as many as the {found} processes "
            "that were started; change the axes, or start as many with torchrun --nproc-per-node"
        )
    held = (axes.dp_replicate, axes.dp_shard * axes.sp, axes.tp)
    read = (axes.dp_replicate * axes.dp_shard, axes.sp, axes.tp)
    return Meshes(
        init_device_mesh(device_type, held, mesh_dim_names=("dp_replicate", "fsdp", "tp")),
        init_device_mesh(device_type, read, mesh_dim_names=("dp", "sp", "tp")),
    )


def start_processes(device_type: str) -> torch.device:
    """Join the processes that torchrun started; returns this one's device.

    NCCL between GPUs, gloo between CPUs.

    Raises:
        RuntimeError: the launcher's variables are incomplete; no rendezvous.
    """
    world = current_world()
    if device_type == "cuda":
        torch.cuda.set_device(world.local_rank)
    if not dist.is_initialized():
        # A launcher that starts all processes again may keep its store, with the addresses of those
        # that are gone.
        store, rank, size = next(dist.rendezvous("env://"))
        dist.init_process_group(
            "nccl" if device_type == "cuda" else "gloo",
            store=dist.PrefixStore(f"attempt{world.attempt}", store),
            rank=rank,
            world_size=size,
        )
    return torch.device("cuda", world.local_rank) if device_type == "cuda" else torch.device("cpu")
