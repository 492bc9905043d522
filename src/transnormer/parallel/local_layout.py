"""Copies of a model that update on their own and meet every tau updates, on the mesh of a run."""

import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from transnormer.models.random_state import random_state, set_random_state
from transnormer.optim import Optimizer, WholeMatrices
from transnormer.optim.shares import own_share
from transnormer.parallel.co2 import OuterSync, automatic_tau
from transnormer.parallel.host_copies import HostCopies
from transnormer.parallel.layout import Layout
from transnormer.parallel.mesh import Axes
from transnormer.parallel.outer_config import OuterReport, OuterTable
from transnormer.parallel.parallel_config import ParallelConfig
from transnormer.parallel.staged import StagedShares
from transnormer.parallel.whole_matrices import MatricesOnRanks

COPIES = "copies"
# Updates before tau is found from their times, of which the last half counts: the first ones
# compile and allocate.
_MEASURED = 12
# Rounds beside an all-reduce before tau is corrected by what they cost: no single delay decides.
_CORRECTED = 3
# Thread blocks, one a multiprocessor, of an all-reduce that has a whole round to itself: those that it
# holds are missing to the products beside it, which count on all.
_BLOCKS = 4


def build_layout(
    config: ParallelConfig,
    processes: int,
    device: torch.device,
    *,
    gather_dtype: torch.dtype | None = None,
    keeps_rest: bool = False,
    kind: type[Layout] = Layout,
) -> Layout:
    """Lay the started processes out as a [parallel] table says; every process calls it.

    Args:
        config: the table.
        processes: that were started.
        device: of this process.
        gather_dtype: of ``apply_fsdp``.
        keeps_rest: of ``Layout``.
        kind: of what copies that do not go apart are laid out by.

    Raises:
        ValueError: the table does not fit the number of processes.
    """
    axes = config.axes(processes)
    if config.outer is not None:
        return LocalLayout(axes, device, config, config.outer, gather_dtype=gather_dtype)
    return kind(
        axes,
        device,
        exchange=config.sp_exchange,
        overlap=config.sp_overlap,
        cut_residual=config.tp_residual == "cut",
        gather_dtype=gather_dtype,
        keeps_rest=keeps_rest,
    )


class LocalLayout(Layout):
    """A ``Layout`` whose ``dp_replicate`` copies go apart for tau updates, see ``OuterSync``.

    Ranks of a copy share its parameters and sum their gradients as ever; between copies only counts,
    losses and norms pass in a step, some dozens of bytes. A copy's gradient is divided by its own
    labels and clipped by its own norm; reported are the loss over all labels and the root mean square
    of the copies' norms.

    Evaluated and exported is where the copies would meet now, see ``OuterSync.averaged``. A checkpoint
    holds it with the optimizer's state of the first copy, and beside it each rank's own parameters,
    optimizer, random numbers and outer state, from which the same layout goes on exactly. Another
    layout begins a first round there.
    """

    def __init__(
        self,
        axes: Axes,
        device: torch.device,
        config: ParallelConfig,
        table: OuterTable,
        *,
        gather_dtype: torch.dtype | None = None,
    ) -> None:
        """Lay the started processes out; every process calls it.

        Args:
            axes: how many ranks along which axis.
            device: of this process.
            config: how states are exchanged, and what lies between shared layers.
            table: the outer step.
            gather_dtype: of ``apply_fsdp``.
        """
        super().__init__(
            axes,
            device,
            exchange=config.sp_exchange,
            overlap=config.sp_overlap,
            cut_residual=config.tp_residual == "cut",
            gather_dtype=gather_dtype,
        )
        self._table = table
        ranks = axes.ranks // axes.dp_replicate
        self._copy = dist.get_rank() // ranks
        # Groups of their own: what waits in one of the mesh's would wait for the outer all-reduce.
        starts = range(0, axes.ranks, ranks)
        workers = [[start + i for start in starts] for i in range(ranks)]
        self._workers = _own_group(workers, _options(device, late=table.config(1).delayed))
        self._shards = _own_group([list(range(start, start + ranks)) for start in starts])
        self._outer: OuterSync | None = None
        # Of updates, alone and then beside an all-reduce, and of outer steps, until tau is settled.
        self._times: list[float] = []
        self._steps: list[float] = []
        # Seconds of an all-reduce and of an update alone, once they are known.
        self._alone: tuple[float, float] | None = None
        self._last = 0.0
        self._note: str | None = None

    def _fsdp_mesh(self) -> DeviceMesh | None:
        mesh = self._meshes.parameters["fsdp"]
        return mesh if mesh.size() > 1 else None

    def matrices(self) -> WholeMatrices | None:
        """How the ranks of this copy work on whole matrices; None where one rank is the copy."""
        if self._shards is None:
            return None
        return MatricesOnRanks(self._fused_of, self._shards, 1)

    def summed(self, values: Tensor, total: Tensor) -> Tensor:
        """Return values, float64 [n], summed over the processes of this copy."""
        slots = values.new_zeros(self._axes.dp_replicate, values.numel())
        slots[self._copy] = values
        return self.total(slots.reshape(-1)).view_as(slots)[self._copy]

    def overall_norm(self, norm: Tensor) -> Tensor:
        """Return the root mean square of the copies' norms."""
        squares = norm.detach().to(torch.float64).square().reshape(1)
        return (self.total(squares) / self.world_size).sqrt()

    def after_backward(self, model: nn.Module) -> None:
        """Before the first update, take the parameters for the start of round 0."""
        if self._outer is None:
            self._outer = self._begin(model)

    def _begin(self, model: nn.Module) -> OuterSync:
        _reshard(model)
        tau = self._table.tau
        # Until it is found, a first round of as many updates as finding it takes.
        config = self._table.config(_MEASURED if tau == "auto" else tau)
        outer = OuterSync(model.parameters(), config, self._workers, self._shards)
        self._last = time.perf_counter()
        return outer

    def outer_step(self, model: nn.Module, lr: float) -> OuterReport | None:
        """Count an update of rate lr; at the end of a round make the outer step."""
        outer = self._outer
        assert outer is not None
        measures = self._table.tau == "auto" and outer.round <= _CORRECTED
        if measures:
            self._times.append(time.perf_counter() - self._last)
        if measures and outer.round == 0 and outer.updates == _MEASURED - 1:
            self._find_tau(outer)
        _reshard(model)
        ends = outer.updates == outer.tau - 1
        if measures and outer.round and ends and self._alone is not None:
            report = self._timed_step(outer, lr, *self._alone)
        else:
            report = outer.after_update(lr)
        if report is not None:
            report, self._note = report._replace(note=self._note), None
            if report.round == 1:
                self._times.clear()
        self._last = time.perf_counter()
        return report

    def _find_tau(self, outer: OuterSync) -> None:
        """Let a round hide an all-reduce."""
        update = statistics.median(self._times[-(_MEASURED // 2) :])
        reduce = outer.all_reduce_seconds()
        self._alone = reduce, update
        # The slowest link and the fastest copy decide.
        outer.tau = self.highest(automatic_tau(reduce, update, 0.0))
        self._note = (
            f"parallel.outer.tau is {outer.tau}: an all-reduce took {1e3 * reduce:.3g} ms here, an "
            f"update {1e3 * update:.3g} ms"
        )

    def _timed_step(
        self, outer: OuterSync, lr: float, reduce: float, update: float
    ) -> OuterReport | None:
        """An outer step with the device waited for; behind the last of some, correct tau."""
        exposed = outer.is_reducing
        outer.drain()
        outer.finish()
        began = time.perf_counter()
        report = outer.after_update(lr)
        outer.finish()
        self._steps.append(time.perf_counter() - began)
        if outer.round > _CORRECTED:
            step, beside = statistics.median(self._steps), statistics.median(self._times)
            tau, cost = outer.tau, step + outer.tau * max(0.0, beside - update)
            if exposed:
                # Beside updates it takes longer than alone.
                reduce = max(reduce, tau * beside)
            outer.tau = self.highest(max(tau, automatic_tau(reduce, update, cost)))
            if outer.tau > tau:
                self._note = (
                    f"parallel.outer.tau is {outer.tau} from here on: beside its updates a round "
                    f"costs {1e3 * cost:.3g} ms here, {1e3 * step:.3g} ms of it the outer step"
                )
        return report and report._replace(exposed=exposed)

    @contextmanager
    def agreed(self, model: nn.Module) -> Iterator[None]:
        """Let the parameters be where the copies would meet now, and then what they were."""
        if self._outer is None:
            yield
            return
        _reshard(model)
        try:
            with self._outer.averaged():
                yield
        finally:
            # What a forward pass gathered of the mean.
            _reshard(model)
            # An evaluation or a checkpoint is no part of an update.
            self._last = time.perf_counter()

    def stage(
        self, model: nn.Module, optimizer: Optimizer, copies: HostCopies | None
    ) -> StagedShares:
        """As ``Layout.stage``; of parameters that may go back at once to what they were."""
        staged = super().stage(model, optimizer, copies)
        if copies is not None:
            copies.hold()
        return staged

    def whole(
        self, model: nn.Module, optimizer: Optimizer
    ) -> tuple[nn.Module, dict[str, Tensor]] | None:
        """What is exported and the optimizer's state of the first copy, on the first process."""
        with self.agreed(model):
            return super().whole(model, optimizer)

    def write_own(self, model: nn.Module, optimizer: Optimizer, folder: Path) -> Path | None:
        """Write this rank's parameters, optimizer, random numbers and outer state.

        Raises:
            OSError: some rank cannot write, on all ranks; nothing of it is left.
        """
        target = folder / f".{COPIES}"

        def clear() -> None:
            # What a killed run left, perhaps of more ranks.
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)

        self.from_first(clear)
        error: Exception | None = None
        try:
            tensors = self._own_tensors(model, optimizer)
            save_file(tensors, target / _file(dist.get_rank()))
        except (OSError, SafetensorError) as caught:
            error = caught
        # Nobody goes on, and the first does not complete the checkpoint, unless all have written.
        told: list[str | None] = [None] * self.devices
        dist.all_gather_object(told, error and str(error), group=self._patient)
        for rank, text in enumerate(told):
            if text is not None:
                shutil.rmtree(target, ignore_errors=True)
                raise OSError(f"rank {rank}: {text}") from error
        return target

    def _own_tensors(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
        if self._outer is None:
            self._outer = self._begin(model)
        _reshard(model)
        parts = {
            "outer": self._outer.state_tensors(),
            "random": random_state(),
            "model": dict(model.named_parameters()),
            "optimizer": optimizer.state_tensors(),
        }
        named = {
            f"{part}/{name}": own_share(x).detach().cpu().contiguous()
            for part, tensors in parts.items()
            for name, x in tensors.items()
        }
        return named | {"axes": torch.tensor(self._axes)}

    def read_own(self, model: nn.Module, optimizer: Optimizer, checkpoint: Path) -> str | None:
        """Restore this rank's state where the checkpoint is of the same layout."""
        file = checkpoint / COPIES / _file(dist.get_rank())
        tensors = load_file(file) if file.is_file() else {}
        same = bool(tensors) and tensors["axes"].tolist() == list(self._axes)
        if self.highest(not same):
            return "the copies were not laid out so: they begin a round from their mean"
        self._outer = self._begin(model)
        live = {
            "model": dict(model.named_parameters()),
            "optimizer": optimizer.state_tensors(),
        }
        with torch.no_grad():
            for part, here in live.items():
                for name, x in here.items():
                    own_share(x).copy_(tensors[f"{part}/{name}"])
        self._outer.load_state_tensors(_part(tensors, "outer/"))
        if self._table.tau != "auto":
            self._outer.tau = self._table.tau
        set_random_state(_part(tensors, "random/"))
        return None


def _own_group(lists: list[list[int]], options: Any = None) -> dist.ProcessGroup | None:
    """Of the lists of ranks a group each; this rank's, None where it is alone."""
    group, _ = dist.new_subgroups_by_enumeration(lists, pg_options=options)
    assert isinstance(group, dist.ProcessGroup)
    return group if len(lists[0]) > 1 else None


def _options(device: torch.device, *, late: bool) -> Any:
    """Of a group for outer steps: late ones over NCCL take few multiprocessors."""
    if device.type != "cuda" or not late:
        return None
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = _BLOCKS
    return options


def _file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: x for name, x in tensors.items() if name.startswith(prefix)}


def _reshard(model: nn.Module) -> None:
    """Let every rank hold its shares alone: gathered parameters would not see a change of them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
