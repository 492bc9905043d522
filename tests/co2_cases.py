"""Local updates on several ranks, and the same in one process, written from the formulas."""

import errno
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from parallel_cases import train_batch
from torch import Tensor
from train_cases import Notes, constant_evaluation

from transnormer.models import zoo
from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.optim import OptimizerConfig, build_optimizer, clip_factor
from transnormer.optim.rounded_adamw import round_stochastically
from transnormer.parallel import local_layout
from transnormer.parallel.co2 import OuterSync
from transnormer.parallel.fsdp import apply_fsdp
from transnormer.parallel.host_copies import HostCopies
from transnormer.parallel.layout import Layout
from transnormer.parallel.local_layout import build_layout
from transnormer.parallel.mesh import Axes, build_meshes
from transnormer.parallel.outer_config import OuterConfig, OuterTable
from transnormer.parallel.parallel_config import ParallelConfig
from transnormer.parallel.state_dict import gather_whole
from transnormer.train import RunConfig, run_training

RATE = 0.05
SMALLEST = zoo.tnl_custom(vocab_size=11, model_dim=8, num_layers=1, heads=1, glu_dim=6)


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


def small_moves(group: dist.ProcessGroup, config: OuterConfig, updates: int) -> float:
    """How far bfloat16 parameters have moved on average, after updates of 0.1 last places each."""
    place = 2.0**-7
    x = torch.full([4096], 1.25, dtype=torch.bfloat16, requires_grad=True)
    torch.manual_seed(dist.get_rank(group))
    outer = OuterSync([x], config, group)
    for _ in range(updates):
        with torch.no_grad():
            x.copy_(round_stochastically(x.float() + 0.1 * place))
        outer.after_update(RATE)
    return float((x.detach().double() - 1.25).mean()) / place


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
    model = Decoder(SMALLEST).double()
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


def settled(
    group: dist.ProcessGroup, config: OuterConfig, updates: int
) -> tuple[Tensor, Tensor, bool]:
    """Where workers would meet, where all their moves together lead, whether all is put back."""
    x = [p.requires_grad_() for p in start_values(torch.float64)]
    outer, own = OuterSync(x, config, group), torch.cat(start_values(torch.float64))
    for update in range(updates):
        grads = torch.autograd.grad(worker_loss(x, dist.get_rank(group), update), x)
        with torch.no_grad():
            for p, grad in zip(x, grads, strict=True):
                p -= RATE * grad
        own -= RATE * torch.cat(grads)
        outer.after_update(RATE)
    before = torch.cat([p.detach().clone() for p in x])
    with outer.averaged():
        found = torch.cat([p.detach().clone() for p in x])
    dist.all_reduce(own, group=group)
    after = torch.cat([p.detach().clone() for p in x])
    return found, own / dist.get_world_size(group), torch.equal(before, after)


def with_a_straggler(group: dist.ProcessGroup, config: OuterConfig) -> list[bool]:
    """Whether each outer step had to wait; worker 1 begins its first all-reduce when told.

    Worker 0 tells it when the first round and all updates of the second lie behind it.
    """
    rank = dist.get_rank(group)
    x = [p.requires_grad_() for p in start_values(torch.float64)]
    outer, exposed, word = OuterSync(x, config, group), [], torch.zeros(1)
    for update in range(3 * config.tau):
        if rank == 1 and update == config.tau - 1:
            dist.recv(word, src=0, group=group)
        if rank == 0 and update == 2 * config.tau - 1:
            dist.send(word, dst=1, group=group)
        report = outer.after_update(RATE)
        if report is not None:
            exposed.append(report.exposed)
    return exposed


def train_copies(
    group: dist.ProcessGroup, config: DecoderConfig, table: ParallelConfig, steps: int
) -> tuple[dict[str, Tensor], list[float]]:
    """A model after local updates in a layout: the mean of its copies, on rank 0, and the gaps."""
    torch.manual_seed(3)
    sync = build_layout(table, dist.get_world_size(), torch.device("cpu"))
    model = sync.wrap(Decoder(config).double())
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2, clip=0.05))
    gaps = []
    for step in range(steps):
        # Every second row is of a copy, whatever the number of its ranks.
        ranks = sync.world_size // table.dp_replicate
        copy, rank = divmod(sync.rank, ranks)
        ids, labels = (
            x[copy :: table.dp_replicate][rank::ranks] for x in train_batch(step, config.vocab_size)
        )
        count = torch.tensor([(labels >= 0).sum().item()]).double()
        labels_of_copy = sync.summed(count, sync.total(count)).item()
        (model.loss(ids, labels, reduction="sum") / labels_of_copy).backward()
        sync.after_backward(model)
        optimizer.set_lr(1e-2)
        optimizer.step(clip_factor(0.05, sync.total_norm(model)))
        optimizer.zero_grad()
        report = sync.outer_step(model, 1e-2)
        gaps += [] if report is None else [report.gap]
    whole = sync.whole(model, optimizer)
    return {} if whole is None else dict(whole[0].state_dict()), gaps


def norms_of_copies(group: dist.ProcessGroup, norms: list[float]) -> Tensor:
    """The norm that two copies of two ranks report, who found one each."""
    layout = local(dp_replicate=2, dp_shard=2)
    return layout.overall_norm(torch.tensor(norms[dist.get_rank() // 2]))


def local(**axes: int) -> Layout:
    """All processes laid out as copies that meet every third update."""
    table = ParallelConfig(outer=OuterTable(method="co2", tau=3), **axes)
    return build_layout(table, dist.get_world_size(), torch.device("cpu"))


def run_on_a_full_disk(group: dist.ProcessGroup, config: RunConfig, what: str) -> str:
    """What a rank says of a run whose second checkpoint finds no room.

    what is "copies" where rank 2 cannot write its copy, "model" where all can, and then rank 0 not
    the model.
    """
    layout = build_layout(config.parallel, dist.get_world_size(), torch.device("cpu"))
    save, write, saved = local_layout.save_file, os.pwrite, []

    def full(part: str) -> bool:
        rank = {"copies": 2, "model": 0}[what]
        return what == part and dist.get_rank() == rank and len(saved) == 2

    def save_copies(tensors: dict[str, Tensor], path: Path) -> None:
        saved.append(path)
        if full("copies"):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path)

    def write_model(*args: Any) -> int:
        if full("model"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args)

    local_layout.save_file, os.pwrite = save_copies, write_model
    try:
        run_training(config, evaluate=constant_evaluation, sync=layout)
    except RuntimeError as error:
        return str(error)
    finally:
        local_layout.save_file, os.pwrite = save, write
    return "written"


class Told(NamedTuple):
    """What a rank saw of a run.

    Attributes:
        messages: of the first process.
        logits: at each evaluation.
    """

    messages: list[str]
    logits: list[Tensor]


def run_copies(
    group: dist.ProcessGroup, config: RunConfig, resume: bool, taus: tuple[int, ...] = ()
) -> Told:
    """A whole run in the layout of its table; taus are what each rank measures."""
    layout = build_layout(config.parallel, dist.get_world_size(), torch.device("cpu"))
    notes, logits = Notes(), []

    def evaluate(model: Decoder, *args: Any, **options: Any) -> Any:
        logits.append(model(torch.arange(8)[None]).logits)
        return constant_evaluation(model, *args, **options)

    found = local_layout.automatic_tau
    if taus:
        local_layout.automatic_tau = lambda *seconds: taus[dist.get_rank()]
    try:
        run_training(config, resume=resume, evaluate=evaluate, progress=notes, sync=layout)
    finally:
        local_layout.automatic_tau = found
    return Told(notes.messages, logits)


def tau_by_a_clock(group: dist.ProcessGroup, config: RunConfig) -> list[str]:
    """What a run tells of its tau where an update and an outer step take a second each.

    From the first all-reduce on both take a tenth more, and evaluations always a hundred seconds.
    """
    layout = build_layout(config.parallel, dist.get_world_size(), torch.device("cpu"))
    assert isinstance(layout, local_layout.LocalLayout)
    notes, now = Notes(), [0.0]

    def clock() -> float:
        outer = layout._outer
        now[0] += 1.0 if outer is None or outer.round == 0 else 1.1
        return now[0]

    def evaluate(*args: Any, **options: Any) -> Any:
        now[0] += 100.0
        return constant_evaluation(*args, **options)

    with (
        patch.object(local_layout, "time", SimpleNamespace(perf_counter=clock)),
        patch.object(OuterSync, "all_reduce_seconds", lambda outer: 2.0),
    ):
        run_training(config, evaluate=evaluate, progress=notes, sync=layout)
    return [text for text in notes.messages if "outer.tau" in text]


def order_of_a_checkpoint(group: dist.ProcessGroup) -> list[str]:
    """What is done to a copy's parameters, which are staged as the mean of all."""
    layout, model, calls = local(dp_replicate=4), Decoder(SMALLEST), []
    optimizer = build_optimizer(layout.wrap(model), OptimizerConfig())
    layout.after_backward(model)

    class Noted(HostCopies):
        def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            calls.append("take")
            return super().take(tensors)

        def hold(self) -> None:
            calls.append("hold")

    def put(outer: OuterSync, flat: Tensor) -> None:
        calls.append("put")

    with patch.object(OuterSync, "_put", put), layout.agreed(model):
        layout.stage(model, optimizer, Noted())
    return calls
