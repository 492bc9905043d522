"""Layers of any kind over sequences in parts: each rank starts from the state of the one before.

A mixer whose state has a constant size sees the past through it alone, so handing the whole state
from rank to rank is exact. It is also serial: within such a layer one rank works at a time.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from transnormer.nn.state import map_tensors, tensors_of
from transnormer.nn.token_mixers import TokenMixer
from transnormer.ops.checks import autocast_dtype
from transnormer.parallel.sequence_part import SequenceAxis


class Relay:
    """The two hooks around one mixer: a state comes in before it, and goes out behind it."""

    def __init__(self, mixer: TokenMixer, axis: SequenceAxis) -> None:
        self._axis = axis
        self._dtypes: list[torch.dtype] = []
        mixer.register_forward_pre_hook(self._before, with_kwargs=True)
        mixer.register_forward_hook(self._behind)

    def _before(
        self, mixer: TokenMixer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        return None if self._axis.part is None else self.receive(mixer, args, kwargs)

    def receive(
        self, mixer: TokenMixer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put the state from the rank before into the arguments of the mixer."""
        part = self._axis.part
        assert part is not None
        (x,), given, cu_seqlens = args, kwargs["state"], kwargs["cu_seqlens"]
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if given is None:
            given = mixer.empty_state(rows, dtype=autocast_dtype(x), device=x.device)
        like = tensors_of(map_tensors(lambda t: t[: x.shape[0]], given))
        self._dtypes = [t.dtype for t in like]
        x, *received = _Receive.apply(self._axis, x, *(t.detach() for t in like))
        if part.history:
            arrived = iter(received)
            given = map_tensors(lambda t: torch.cat([next(arrived), t[x.shape[0] :]]), given)
        return (x,), {**kwargs, "state": given}

    def _behind(self, mixer: TokenMixer, args: Any, output: tuple[Tensor, Any]) -> Any:
        return None if self._axis.part is None else self.send(*output)

    def send(self, y: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Pass on what the mixer gave; the state also goes to the rank behind."""
        last = tensors_of(map_tensors(lambda t: t[-y.shape[0] :], state))
        sent = (t.to(dtype) for t, dtype in zip(last, self._dtypes, strict=True))
        return _Send.apply(self._axis, y, *sent), state


def _pass(axis: SequenceAxis, tensors: tuple[Tensor, ...], step: int, *, send: bool) -> None:
    """Send tensors to the rank ``step`` further, or receive them from it; nothing at an end."""
    chain = axis.chain
    peer = chain.rank + step
    if not 0 <= peer < chain.size:
        return
    for x in tensors:
        if send:
            dist.send(plain(x), group=chain.group, group_dst=peer)
        else:
            dist.recv(plain(x), group=chain.group, group_src=peer)


def plain(x: Tensor) -> Tensor:
    """A view of x as a message: neither backend has any of complex numbers or truth values."""
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def differentiable(x: Tensor) -> bool:
    """Whether a tensor of a state can have a gradient."""
    return x.is_floating_point() or x.is_complex()


class _Receive(torch.autograd.Function):
    """A state from the rank before; the backward sends its gradient there."""

    @staticmethod
    def forward(ctx: Any, axis: SequenceAxis, x: Tensor, *like: Tensor) -> tuple[Tensor, ...]:
        received = tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in like)
        _pass(axis, received, -1, send=False)
        ctx.axis = axis
        ctx.mark_non_differentiable(*(t for t in received if not differentiable(t)))
        return x.view_as(x), *received

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, *grads: Tensor | None) -> tuple[Any, ...]:
        wanted = tuple(g.contiguous() for g in grads if g is not None and differentiable(g))
        _pass(ctx.axis, wanted, -1, send=True)
        return None, grad_x, *(None for _ in grads)


class _Send(torch.autograd.Function):
    """A state to the rank behind; the backward receives its gradient from there."""

    @staticmethod
    def forward(ctx: Any, axis: SequenceAxis, y: Tensor, *state: Tensor) -> Tensor:
        _pass(axis, tuple(t.contiguous() for t in state), 1, send=True)
        ctx.axis, ctx.like = axis, [(t.shape, t.dtype, differentiable(t)) for t in state]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        grads = [
            grad_y.new_zeros(shape, dtype=dtype) if wanted else None
            for shape, dtype, wanted in ctx.like
        ]
        _pass(ctx.axis, tuple(g for g in grads if g is not None), 1, send=False)
        return None, grad_y, *grads
