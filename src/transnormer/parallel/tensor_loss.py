"""Loss and logits of a head whose rows lie on several ranks."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from transnormer.ops.checks import accumulation_dtype, autocast_dtype
from transnormer.ops.cross_entropy import IGNORE_INDEX
from transnormer.parallel.collectives import Copy, Reduce
from transnormer.parallel.tensor_layers import first_row

# Logits of so many entries at a time.
LOGITS = 1 << 25


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
    group, start = mesh.get_group(), first_row(vocab_size, mesh)
    x, weight = x.to(autocast_dtype(x)), weight.to(autocast_dtype(weight))
    x = Copy.apply(x, group)
    rows = max(1, LOGITS // max(weight.shape[0], 1))
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
