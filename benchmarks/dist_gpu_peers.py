"""Other ways to read one sequence on several ranks, put into a model that was laid out with ``sp``.

They differ from the library's in what passes between ranks, and in nothing else: the same model,
update, sharing of parameters and cutting of sequences.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from transnormer.models.decoder import Block
from transnormer.nn.core import LinearAttentionCore
from transnormer.nn.softmax_attention import SoftmaxAttentionCore
from transnormer.parallel.sequence import LocalInputs, SequenceParallelDecoder


class _AllToAll(torch.autograd.Function):
    """[ranks, ...]: entry r goes to rank r; the gradient comes back the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return _AllToAll.apply(grads[0], ctx.group), None


def heads_for_tokens(x: Tensor, group: dist.ProcessGroup, ranks: int) -> Tensor:
    """[batch, own tokens, heads, dim] -> [batch, all tokens, own heads, dim]."""
    sent = x.unflatten(2, (ranks, -1)).movedim(2, 0)
    return _AllToAll.apply(sent, group).movedim(0, 1).flatten(1, 2)


def tokens_for_heads(x: Tensor, group: dist.ProcessGroup, ranks: int) -> Tensor:
    """[batch, all tokens, own heads, dim] -> [batch, own tokens, heads, dim]."""
    sent = x.unflatten(1, (ranks, -1)).movedim(1, 0)
    return _AllToAll.apply(sent, group).movedim(0, 2).flatten(2, 3)


class Ulysses(nn.Module):
    """A core that reads whole sequences with a share of the heads (Jacobs et al. 2023,
    arXiv:2309.14509): three exchanges before the attention, as one message, and one behind it."""

    def __init__(self, core: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.core, self._group = core, group
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)

    def joint(self, *_: Any, **__: Any) -> None:
        """None: projections have to be parted before their heads go anywhere."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *given: Any, **options: Any) -> Any:
        """As the core's forward, on this rank's tokens."""
        widths = [x.shape[-1] for x in (q, k, v)]
        both = heads_for_tokens(torch.cat([q, k, v], -1), self._group, self._ranks)
        q, k, v = both.split(widths, -1)
        # The log decays of these heads, where the core takes such.
        given = tuple(None if x is None else x.chunk(self._ranks)[self._rank] for x in given)
        o, _ = self.core(q, k, v, *given, **options)
        return tokens_for_heads(o, self._group, self._ranks), None


def apply_ulysses(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Let the mixers of a model laid out with ``sp`` exchange heads for tokens."""
    for mixer in _mixers(model):
        causal = mixer.core.causal
        is_linear = isinstance(mixer.core, LinearAttentionCore)
        core = LinearAttentionCore(causal=causal) if is_linear else SoftmaxAttentionCore()
        mixer.core = Ulysses(core, group)


@contextmanager
def ring_attention(model: nn.Module, group: dist.ProcessGroup, seq: int) -> Iterator[None]:
    """Let torch's own context parallelism pass keys and values around, of sequences of ``seq``.

    ``torch.distributed.tensor.experimental.context_parallel``, with its balance of load: rank r of P
    has chunks r and 2P - 1 - r of 2P. Patches ``scaled_dot_product_attention`` of the process.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    assert isinstance(model, SequenceParallelDecoder)
    device = next(model.parameters()).device
    for mixer in _mixers(model):
        mixer.core = SoftmaxAttentionCore()
    own = torch.arange(seq, device=device)[None]

    def cut(input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> LocalInputs:
        where = own.expand(input_ids.shape[0], -1)
        wanted = None if labels is None else labels[:, own[0]]
        return LocalInputs(input_ids[:, own[0]], wanted, where, None, None)

    parts: Any = model
    parts.cut = cut
    set_rotate_method("alltoall")
    mesh = DeviceMesh.from_group(group, device.type, mesh_dim_names=("cp",))
    with context_parallel(mesh, buffers=[own], buffer_seq_dims=[1], no_restore_buffers={own}):
        yield
    del parts.cut


def _mixers(model: nn.Module) -> list[Any]:
    return [module.token_mixer for module in model.modules() if isinstance(module, Block)]
