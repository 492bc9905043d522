"""Layers whose channels or rows are shared among ranks: the parts of tensor parallelism.

A weight is a DTensor, so that checkpoints, norms and optimizers see it whole; the arithmetic is on
this rank's share (Shoeybi et al. 2019, arXiv:1909.08053, section 3). Layers change their class and
not their names. Between what enters a mixer and what leaves it, gradients are this rank's share.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from transnormer.nn.norms import Norm
from transnormer.ops.checks import accumulation_dtype
from transnormer.parallel.collectives import Copy, Gather, Join, Part, Reduce, Scatter, Total


class TensorAxis:
    """The ranks that share layers, and what passes between them and the residual stream.

    Args:
        mesh: one axis.
        cut_residual: each rank holds the stream of its part of the tokens alone: what enters a
            mixer is gathered, and what leaves it is summed and cut, in place of one sum of all
            tokens. The same bytes are sent.
    """

    def __init__(self, mesh: DeviceMesh, *, cut_residual: bool = False) -> None:
        self.mesh, self.cut_residual = mesh, cut_residual
        self.group: dist.ProcessGroup = mesh.get_group()
        self.ranks, self.rank = mesh.size(), mesh.get_local_rank()

    def enter(self, x: Tensor) -> Tensor:
        """[batch, own tokens, model_dim] -> [batch, all tokens, model_dim], the same on all ranks."""
        return Gather.apply(x, self.group, 1) if self.cut_residual else Copy.apply(x, self.group)

    def leave(self, y: Tensor) -> Tensor:
        """The sum of the ranks' y, [batch, tokens, channels]; of this rank's tokens if cut."""
        if not self.cut_residual:
            return Reduce.apply(y, self.group)
        return Scatter.apply(F.pad(y, (0, 0, 0, -y.shape[1] % self.ranks)), self.group, 1)

    def place(self, x: Tensor) -> Tensor:
        """This rank's channels at their place among those of all, as ``leave``."""
        before = x.shape[-1] * self.rank
        return self.leave(F.pad(x, (before, x.shape[-1] * (self.ranks - 1) - before)))

    def own_tokens(self, x: Tensor) -> Tensor:
        """This rank's tokens of a stream that all have, [batch, seq, model_dim]."""
        if rest := -x.shape[1] % self.ranks:
            # A real token: norms of zeros need not have a gradient.
            x = torch.cat([x, x[:, -1:].expand(-1, rest, -1)], 1)
        return Part.apply(x, self.group, 1)

    def all_tokens(self, x: Tensor, seq: int) -> Tensor:
        """The whole stream, [batch, seq, model_dim], of the ranks' tokens."""
        # No view: FSDP hooks onto what a block returns.
        return Join.apply(x, self.group, 1)[:, :seq].clone()

    def outside(self, parameter: Tensor) -> Tensor:
        """A parameter that works on the residual stream, which may be this rank's part alone."""
        return Copy.apply(parameter, self.group) if self.cut_residual else parameter


class Fused(NamedTuple):
    """Entries of one dim that belong to several parts: q, k, v and the gate in one matrix.

    Cut among ranks they lie rank by rank, so that a rank has its share of each part, in order.

    Attributes:
        sizes: entries of each part.
        ranks: that share them.
        dim: of the tensor.
        whole_last: every rank needs all of the last part.
    """

    sizes: tuple[int, ...]
    ranks: int
    dim: int = 0
    whole_last: bool = False

    def order(self) -> Tensor:
        """Which entry of one process lies at each place, int64 [entries]."""
        parts = torch.arange(sum(self.sizes)).split(self.sizes)
        shares = [part.chunk(self.ranks) for part in parts]
        return torch.cat([share[rank] for rank in range(self.ranks) for share in shares])

    def by_rank(self, x: Tensor) -> Tensor:
        """From part by part to rank by rank; a number, as an optimizer's count, stays."""
        return x.index_select(self.dim, self.order().to(x.device)) if x.dim() else x

    def by_part(self, x: Tensor) -> Tensor:
        """From rank by rank to part by part."""
        return x.index_select(self.dim, self.order().argsort().to(x.device)) if x.dim() else x


def shared_parameter(x: Tensor, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    """A parameter that is cut along a dim; every rank has the whole values."""
    cut = distribute_tensor(x.detach(), mesh, [Shard(dim)], src_data_rank=None)
    return nn.Parameter(cut, requires_grad=x.requires_grad)


def local(x: Tensor) -> Tensor:
    """This rank's share of a parameter, differentiable."""
    return x.to_local() if isinstance(x, DTensor) else x


class OnRanks(nn.Module):
    """A module that reads its own tensors as this rank's: what it computes follows from that.

    A parameter that was cut is read as this rank's share of it. One that was not is the same on all
    ranks, and its gradient is summed over them. ``share`` makes a module one of these.

    Attributes:
        axis: the ranks.
        cut_buffers: dims of buffers that are read by shares.
        fused: how entries of cut parameters lie, where they are of several parts.
        entered: shares that were taken before a graph was entered, see ``SharesEnter``.
    """

    axis: TensorAxis
    cut_buffers: dict[str, int]
    fused: dict[str, Fused]
    entered: dict[str, Tensor]

    def __getattr__(self, name: str) -> Any:
        x = super().__getattr__(name)
        if not isinstance(x, Tensor):
            return x
        axis: TensorAxis = self.axis
        own = self.entered.get(name)
        if own is None and isinstance(x, DTensor):
            if x.device_mesh != axis.mesh:
                # Shared further, by FSDP: nobody computes with it now.
                return x
            own = x.to_local()
        if own is not None:
            return self._with_last(own, self.fused.get(name))
        if isinstance(x, nn.Parameter):
            return Copy.apply(x, axis.group)
        dim = self.cut_buffers.get(name)
        return x if dim is None else x.chunk(axis.ranks, dim)[axis.rank]

    def _with_last(self, own: Tensor, fused: Fused | None) -> Tensor:
        """A share, with all of the last part where every rank needs it."""
        if fused is None or not fused.whole_last:
            return own
        last = fused.sizes[-1] // fused.ranks
        own, part = own.split([own.shape[0] - last, last])
        return torch.cat([own, Gather.apply(part, self.axis.group, 0)])


def share(
    module: nn.Module,
    axis: TensorAxis,
    dims: dict[str, int],
    *,
    kind: type[OnRanks] = OnRanks,
    fused: Fused | None = None,
) -> Any:
    """Make a module one that works on ranks: its tensors of these names are cut along these dims.

    Args:
        module: whole, the same on all ranks; changed in place.
        axis: the ranks.
        dims: dim of each tensor that is cut; one of size 1 there is whole.
        kind: what it becomes beside its own class.
        fused: the parts along that dim.
    """
    changed: Any = module
    if kind is OnRanks and not dims and not list(module.parameters(recurse=False)):
        return changed
    changed.axis, changed.cut_buffers, changed.fused, changed.entered = axis, {}, {}, {}
    for name, x in list(module.named_parameters(recurse=False)):
        if name in dims and x.shape[dims[name]] > 1:
            whole = x.detach() if fused is None else fused.by_rank(x.detach())
            if fused is not None:
                changed.fused[name] = fused
            whole.requires_grad_(x.requires_grad)
            module.register_parameter(name, shared_parameter(whole, axis.mesh, dims[name]))
    for name, x in module.named_buffers(recurse=False):
        if name in dims and x.shape[dims[name]] > 1:
            changed.cut_buffers[name] = dims[name]
    mix_in(changed, kind)
    return changed


def mix_in(module: nn.Module, kind: type[nn.Module]) -> None:
    """Put a class in front of a module's own."""
    # A class, not a wrapper: names stay as they are.
    module.__class__ = _mixed(kind, type(module))


@cache
def _mixed(kind: type[nn.Module], own: type[nn.Module]) -> type[nn.Module]:
    # One for all modules of a class: each class has compiled graphs of its own.
    return type(f"{kind.__name__}{own.__name__}", (kind, own), {})


class SharesEnter(nn.Module):
    """A block whose graphs, compiled, are given this rank's shares and not the tensors cut.

    Taken before the graph is entered: to one they are weights like any other, and it is the same for
    all blocks of a kind. Where FSDP gathers them behind the call, the graph takes them.
    """

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """As the block's."""
        if self._compiled_call_impl is None:
            return super().__call__(*args, **inputs)
        modules = [module for module in self.modules() if isinstance(module, OnRanks)]
        try:
            for module in modules:
                for name, x in module._parameters.items():
                    if isinstance(x, DTensor) and x.device_mesh == module.axis.mesh:
                        module.entered[name] = x.to_local()
            return super().__call__(*args, **inputs)
        finally:
            for module in modules:
                module.entered.clear()


class RowLinear(OnRanks):
    """A projection whose inputs are shared among ranks; the outputs are summed."""

    def forward(self, x: Tensor) -> Tensor:
        """[batch, seq, this rank's inputs] -> [batch, seq, out]."""
        y = self.axis.leave(F.linear(x, self.weight))
        bias = self._parameters["bias"]
        return y if bias is None else y + self.axis.outside(bias).to(y.dtype)


class PlaceChannels(OnRanks):
    """In place of a projection: this rank's channels at their place among those of all."""

    def forward(self, x: Tensor) -> Tensor:
        """[batch, seq, own channels] -> [batch, seq, channels]."""
        return self.axis.place(x)


class SharedNorm(OnRanks):
    """A norm over channels that are shared among ranks: its means are summed over them.

    One number a token and mean, in the accumulation dtype: the mean of the squares, and before it
    that of the channels for a layer norm. The backward pass sums their gradients.
    """

    def forward(self, x: Tensor) -> Tensor:
        """As ``Norm.forward``, of this rank's channels."""
        config = self.config
        y = x.to(accumulation_dtype(x.dtype))
        if config.kind == "layer":
            y = y - self._mean(y)
        square = self._mean(y.square())
        if config.eps_outside:
            # The root has a gradient at 0 here, as in the norm.
            root = square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()
            y = y / (root + config.eps)
        else:
            y = y * (square + config.eps).rsqrt()
        weight, bias = self.weight, self.bias
        if weight is not None:
            y = y * weight.to(y.dtype)
        if bias is not None:
            y = y + bias.to(y.dtype)
        return y.to(x.dtype)

    def _mean(self, y: Tensor) -> Tensor:
        return Total.apply(y.sum(-1, keepdim=True), self.axis.group) / self.dim


def share_norm(norm: Norm, axis: TensorAxis, parts: int) -> None:
    """Put a norm of merged heads on ranks.

    Args:
        norm: over all channels, in equal groups or one.
        axis: the ranks.
        parts: of the channels, each of them cut.
    """
    config = norm.config
    fused = Fused((norm.dim // parts,) * parts, axis.ranks) if parts > 1 else None
    dims = {} if config.kind == "scale" else {"weight": 0, "bias": 0}
    if config.groups == 1:
        share(norm, axis, dims, kind=SharedNorm, fused=fused)
        return
    changed = share(norm, axis, dims, fused=fused)
    # Groups are whole on a rank.
    changed.config = config.model_copy(update={"groups": config.groups // axis.ranks})
    changed.dim = norm.dim // axis.ranks


class VocabEmbedding(nn.Module):
    """An embedding whose rows are shared among ranks."""

    def __init__(self, embedding: nn.Embedding, mesh: DeviceMesh) -> None:
        super().__init__()
        self._group = mesh.get_group()
        self.weight = shared_parameter(embedding.weight, mesh, 0)
        self.start = first_row(embedding.num_embeddings, mesh)

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., model_dim]."""
        weight = local(self.weight)
        own = ids - self.start
        inside = (own >= 0) & (own < weight.shape[0])
        x = F.embedding(own.clamp(0, max(weight.shape[0] - 1, 0)), weight)
        return Reduce.apply(x.masked_fill(~inside[..., None], 0.0), self._group)


class VocabHead(nn.Module):
    """The head's matrix whose rows are shared among ranks, where it is not the embedding's."""

    def __init__(self, linear: nn.Linear, mesh: DeviceMesh) -> None:
        super().__init__()
        self.weight = shared_parameter(linear.weight, mesh, 0)


def first_row(rows: int, mesh: DeviceMesh) -> int:
    """The first row of this rank's share."""
    share_of_rank = -(-rows // mesh.size())
    return min(share_of_rank * mesh.get_local_rank(), rows)
