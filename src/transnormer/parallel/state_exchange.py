"""The exchange of states between ranks that each hold a part of a sequence.

Rank r knows M_r, the state that its own tokens leave when they start from zero, and a_r, the decay
of its tokens together. The state that enters rank r is

    S_r = sum_{p<r} (prod_{p<s<r} a_s) M_p,        S_{r+1} = a_r S_r + M_r,

and the gradient of M_p is the same sum over the ranks behind it, with the gradients of S in the
place of M: dM_p = D_{p+1}, D_s = dS_s + a_s D_{s+1}. The gradient of log a_s is a_s <S_s, dM_s>,
which rank s has. So each direction is one call of ``start`` and one of ``wait``, and whatever runs
between them hides the message. All is computed in the dtype of the states.

Sources: Sun et al. 2024 (arXiv:2404.02882), the ring; Sun et al. 2025 (arXiv:2502.07563), one
gathering of all states; Chou et al. 2025 (arXiv:2507.01004), the pipelined chain.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Exchange = Literal["gather", "ring", "scan"]

# Blocks of a state on their way down the chain: a rank works on one while the next one is under way.
_BLOCKS = 8


class Chain(NamedTuple):
    """The ranks of a process group in the order in which states pass.

    Attributes:
        group: the process group; None is the default one.
        rank, size: of this process in it.
        exchange: "gather" sends every state to everybody at once; "ring" hands one state from rank
            to rank, in size - 1 steps; "scan" does so in blocks that follow each other, which
            costs each rank one state whatever the size, and hardly more time than one step.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int
    exchange: Exchange = "gather"


def start(
    chain: Chain, state: Tensor, log_decay: Tensor, near: Tensor | None, *, reverse: bool
) -> Callable[[], Tensor]:
    """Begin an exchange; the result waits for it and returns the state that enters this rank.

    Every rank of the chain calls it with the same shapes.

    Args:
        chain: the ranks.
        state: M of this rank, [rows, heads, key_dim, value_dim].
        log_decay: log a of this rank, [rows, heads, 1 or key_dim]; -inf lets nothing through.
        near: indices of heads of which only the neighbour's state counts; None is no head.
        reverse: pass states from the last rank to the first.
    """
    if near is None:
        return _start_all(chain, state, log_decay, reverse)
    far = torch.ones(state.shape[1], dtype=torch.bool, device=state.device)
    far[near] = False
    far = far.nonzero()[:, 0]
    wait_near = _start_neighbour(chain, state[:, near].contiguous(), reverse)
    wait_far = None
    if far.numel():
        wait_far = _start_all(chain, state[:, far], log_decay[:, far], reverse)

    def wait() -> Tensor:
        entering = torch.empty_like(state)
        entering[:, near] = wait_near()
        if wait_far is not None:
            entering[:, far] = wait_far()
        return entering

    return wait


def _start_all(
    chain: Chain, state: Tensor, log_decay: Tensor, reverse: bool
) -> Callable[[], Tensor]:
    if chain.exchange == "gather":
        return _start_gather(chain, state, log_decay, reverse)
    blocks = _BLOCKS if chain.exchange == "scan" else 1
    # A chain has nothing to begin with: a rank acts when the one before it has.
    return lambda: _pass_on(chain, state, log_decay, reverse, blocks)


def _start_gather(
    chain: Chain, state: Tensor, log_decay: Tensor, reverse: bool
) -> Callable[[], Tensor]:
    sent = torch.cat([state.flatten(), log_decay.to(state.dtype).flatten()])
    received = sent.new_empty(chain.size, sent.numel())
    work = dist.all_gather(list(received), sent, group=chain.group, async_op=True)

    def wait() -> Tensor:
        assert work is not None
        work.wait()
        entering = torch.zeros_like(state)
        before = range(chain.size - 1, chain.rank, -1) if reverse else range(chain.rank)
        for peer in before:
            theirs, decay = received[peer].split([state.numel(), log_decay.numel()])
            entering = decay.view_as(log_decay)[..., None].exp() * entering
            entering += theirs.view_as(state)
        return entering

    return wait


def _pass_on(chain: Chain, state: Tensor, log_decay: Tensor, reverse: bool, blocks: int) -> Tensor:
    """Receive the entering state from the rank before, and send on what leaves this one."""
    before, behind = _neighbours(chain, reverse)
    lines = state.flatten(0, 1)
    decay = log_decay.to(state.dtype).exp().flatten(0, 1)[..., None]
    entering = torch.zeros_like(lines)
    parts = list(zip(*(x.chunk(min(blocks, lines.shape[0])) for x in (entering, decay, lines))))
    arriving = []
    if before is not None:
        arriving = [dist.irecv(x, group=chain.group, group_src=before) for x, _, _ in parts]
    sent = []
    for index, (x, factor, own) in enumerate(parts):
        if before is not None:
            _wait(arriving[index])
        if behind is not None:
            leaving = factor * x + own
            sent.append((dist.isend(leaving, group=chain.group, group_dst=behind), leaving))
    for work, _ in sent:
        _wait(work)
    return entering.view_as(state)


def _start_neighbour(chain: Chain, state: Tensor, reverse: bool) -> Callable[[], Tensor]:
    before, behind = _neighbours(chain, reverse)
    entering = torch.zeros_like(state)
    messages = []
    if behind is not None:
        messages.append(dist.P2POp(dist.isend, state, group=chain.group, group_peer=behind))
    if before is not None:
        messages.append(dist.P2POp(dist.irecv, entering, group=chain.group, group_peer=before))
    works = dist.batch_isend_irecv(messages)

    def wait() -> Tensor:
        for work in works:
            work.wait()
        return entering

    return wait


def _neighbours(chain: Chain, reverse: bool) -> tuple[int | None, int | None]:
    """The ranks that states come from and go to; None at the ends."""
    low = chain.rank - 1 if chain.rank else None
    high = chain.rank + 1 if chain.rank + 1 < chain.size else None
    return (high, low) if reverse else (low, high)


def _wait(work: dist.Work | None) -> None:
    # None is what a process outside the group gets.
    assert work is not None
    work.wait()


class _Slot:
    """What the two ends of one exchange share: its direction, and what is under way."""

    def __init__(self, chain: Chain, near: Tensor | None, reverse: bool) -> None:
        self.chain, self.near, self.reverse = chain, near, reverse
        self.wait: Callable[[], Tensor] | None = None
        self.log_decay: Tensor | None = None
        self.entering: Tensor | None = None


class _Start(torch.autograd.Function):
    """Sends a state off; its backward takes the gradient in."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, log_decay: Tensor, slot: _Slot) -> Tensor:
        slot.log_decay = log_decay.detach()
        slot.wait = start(slot.chain, state, log_decay, slot.near, reverse=slot.reverse)
        ctx.slot = slot
        # Ties the two ends together in the graph; nothing is in it.
        return state.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor | None, None]:
        slot = ctx.slot
        assert slot.wait is not None
        assert slot.entering is not None
        assert slot.log_decay is not None
        grad = slot.wait()
        if not ctx.needs_input_grad[1]:
            return grad, None, None
        share = slot.log_decay.exp() * (slot.entering * grad).sum(-1)
        return grad, share.sum_to_size(slot.log_decay.shape), None


class _Wait(torch.autograd.Function):
    """Takes a state in; its backward sends the gradient off.

    ``other`` passes through unchanged: its gradient is what calls the backward on every rank, also
    where nobody uses the state.
    """

    @staticmethod
    def forward(ctx: Any, other: Tensor, token: Tensor, slot: _Slot) -> tuple[Tensor, Tensor]:
        assert slot.wait is not None
        slot.entering = slot.wait()
        ctx.slot = slot
        return other.view_as(other), slot.entering.view_as(slot.entering)

    @staticmethod
    def backward(ctx: Any, grad_other: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        slot = ctx.slot
        assert slot.log_decay is not None
        slot.wait = start(
            slot.chain, grad.contiguous(), slot.log_decay, slot.near, reverse=not slot.reverse
        )
        return grad_other, grad.new_empty(0), None


class Entering:
    """One exchange inside the graph of autograd, from ``__init__`` to ``take``.

    Between the two, work that does not need the result runs while the message is under way; in the
    backward pass that work's own backward does so too.
    """

    def __init__(
        self,
        chain: Chain,
        state: Tensor,
        log_decay: Tensor,
        *,
        near: Tensor | None = None,
        reverse: bool = False,
    ) -> None:
        """Send off this rank's state; arguments as ``start``'s."""
        self._slot = _Slot(chain, near, reverse)
        self._token = _Start.apply(state, log_decay, self._slot)

    def take(self, other: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``other`` unchanged and the state that enters this rank.

        The caller goes on with the returned ``other``, which must lie on the way to the loss on
        every rank: its gradient starts the exchange of gradients.
        """
        return _Wait.apply(other, self._token, self._slot)
