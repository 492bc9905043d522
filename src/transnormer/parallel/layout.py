"""How the processes of a run train one model: what the trainer calls, for any mesh."""

from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from transnormer.models.classifier import SequenceClassifier
from transnormer.models.decoder import Decoder
from transnormer.optim import Optimizer, WholeMatrices
from transnormer.optim.split_weights import leave_remainder, split
from transnormer.parallel.fsdp import apply_fsdp
from transnormer.parallel.host_copies import HostCopies
from transnormer.parallel.mesh import Axes, build_meshes
from transnormer.parallel.one_model import OneModel
from transnormer.parallel.segment_wave import apply_segments
from transnormer.parallel.sequence import apply_sequence_parallel
from transnormer.parallel.shares import Share, fill_all, share_of, states_like
from transnormer.parallel.staged import StagedShares, from_first
from transnormer.parallel.state_dict import gather_whole, total_norm
from transnormer.parallel.state_exchange import Chain, Exchange
from transnormer.parallel.tensor import apply_tensor_parallel
from transnormer.parallel.tensor_layers import Fused
from transnormer.parallel.whole_matrices import MatricesOnRanks

ModelT = TypeVar("ModelT", bound=nn.Module)
T = TypeVar("T")
# The longest that one process works while the others wait: tokenising a corpus.
_PATIENCE = timedelta(days=2)


class Layout(OneModel):
    """A ``GradSync`` of many processes: data, sharded and sequence parallelism on one mesh.

    The loss of a step is divided by the labels of all processes, so gradients are sums over them,
    whatever a rank holds; uneven batches weigh by their tokens.

    Attributes:
        rank, world_size: which rows of every global batch this process reads: its place among the
            ranks with batches of their own. Ranks that share a sequence read the same rows.
        process: number of this process's random numbers, the same for ranks that share layers.
        devices: processes in all.
        is_first: whether this process writes what one process writes.
    """

    def __init__(
        self,
        axes: Axes,
        device: torch.device,
        *,
        exchange: Exchange = "gather",
        overlap: bool = False,
        cut_residual: bool = False,
        gather_dtype: torch.dtype | None = None,
        keeps_rest: bool = False,
    ) -> None:
        """Lay the started processes out; every process calls it.

        Args:
            axes: how many ranks along which axis.
            device: of this process.
            exchange, overlap: of ``apply_sequence_parallel``.
            cut_residual: of ``apply_tensor_parallel``.
            gather_dtype: of ``apply_fsdp``.
            keeps_rest: leave beside bfloat16 parameters what they round away of the values that
                ``wrap`` fills them with (``optim.split_weights``).

        Raises:
            ValueError: the axes do not fit the number of processes.
        """
        self._axes, self._device = axes, device
        self._meshes = build_meshes(axes, device.type)
        self._exchange: Exchange = exchange
        self._overlap, self._gather_dtype = overlap, gather_dtype
        self._cut_residual, self._keeps_rest = cut_residual, keeps_rest
        dp = self._meshes.tokens["dp"]
        self._dp = dp.get_group()
        self.rank, self.world_size = dp.get_local_rank(), dp.size()
        # Ranks that share a layer draw the same random numbers.
        self.process = dist.get_rank() // axes.tp
        self.devices, self.is_first = dist.get_world_size(), dist.get_rank() == 0
        # Between CPUs, and with time for what one process does while the others wait.
        patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
        assert isinstance(patient, dist.ProcessGroup)
        self._patient = patient
        # Checkpoints are written beside the training, whose collectives must not mix with theirs.
        saving = dist.new_group(backend="gloo", timeout=_PATIENCE)
        assert isinstance(saving, dist.ProcessGroup)
        self._saving = saving
        self._plain: Callable[..., nn.Module] = Decoder
        self._fused: dict[str, Fused] = {}

    def wrap(self, model: ModelT, values: Iterable[Mapping[str, Tensor]] | None = None) -> ModelT:
        """Lay a finished model out, the same on every rank, before its optimizer is built.

        Checkpointing of activations and compilation come first. A model with parameters on the meta
        device gets memory for this rank's shares alone, once it is laid out.

        Args:
            model: finished; changed in place.
            values: whole tensors of a model on the meta device, some at a time, which are copied
                into the shares; what is in none of them stays unset. None: the model has its own.

        Raises:
            NotImplementedError: a layer that cannot read sequences in parts; a model that is no
                decoder, where sequences are cut.
        """
        self._plain = type(model)
        if self._axes.sp > 1:
            if not isinstance(model, Decoder):
                raise NotImplementedError(
                    f"parallel.sp is {self._axes.sp} and the model a {type(model).__name__}; "
                    "expected a decoder: only its loss knows how to cut a sequence; set it to 1"
                )
            group = self._meshes.tokens["sp"].get_group()
            apply_sequence_parallel(model, group, exchange=self._exchange, overlap=self._overlap)
        held = self._meshes.parameters
        if self._axes.tp > 1:
            # The pool and the head of a classifier read the stream, which all ranks have.
            inner, prefix = model, ""
            if isinstance(model, SequenceClassifier):
                inner, prefix = model.backbone, "backbone."
            if not isinstance(inner, Decoder):
                raise NotImplementedError(
                    f"parallel.tp is {self._axes.tp} and the model a {type(model).__name__}; "
                    "expected a decoder or a classifier; set it to 1"
                )
            tp = apply_tensor_parallel(inner, held["tp"], cut_residual=self._cut_residual)
            self._fused = {prefix + name: fused for name, fused in tp.fused.items()}
        if isinstance(model, Decoder) and model.config.causal and self._axes.tp == 1:
            parts = self._meshes.tokens["sp"]
            chain = Chain(parts.get_group(), parts.get_local_rank(), parts.size())
            apply_segments(model, chain, self._between_hosts() if chain.size > 1 else None)
        mesh = self._fsdp_mesh()
        if mesh is not None:
            apply_fsdp(model, mesh, gather_dtype=self._gather_dtype)
        if values is not None:
            self._fill(model, values)
        return model

    def _fill(self, model: nn.Module, values: Iterable[Mapping[str, Tensor]]) -> None:
        """Give what is on the meta device memory, and copy values into this rank's shares."""
        # As to_empty, but for what is real.
        model._apply(lambda x: torch.empty_like(x, device=self._device) if x.is_meta else x)
        shares = self._shares(model.state_dict())
        rest = self._shares(self._rest_of(model))
        for some in values:
            _fill_some(shares, rest, some)

    def _rest_of(self, model: nn.Module) -> dict[str, Tensor]:
        """Zeros beside bfloat16 parameters, for what these round away; none where nobody keeps it."""
        if not self._keeps_rest:
            return {}
        made = {}
        for name, parameter in model.named_parameters():
            if parameter.dtype == torch.bfloat16:
                made[name] = torch.zeros_like(parameter.detach(), dtype=torch.int16)
                leave_remainder(parameter, made[name])
        return made

    def _between_hosts(self) -> dist.ProcessGroup:
        """A group between the hosts of the ranks that share sequences."""
        ranks = self._meshes.tokens.mesh.transpose(1, 2).flatten(0, 1).tolist()
        group, _ = dist.new_subgroups_by_enumeration(ranks, backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        return group

    @property
    def whole_graphs(self) -> bool:
        """Whether nothing but sums of shared layers passes between ranks in the middle of a block.

        States of parts of a sequence do, and parameters of norms and angles, which FSDP gathers on
        their own.
        """
        return self._fsdp_mesh() is None

    def _fsdp_mesh(self) -> DeviceMesh | None:
        """The ranks whose gradients are summed: shares of one copy, and of all copies.

        None where a rank sums with nobody: FSDP would copy every parameter and gradient all the
        same.
        """
        held = self._meshes.parameters
        if self._axes.dp_replicate > 1:
            return held["dp_replicate", "fsdp"]
        return held["fsdp"] if held["fsdp"].size() > 1 else None

    def total(self, values: Tensor) -> Tensor:
        """Return values, float64 [n] on any device, summed over the ranks with other batches."""
        total = values.clone()
        if values.device.type == self._device.type:
            dist.all_reduce(total, group=self._dp)
            return total
        # Counts on the CPU beside GPUs: nothing waits for the devices. Ranks that share a sequence
        # or a layer have the same ones.
        dist.all_reduce(total, group=self._patient)
        return total / (self._axes.sp * self._axes.tp)

    def matrices(self) -> WholeMatrices | None:
        """How these processes work on whole matrices; see ``MatricesOnRanks``."""
        return MatricesOnRanks(self._fused_of, None, self._axes.dp_replicate)

    def after_backward(self, model: nn.Module) -> None:
        """Nothing is left to do: gradients were summed where they were made."""

    def after_step(self, model: nn.Module, step: int) -> None:
        """Nothing: ranks that hold the same parameters make the same update."""

    def total_norm(self, model: nn.Module) -> Tensor:
        """Norm of the gradient of the whole model, the same plain tensor on every rank."""
        return total_norm(model.parameters())

    def whole(
        self, model: nn.Module, optimizer: Optimizer
    ) -> tuple[nn.Module, dict[str, Tensor]] | None:
        """The model of one process and its optimizer's state, on the CPU; None but on the first.

        They do not depend on the layout, so that any other one can go on from them.
        """
        weights = self._by_part(gather_whole(model.state_dict()))
        states = self._by_part(gather_whole(optimizer.state_tensors()))
        if not self.is_first:
            return None
        with torch.device("meta"):
            plain = self._plain(getattr(model, "config"))  # noqa: B009
        # Buffers that are not stored stay on the meta device: nothing reads them.
        plain.load_state_dict(weights, assign=True)
        return plain, states

    def load(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        weights: Mapping[str, Tensor],
        states: Mapping[str, Tensor],
    ) -> None:
        """Copy whole weights and an optimizer's whole state into this rank's shares.

        Of files that are read by slices (``tensor_files.open_tensors``) each rank reads its own alone.
        """
        fill_all(self._shares(model.state_dict()), weights)
        like = states_like(states, dict(model.named_parameters()))
        fill_all(self._shares(like), states)
        optimizer.load_state_tensors(like)

    def stage(
        self, model: nn.Module, optimizer: Optimizer, copies: HostCopies | None
    ) -> StagedShares:
        """Take this rank's shares of weights and optimizer state, to be written as a checkpoint.

        Args:
            model: as ``wrap`` gave it.
            optimizer: of its parameters.
            copies: where to copy them to, so that they may change while they are written; None
                leaves them where they are.
        """
        return StagedShares(model, self._held(model, optimizer), self._saving, copies)

    def _held(self, model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Share]]:
        """What this rank writes of a checkpoint, by the stem of the files."""
        # Copies of the model hold the same: the first one writes.
        writes = self._meshes.parameters["dp_replicate"].get_local_rank() == 0
        return {
            "model": self._shares(self._exported(model), writes=writes),
            "optimizer": self._shares(optimizer.state_tensors(), writes=writes),
        }

    def _exported(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The tensors that a checkpoint holds of a model."""
        return model.state_dict()

    def _shares(self, tensors: Mapping[str, Tensor], *, writes: bool = True) -> dict[str, Share]:
        return {
            name: share_of(x, self._fused_of(name) if x.ndim else None, writes=writes)
            for name, x in tensors.items()
        }

    def _by_part(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows of fused projections in the order of one process."""
        return {
            name: fused.by_part(x) if (fused := self._fused_of(name)) else x
            for name, x in whole.items()
        }

    def _fused_of(self, name: str) -> Fused | None:
        """Of a parameter, or of a state of it, "parameter name/key"."""
        return self._fused.get(name.partition("/")[0])

    def from_first(self, make: Callable[[], T]) -> T:
        """Call a function on the first process; return or raise on all what it did there."""
        return from_first(make, self._patient)

    def highest(self, value: int) -> int:
        """The largest of all processes' values."""
        found = torch.tensor([int(value)])
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._patient)
        return int(found)


def _fill_some(
    shares: Mapping[str, Share], rest: Mapping[str, Share], some: Mapping[str, Tensor]
) -> None:
    """Copy whole tensors into shares, what bfloat16 ones round away into the rest; keeps none."""
    halves = {
        name: split(x) for name, x in some.items() if name in rest and x.dtype == torch.float32
    }
    for name in rest.keys() & (some.keys() - halves.keys()):
        # Of values that bfloat16 holds nothing is left over, whatever was filled in before.
        for piece in rest[name].pieces:
            piece.values.zero_()
    fill_all(
        {name: rest[name] for name in halves}, {name: low for name, (_, low) in halves.items()}
    )
    high = {name: halves[name][0] if name in halves else x for name, x in some.items()}
    fill_all({name: shares[name] for name in high}, high)
