"""Local updates on several ranks, and the same in one process, written from the formulas."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from transnormer.models import zoo
from transnormer.models.decoder import Decoder
from transnormer.parallel.co2 import OuterConfig, OuterSync
from transnormer.parallel.fsdp import apply_fsdp
from transnormer.parallel.mesh import Axes, build_meshes
from transnormer.parallel.state_dict import gather_whole

RATE = 0.05


def worker_loss(x: list[Tensor], worker: int, update: int) -> Tensor:
    """A rough bowl that differs from worker to worker and from update to update."""
    centre = math.sin(3.0 * worker + 0.7 * update)
    return ((x[0] - centre) ** 2).sum() + (x[1] * x[0].sum()).cos().sum()


def start_values(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for n in (5, 3)]


def on_ranks(
    group: dist.ProcessGroup,
    config: OuterConfig,
    updates: int,
    dtype: torch.dtype,
    same: bool,
    kill_at: int | None = None,
) -> list[Tensor]:
    """Parameters after every update of this rank; with kill_at saved and restored there."""
    worker = 0 if same else dist.get_rank(group)
    x = [p.requires_grad_() for p in start_values(dtype)]
    outer, seen = OuterSync(x, config, group), []
    for update in range(updates):
        if update == kill_at:
            state, values = outer.state_tensors(), [p.detach().clone() for p in x]
            x = [p.requires_grad_() for p in start_values(dtype)]
            outer = OuterSync(x, config, group)
            outer.load_state_tensors(state)
            with torch.no_grad():
                for p, value in zip(x, values, strict=True):
                    p.copy_(value)
        grads = torch.autograd.grad(worker_loss(x, worker, update), x)
        with torch.no_grad():
            for p, grad in zip(x, grads, strict=True):
                p -= RATE * grad
        outer.after_update(RATE)
        seen.append(torch.cat([p.detach().clone() for p in x]))
    return seen


def serial(config: OuterConfig, workers: int, updates: int, dtype: torch.dtype) -> list[Any]:
    """The same of all workers in one process: [updates][workers] parameters."""
    starts = [torch.cat(start_values(dtype)) for _ in range(workers)]
    x = [start.clone() for start in starts]
    momenta = [torch.zeros_like(start) for start in starts]
    late: list[Tensor] | None = None
    moved, seen = [0.0] * workers, []
    for update in range(updates):
        for i in range(workers):
            parts = [p.clone().requires_grad_() for p in x[i].split([5, 3])]
            grads = torch.autograd.grad(worker_loss(parts, i, update), parts)
            x[i] = x[i] - RATE * torch.cat(grads)
        if (update + 1) % config.tau == 0:
            deltas = [start - y for start, y in zip(starts, x, strict=True)]
            used = late if config.delayed else deltas
            late = deltas
            for i in range(workers):
                mean = torch.zeros_like(x[i]) if used is None else sum(used) / workers
                if config.eager:
                    stale = 0.0 if used is None else used[i]
                    mean = mean + (deltas[i] - stale) / workers
                elif used is None:
                    continue
                penalty = {"none": 1.0, "const": config.penalty_value}.get(config.penalty)
                if penalty is None:
                    penalty = 1.0 + moved[i] / (config.tau * RATE * math.sqrt(8))
                g = mean / penalty
                momenta[i] = config.momentum * momenta[i] + g
                step = config.momentum * momenta[i] + g if config.nesterov else momenta[i]
                if config.clip is not None:
                    step = step.clamp(-config.clip, config.clip)
                move = config.lr * step
                moved[i] = math.sqrt(float(move.square().sum(dtype=torch.float64)))
                starts[i] = starts[i] - move
            x = [start.clone() for start in starts]
        seen.append([y.clone() for y in x])
    return seen


def on_shards(group: dist.ProcessGroup, config: OuterConfig, shards: int) -> dict[str, Tensor]:
    """A small model after some updates of two workers, each on so many ranks; whole tensors."""
    torch.manual_seed(0)
    model = Decoder(
        zoo.tnl_custom(vocab_size=11, model_dim=8, num_layers=1, heads=1, glu_dim=6)
    ).double()
    worker = dist.get_rank(group) // shards
    workers, own = group, None
    if shards > 1:
        mesh = build_meshes(Axes(dp_replicate=2, dp_shard=shards), "cpu").parameters
        workers, own = mesh["dp_replicate"].get_group(), mesh["fsdp"].get_group()
        apply_fsdp(model, mesh["fsdp"])
    outer = OuterSync(model.parameters(), config, workers, own)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for update in range(7):
        generator = torch.Generator().manual_seed(10 * update + worker)
        ids = torch.randint(11, (2, 9), generator=generator)
        # Ranks of one worker sum their gradients: each has one row of its batch.
        rows = slice(dist.get_rank(group) % shards, None, shards)
        (model.loss(ids[rows], ids[rows], reduction="sum") / ids.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        outer.after_update(RATE)
    outer.drain()
    return gather_whole(model.state_dict(), everywhere=True)
