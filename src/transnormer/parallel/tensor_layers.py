"""Layers whose channels or rows are shared among ranks: the parts of tensor parallelism.

A weight is a DTensor, so that checkpoints, norms and optimizers see it whole; the arithmetic is on
this rank's share (Shoeybi et al. 2019, arXiv:1909.08053, section 3).
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from transnormer.nn.norms import Norm
from transnormer.nn.positions import Lrpe
from transnormer.ops.checks import accumulation_dtype, autocast_dtype
from transnormer.ops.cross_entropy import IGNORE_INDEX
from transnormer.ops.lrpe import lrpe
from transnormer.parallel.collectives import Copy, Reduce

# Logits of so many entries at a time.
_LOGITS = 1 << 26


class Fused(NamedTuple):
    """Rows of one matrix for several projections, q, k, v and the gate: parts x heads x head_dim.

    Shared among ranks they lie head by head, so that a rank has all parts of its heads.
    """

    parts: int
    heads: int

    def by_head(self, x: Tensor) -> Tensor:
        """Rows, dim 0, from part by part to head by head."""
        return self._swapped(x, self.parts, self.heads)

    def by_part(self, x: Tensor) -> Tensor:
        """Rows, dim 0, from head by head to part by part."""
        return self._swapped(x, self.heads, self.parts)

    @staticmethod
    def _swapped(x: Tensor, first: int, second: int) -> Tensor:
        return x.unflatten(0, (first, second, -1)).transpose(0, 1).flatten(0, 2)


def shared_parameter(x: Tensor, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    """A parameter that is cut along a dim; every rank has the whole values."""
    cut = distribute_tensor(x.detach(), mesh, [Shard(dim)], src_data_rank=None)
    return nn.Parameter(cut, requires_grad=x.requires_grad)


def local(x: Tensor) -> Tensor:
    """This rank's share of a parameter, differentiable."""
    return x.to_local() if isinstance(x, DTensor) else x


class ColumnLinear(nn.Module):
    """A projection whose outputs are shared among ranks; the input is on all of them."""

    def __init__(self, linear: nn.Linear, mesh: DeviceMesh, fused: Fused | None = None) -> None:
        super().__init__()
        self.fused, self._group = fused, mesh.get_group()
        self._heads = 0 if fused is None else fused.heads // mesh.size()

        def cut(x: Tensor) -> nn.Parameter:
            rows = x.detach() if fused is None else fused.by_head(x.detach())
            return shared_parameter(rows.requires_grad_(x.requires_grad), mesh, 0)

        self.weight = cut(linear.weight)
        self.bias = None if linear.bias is None else cut(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., this rank's outputs], part by part."""
        bias = None if self.bias is None else local(self.bias)
        y = F.linear(Copy.apply(x, self._group), local(self.weight), bias)
        if self.fused is None:
            return y
        return y.unflatten(-1, (self._heads, self.fused.parts, -1)).transpose(-3, -2).flatten(-3)


class RowLinear(nn.Module):
    """A projection whose inputs are shared among ranks; the output is summed onto all of them.

    ``norm`` is a ``DeferredNorm`` in front of it: its mean square rides along as one more channel of
    the sum, and the division follows it.
    """

    def __init__(
        self, linear: nn.Linear, mesh: DeviceMesh, norm: "DeferredNorm | None" = None
    ) -> None:
        super().__init__()
        self._group = mesh.get_group()
        self.weight = shared_parameter(linear.weight, mesh, 1)
        self.bias = linear.bias
        # Not a part of this module: the mixer has it.
        self._norm = (norm,)

    def forward(self, x: Tensor) -> Tensor:
        """[..., this rank's inputs] -> [..., out]."""
        y, (norm,) = F.linear(x, local(self.weight)), self._norm
        if norm is None:
            y = Reduce.apply(y, self._group)
        else:
            both = torch.cat([y, norm.mean_square.to(y.dtype)], -1)
            y, square = Reduce.apply(both, self._group).split([y.shape[-1], 1], -1)
            root = (square.to(accumulation_dtype(y.dtype)) + norm.eps).rsqrt()
            y = (y * root).to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class DeferredNorm(nn.Module):
    """SRMSNorm over channels that are shared among ranks, without a collective of its own.

    (o / rms(o)) W = (o W) / rms(o): a norm without a weight commutes with the projection behind it.
    This passes o on and keeps this rank's share of its mean square; ``RowLinear`` does the rest.
    """

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.dim, self.eps = norm.dim, norm.config.eps
        self.mean_square: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x unchanged."""
        wide = x.to(accumulation_dtype(x.dtype))
        self.mean_square = wide.square().sum(-1, keepdim=True) / self.dim
        return x


class LocalLrpe(Lrpe):
    """LRPE of this rank's heads; theta is whole on every rank."""

    group: dist.ProcessGroup
    first_head: int

    def forward(self, x: tuple[Tensor, ...], positions: Tensor) -> tuple[Tensor, ...]:
        """As ``Lrpe.forward``, of this rank's heads."""
        theta = Copy.apply(self.theta, self.group)
        return lrpe(x, positions, theta[self.first_head : self.first_head + x[0].shape[2], 0])


class VocabEmbedding(nn.Module):
    """An embedding whose rows are shared among ranks."""

    def __init__(self, embedding: nn.Embedding, mesh: DeviceMesh) -> None:
        super().__init__()
        self._group = mesh.get_group()
        self.weight = shared_parameter(embedding.weight, mesh, 0)
        self.start = _first_row(embedding.num_embeddings, mesh)

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


def _first_row(rows: int, mesh: DeviceMesh) -> int:
    """The first row of this rank's share."""
    share = -(-rows // mesh.size())
    return min(share * mesh.get_local_rank(), rows)


def vocab_parallel_loss(
    x: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, mesh: DeviceMesh
) -> Tensor:
    """Summed cross-entropy of softmax(x W^T) against labels, in nats; W's rows lie on the ranks.

    Logits stay where they are made: ranks exchange the largest one, the sum of exponentials and
    the label's logit of each row. Log-sum-exp and losses are float32 (float64 for float64 inputs).

    Args:
        x: [rows, model_dim], the same on all ranks.
        weight: this rank's rows of the head.
        labels: int64 [rows]; -100 is ignored.
        vocab_size: of all ranks together.
        mesh: the ranks.
    """
    group, start = mesh.get_group(), _first_row(vocab_size, mesh)
    x, weight = x.to(autocast_dtype(x)), weight.to(autocast_dtype(weight))
    x = Copy.apply(x, group)
    rows = max(1, _LOGITS // max(weight.shape[0], 1))
    losses = [
        torch.utils.checkpoint.checkpoint(
            _loss_of_rows, part, weight, wanted, start, group, use_reentrant=False
        )
        for part, wanted in zip(x.split(rows), labels.split(rows), strict=True)
    ]
    return torch.stack(losses).sum()


def _loss_of_rows(
    x: Tensor, weight: Tensor, labels: Tensor, start: int, group: dist.ProcessGroup
) -> Tensor:
    logits = F.linear(x, weight).to(accumulation_dtype(x.dtype))
    top = logits.detach().amax(-1)
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    own = labels - start
    inside = (own >= 0) & (own < weight.shape[0])
    found = logits.gather(-1, own.clamp(0, weight.shape[0] - 1)[:, None])[:, 0]
    shares = torch.stack([(logits - top[:, None]).exp().sum(-1), found * inside])
    exponentials, of_label = Reduce.apply(shares, group)
    losses = exponentials.log() + top - of_label
    return losses.masked_fill(labels == IGNORE_INDEX, 0.0).sum()


def gathered_logits(x: Tensor, weight: Tensor, vocab_size: int, mesh: DeviceMesh) -> Tensor:
    """softmax's inputs over the whole vocabulary on every rank, [..., vocab_size]; no gradient."""
    logits = F.linear(x, weight)
    share = -(-vocab_size // mesh.size())
    padded = F.pad(logits, (0, share - logits.shape[-1])).contiguous()
    every = [torch.empty_like(padded) for _ in range(mesh.size())]
    dist.all_gather(every, padded, group=mesh.get_group())
    return torch.cat(every, -1)[..., :vocab_size]


def slice_buffer(module: Any, name: str, mesh: DeviceMesh) -> None:
    """Keep this rank's share of a buffer whose dim 0 is heads."""
    values = getattr(module, name)
    share = values.shape[0] // mesh.size()
    first = share * mesh.get_local_rank()
    setattr(module, name, values[first : first + share].clone())
