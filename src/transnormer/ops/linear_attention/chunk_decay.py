"""How the four kinds of decay act on chunks: masks inside a chunk, factors at its two ends.

A chunk of C tokens needs three things of its log decays g_1 .. g_C (all <= 0):

    score (t, s), s <= t:  q_t . (exp(g_{s+1} + .. + g_t) * k_s)
    query factor of t:     exp(g_1 + .. + g_t)          decays the state that enters the chunk
    key factor of s:       exp(g_{s+1} + .. + g_C)      decays what s adds to the state that leaves
    total factor:          exp(g_1 + .. + g_C)

Every exponent is a sum of some g, never a difference of two sums, so nothing overflows, nothing
cancels, and -inf needs no special case. For gated decay the pairwise sums come from halving the
chunk: with a boundary between s and t the score factors into (q_t * decay from the boundary) .
(k_s * decay up to the boundary), both at most 1. One matrix product per block of each of log2(C)
levels covers all pairs s < t; the diagonal has no decay. (The usual factored form, which divides by
a decay, overflows at strong decay: Yang et al. 2024, arXiv:2312.06635, section 4.3 needs a second
level of chunks for that reason.)

Legend: X rows (batch * kv_heads), N chunks, C tokens a chunk, G query heads a kv head, K key dim.
q is [X, N, C, G, K], k [X, N, C, K]; scores are [X, N, C * G, C] with rows ordered (token, group).
All tensors have the accumulation dtype.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Factors(NamedTuple):
    """Decay at the ends of a chunk; None everywhere means no decay.

    Attributes:
        query: [X or 1, N or 1, C, 1 or K].
        key: [X or 1, N or 1, C, 1 or K].
        total: [X or 1, N or 1, 1, 1 or K].
    """

    query: Tensor
    key: Tensor
    total: Tensor


class ChunkDecay(Protocol):
    """What the chunked form asks of a kind of decay, for one run of chunks."""

    @property
    def factors(self) -> Factors | None:
        """The decays at the ends of the chunks; None is no decay."""
        ...

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Decayed causal scores, [X, N, C * G, C]."""
        ...

    def scores_backward(
        self, q: Tensor, k: Tensor, scores: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of q and k from that of the scores; keeps the decay's own share."""
        ...

    def factors_backward(self, query: Tensor, key: Tensor, total: Tensor) -> Tensor:
        """Gradient of log_decay, given those of the three exponents, plus the scores' share."""
        ...


def _flat_rows(q: Tensor) -> Tensor:
    return q.flatten(2, 3)


class NoDecay:
    """log_decay None: a causal mask and nothing else."""

    factors = None

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return self._mask(q, _flat_rows(q) @ k.mT)

    def _mask(self, q: Tensor, scores: Tensor) -> Tensor:
        chunk, groups = q.shape[2], q.shape[3]
        causal = torch.ones(chunk, chunk, dtype=q.dtype, device=q.device).tril_()
        return scores.mul_(causal.repeat_interleave(groups, 0))

    def scores_backward(
        self, q: Tensor, k: Tensor, scores: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        grad = self._mask(q, grad)
        return (grad @ k).view_as(q), grad.mT @ _flat_rows(q)

    def factors_backward(self, query: Tensor, key: Tensor, total: Tensor) -> Tensor:
        raise AssertionError("no decay has no gradient")


def _power(log_decay: Tensor, exponent: Tensor) -> Tensor:
    """exp(log_decay * exponent) with 0 * -inf read as 0: no step, no decay."""
    product = log_decay * exponent
    return torch.where(exponent == 0, torch.zeros_like(product), product).exp_()


def _token_counts(lengths: tuple[int, ...], like: Tensor) -> Tensor:
    """The lengths as numbers of ``like``'s kind; on a GPU no copy waits unless a middle one is short."""
    if all(n == lengths[0] for n in lengths[:-1]):
        counts = like.new_full((len(lengths),), float(lengths[0]))
        counts[-1:].fill_(float(lengths[-1]))
        return counts
    return torch.tensor(lengths, dtype=like.dtype, device=like.device)


class ConstantDecay:
    """log_decay [heads]: TransNormerLLM, RetNet (Qin et al. 2024, arXiv:2401.04658, algorithm 1).

    Args:
        log_decay: one value a row, [X].
        lengths: true tokens of each chunk, N of them, or one for all (a short chunk decays by its
            own length only).
        chunk: C.
    """

    def __init__(self, log_decay: Tensor, lengths: tuple[int, ...], chunk: int) -> None:
        step = torch.arange(chunk, dtype=log_decay.dtype, device=log_decay.device)
        tokens = _token_counts(lengths, log_decay)
        self._log_decay = log_decay.view(-1, 1, 1, 1)
        self._offset = (step[:, None] - step).clamp_(min=0)
        self._mask = _power(self._log_decay, self._offset).mul_(
            (step[:, None] >= step).to(step.dtype)
        )
        self._query_steps = (step + 1).view(1, 1, chunk, 1)
        self._key_steps = (tokens[:, None] - 1 - step).clamp_(min=0).view(1, -1, chunk, 1)
        self._total_steps = tokens.view(1, -1, 1, 1)
        self.factors = Factors(
            query=_power(self._log_decay, self._query_steps),
            key=_power(self._log_decay, self._key_steps),
            total=_power(self._log_decay, self._total_steps),
        )

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (_flat_rows(q) @ k.mT).mul_(self._mask.repeat_interleave(q.shape[3], 2))

    def scores_backward(
        self, q: Tensor, k: Tensor, scores: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Summed inside each chunk: the form sum_t t (q_t . dq_t - k_t . dk_t) over a whole sequence
        # subtracts numbers that grow with its length.
        offset = self._offset.repeat_interleave(q.shape[3], 0)
        self._scores_share = (scores * grad * offset).sum((1, 2, 3))
        grad = grad.mul_(self._mask.repeat_interleave(q.shape[3], 2))
        return (grad @ k).view_as(q), grad.mT @ _flat_rows(q)

    def factors_backward(self, query: Tensor, key: Tensor, total: Tensor) -> Tensor:
        """Gradient of log_decay, [X]."""
        share = (query * self._query_steps).sum((1, 2, 3))
        share += (key * self._key_steps).sum((1, 2, 3))
        share += (total * self._total_steps).sum((1, 2, 3))
        return share + self._scores_share


class _Level(NamedTuple):
    query: Tensor  # decay from the boundary to each token of the right half, [X, N, nb, m, K]
    key: Tensor  # decay from each token of the left half to the boundary, [X, N, nb, m, K]


class _GatedDecay:
    """What both gates share: sums over aligned blocks of 1, 2, 4 .. C tokens, and their reverse."""

    def __init__(self, log_decay: Tensor) -> None:
        query, key = log_decay.clone(), torch.zeros_like(log_decay)
        self._levels: list[_Level] = []
        chunk, block = log_decay.shape[2], 1
        while block < chunk:
            left_query, right_query = self._halves(query, block)
            left_key, right_key = self._halves(key, block)
            self._levels.append(_Level(right_query.exp(), left_key.exp()))
            left_total, right_total = left_query[..., -1:, :], right_query[..., -1:, :]
            left_key += right_total
            right_query += left_total
            block *= 2
        self._level_grads: list[tuple[Tensor, Tensor]] = []
        self.factors = Factors(query.exp(), key.exp(), query[:, :, -1:].exp())

    @staticmethod
    def _halves(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """Views of the left and the right half of every pair of blocks, [X, N, nb, m, ...]."""
        pairs = x.unflatten(2, (-1, 2, block))
        return pairs[:, :, :, 0], pairs[:, :, :, 1]

    @staticmethod
    def _block_view(scores: Tensor, block: int, groups: int) -> Tensor:
        """View of the right-by-left blocks of the scores, [X, N, m * G, m, nb]."""
        rows, columns, chunk = *scores.shape[:2], scores.shape[3]
        pairs = chunk // (2 * block)
        split = scores.view(rows, columns, pairs, 2, block * groups, pairs, 2, block)
        return split[:, :, :, 1, :, :, 0].diagonal(dim1=2, dim2=4)

    def factors_backward(self, query: Tensor, key: Tensor, total: Tensor) -> Tensor:
        """Gradient of log_decay, [X, N, C, 1 or K]; sums reach over one chunk at most."""
        query, key = query.clone(), key.clone()
        query[:, :, -1:] += total
        block = query.shape[2] // 2
        for level_query, level_key in reversed(self._level_grads):
            left_query, right_query = self._halves(query, block)
            left_key, right_key = self._halves(key, block)
            left_total, right_total = right_query.sum(3), left_key.sum(3)
            right_query += level_query
            left_key += level_key
            left_query[..., -1, :] += left_total
            right_query[..., -1, :] += right_total
            block //= 2
        return query


class ScalarGate(_GatedDecay):
    """log_decay [batch, seq, heads], here [X, N, C, 1]: one gate a token and head."""

    def __init__(self, log_decay: Tensor) -> None:
        super().__init__(log_decay)
        chunk = log_decay.shape[2]
        mask = log_decay.new_zeros(*log_decay.shape[:2], chunk, chunk)
        mask.diagonal(dim1=2, dim2=3).fill_(1.0)
        for level in self._levels:
            block = level.query.shape[3]
            self._block_view(mask, block, 1).copy_((level.query * level.key.mT).movedim(2, -1))
        self._mask = mask

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (_flat_rows(q) @ k.mT).mul_(self._mask.repeat_interleave(q.shape[3], 2))

    def scores_backward(
        self, q: Tensor, k: Tensor, scores: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        share = (scores * grad).unflatten(2, (-1, q.shape[3])).sum(3)
        self._level_grads = []
        for level in self._levels:
            blocks = self._block_view(share, level.query.shape[3], 1).movedim(-1, 2)
            self._level_grads.append((blocks.sum(4)[..., None], blocks.sum(3)[..., None]))
        grad = grad.mul_(self._mask.repeat_interleave(q.shape[3], 2))
        return (grad @ k).view_as(q), grad.mT @ _flat_rows(q)


class KeyGate(_GatedDecay):
    """log_decay [batch, seq, heads, key_dim], here [X, N, C, K]: one gate a key channel."""

    def _halves_at(self, q: Tensor, k: Tensor, level: _Level) -> tuple[Tensor, Tensor]:
        block = level.query.shape[3]
        right_query = self._halves(q, block)[1] * level.query[..., None, :]
        left_key = self._halves(k, block)[0] * level.key
        return right_query.flatten(3, 4), left_key

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        rows, columns, chunk, groups, _ = q.shape
        scores = q.new_zeros(rows, columns, chunk * groups, chunk)
        self._diagonal(scores, groups).copy_((q * k[:, :, :, None]).sum(-1).mT)
        for level in self._levels:
            right_query, left_key = self._halves_at(q, k, level)
            view = self._block_view(scores, level.query.shape[3], groups)
            view.copy_((right_query @ left_key.mT).movedim(2, -1))
        return scores

    @staticmethod
    def _diagonal(scores: Tensor, groups: int) -> Tensor:
        """View of the scores of each token with itself, [X, N, G, C]."""
        return scores.unflatten(2, (-1, groups)).diagonal(dim1=2, dim2=4)

    def scores_backward(
        self, q: Tensor, k: Tensor, scores: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        groups = q.shape[3]
        diagonal = self._diagonal(grad, groups).mT[..., None]
        grad_q = diagonal * k[:, :, :, None]
        grad_k = (diagonal * q).sum(3)
        self._level_grads = []
        for level in self._levels:
            block = level.query.shape[3]
            right_query, left_key = self._halves_at(q, k, level)
            blocks = self._block_view(grad, block, groups).movedim(-1, 2)
            grad_query = blocks @ left_key
            grad_key = blocks.mT @ right_query
            share = (grad_query * right_query).unflatten(3, (-1, groups)).sum(4)
            self._level_grads.append((share, grad_key * left_key))
            grad_query = grad_query.unflatten(3, (-1, groups)) * level.query[..., None, :]
            self._halves(grad_q, block)[1].add_(grad_query)
            self._halves(grad_k, block)[0].add_(grad_key * level.key)
        return grad_q, grad_k
