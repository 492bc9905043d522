"""Toeplitz position encoding (TPE, MD-TPE): a sum of exponentials of the distance, per channel."""

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from transnormer.nn.grid import check_extents
from transnormer.nn.precision import KeepPrecision
from transnormer.nn.state import zeros
from transnormer.nn.token_mixers.base import TokenMixer, TokenMixerBase
from transnormer.ops import linear_attention
from transnormer.ops.checks import accumulation_dtype, no_autocast

# Half-lives of the exponentials before training, geometric in between: ours, in tokens.
_HALF_LIVES = (1.0, 1024.0)
# Tokens a chunk; short inputs take the small one.
_CHUNK, _SMALL_CHUNK = 64, 16


class TpeConfig(TokenMixerBase):
    """Toeplitz position encoding.

    It is the token mixer of a block without norm and channel mixer, the first of a model, so that
    the model goes on with x + TPE(x).

    Attributes:
        exponents: E, exponentials in the kernel of every channel.
        axes: axes of the input; more than one needs causal=False and ``shape`` in the call.
    """

    kind: Literal["tpe"] = "tpe"
    exponents: int = Field(default=1, ge=1)
    axes: int = Field(default=1, ge=1)

    def build(self, model_dim: int, layer_index: int, num_layers: int, *, causal: bool) -> "Tpe":
        if causal and self.axes > 1:
            raise NotImplementedError(
                f"axes is {self.axes}; expected 1 in a causal model, since a grid has no one order; "
                "use causal=False"
            )
        return Tpe(self, model_dim, causal=causal)


class TpeDecay(KeepPrecision):
    """The log decays of the exponentials, -exp(log_rate) < 0, [axes, exponents]."""

    def __init__(self, axes: int, exponents: int) -> None:
        super().__init__()
        dtype = accumulation_dtype(torch.get_default_dtype())
        self.log_rate = nn.Parameter(torch.empty(axes, exponents, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        least, most = (math.log(math.log(2.0) / half_life) for half_life in reversed(_HALF_LIVES))
        ladder = torch.linspace(most, least, self.log_rate.shape[1], dtype=torch.float64)
        self.log_rate.copy_(ladder.expand_as(self.log_rate))

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The log decays in ``dtype``."""
        return -self.log_rate.to(dtype).exp()


class Tpe(TokenMixer):
    """y_t = sum_{s <= t} tau_{t-s} * x_s with tau_j[c] = sum_e B[c, e] lambda_e^j, per channel c.

    Causal: h_t = lambda_e h_{t-1} + x_t, y_t = sum_e B[:, e] h_t[e]; the state h is
    [rows, exponents, model_dim]. Without ``causal`` the kernel is tau_|t-s|: forward plus reverse
    minus the centre. Several axes: one such sum along each, added up (MD-TPE), linear in the number
    of axes. Everything is computed in float32 (float64 for a float64 model), in chunks whose inner
    part is a small Toeplitz matrix a channel.

    A masked token adds nothing; in a sequence the tokens behind it close up, in a grid its place
    stays. B starts as N(0, (1 - lambda^2) / E), which gives y the variance of uncorrelated x.
    Source: Qin et al. 2024, arXiv:2405.21022, section 3 (TPE and MD-TPE); sizes of Shen et al.
    2024, arXiv:2406.16690; the initial values are ours.
    """

    def __init__(self, config: TpeConfig, model_dim: int, *, causal: bool) -> None:
        super().__init__()
        self.config, self.model_dim, self.causal = config, model_dim, causal
        self.decay = TpeDecay(config.axes, config.exponents)
        self.mixing = nn.Parameter(torch.empty(config.axes, model_dim, config.exponents))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.decay.reset_parameters()
        variance = -torch.expm1(2.0 * self.decay(torch.float64)) / self.config.exponents
        nn.init.normal_(self.mixing)
        self.mixing.mul_(variance.sqrt()[:, None].to(self.mixing.dtype))

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        state: Tensor | None = None,
        shape: tuple[int, ...] | None = None,
        shared: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``TokenMixer.forward``.

        Raises:
            ValueError: a shape that does not fit the input, none for several axes, or one with
                packed sequences.
        """
        dtype = accumulation_dtype(x.dtype)
        y, kernel = x.to(dtype), Kernel(self.decay(dtype)[0], self.mixing[0].to(dtype))
        with no_autocast(x.device.type):
            if self.config.axes > 1:
                if cu_seqlens is not None:
                    raise ValueError("cu_seqlens is given; expected None with several axes")
                extents = check_extents(shape, self.config.axes, x.shape[1])
                return self._grid(y, extents, mask).to(x.dtype), None
            if shape is not None:
                check_extents(shape, 1, x.shape[1])
            if not self.causal:
                return _both_ways(y, kernel, cu_seqlens, mask).to(x.dtype), None
            rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            if state is None:
                state = y.new_zeros(rows, self.config.exponents, x.shape[2])
            y, state = _causal(y, kernel, state, cu_seqlens, mask)
        return y.to(x.dtype), state

    def _grid(self, x: Tensor, extents: tuple[int, ...], mask: Tensor | None) -> Tensor:
        """The sum over axes; x is [batch, seq, model_dim] with seq row-major over the extents."""
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)
        grid = x.unflatten(1, extents)
        total = torch.zeros_like(grid)
        for axis, decay in enumerate(self.decay(x.dtype)):
            lines = grid.movedim(1 + axis, -2)
            kernel = Kernel(decay, self.mixing[axis].to(x.dtype))
            y = _both_ways(lines.flatten(0, -3), kernel, None, None).view(lines.shape)
            total = total + y.movedim(-2, 1 + axis)
        return total.flatten(1, -2)

    def mixing_flops(self, context: int) -> float:
        # Within its chunk, from the state and into it; forward and back along each axis.
        once = 2.0 * self.model_dim * (min(context, _CHUNK) + 2 * self.config.exponents)
        return once * self.config.axes * (1 if self.causal else 2)

    def empty_state(
        self,
        rows: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        return zeros(rows, self.config.exponents, self.model_dim, dtype=dtype, device=device)


class Kernel(NamedTuple):
    """A kernel of exponentials: tau_j[c] = sum_e mixing[c, e] exp(j log_decay[e])."""

    log_decay: Tensor  # [exponents]
    mixing: Tensor  # [channels, exponents]


class _Places(NamedTuple):
    """Where tokens lie among chunks; rows are batch rows, or packed sequences in one batch row."""

    source: Tensor  # token of each slot, flat; the number of tokens where there is none
    slots: Tensor  # slot of each token, flat; the number of slots for a masked one
    counts: Tensor  # real tokens of each row
    first: Tensor  # first chunk of each row, counted over its batch row
    bounds: Tensor | None  # packed: chunks of the sequences, and of a last one that is empty slots


def _both_ways(x: Tensor, kernel: Kernel, cu_seqlens: Tensor | None, mask: Tensor | None) -> Tensor:
    """sum_s tau_|t-s| x_s: forward plus reverse, with the centre once."""
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = x.new_zeros(rows, kernel.log_decay.shape[0], x.shape[2])
    ahead, _ = _causal(x, kernel, state, cu_seqlens, mask)
    # A packed row flipped whole has its sequences in the opposite order.
    bounds = None if cu_seqlens is None else cu_seqlens[-1] - cu_seqlens.flip(0)
    flipped = None if mask is None else mask.flip(1)
    back, _ = _causal(x.flip(1), kernel, state, bounds, flipped)
    return ahead + back.flip(1) - kernel.mixing.sum(1) * x


def _step(x: Tensor, kernel: Kernel, state: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token, x [batch, 1, channels]."""
    after = kernel.log_decay.exp()[:, None] * state + x
    y = (after * kernel.mixing.mT).sum(1, keepdim=True)
    return y, after if mask is None else torch.where(mask[..., None], after, state)


def _places(
    x: Tensor, chunk: int, cu_seqlens: Tensor | None, mask: Tensor | None
) -> tuple[_Places, int]:
    """Places of the tokens and chunks of a batch row, from shapes and on the device alone."""
    batch, seq, _ = x.shape
    token = torch.arange(batch * seq, device=x.device)
    real = torch.ones(batch, seq, dtype=torch.bool, device=x.device) if mask is None else mask
    # Real tokens of the batch row before each place.
    before = F.pad(real.to(torch.int64).cumsum(1), (1, 0))
    if cu_seqlens is None:
        chunks = (seq + chunk - 1) // chunk
        counts, bounds = before[:, -1], None
        first = torch.zeros_like(counts)
        slots = before[:, :-1] + torch.arange(batch, device=x.device)[:, None] * (chunks * chunk)
    else:
        ends = cu_seqlens.to(torch.int64)
        chunks = seq // chunk + ends.shape[0] - 1
        at_bounds = before[0, ends]
        counts = at_bounds.diff()
        filled = F.pad(((counts + chunk - 1) // chunk).cumsum(0), (1, 0))
        first, bounds = filled[:-1], F.pad(filled, (0, 1), value=chunks)
        row = torch.searchsorted(ends[1:], token, right=True)
        slots = (first[row] * chunk + before[0, :-1] - at_bounds[row])[None]
    total = batch * chunks * chunk
    slots = torch.where(real, slots, total).flatten()
    source = torch.full((total + 1,), batch * seq, device=x.device).scatter(0, slots, token)
    return _Places(source[:-1], slots, counts, first, bounds), chunks


def _causal(
    x: Tensor, kernel: Kernel, state: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y and the last state of every row; x is [batch, seq, channels] in the dtype of the sums."""
    batch, seq, channels = x.shape
    if seq == 0:
        return x, state
    if seq == 1 and cu_seqlens is None:
        return _step(x, kernel, state, mask)
    chunk = _SMALL_CHUNK if seq <= _SMALL_CHUNK else _CHUNK
    if cu_seqlens is None and mask is None:
        chunks = (seq + chunk - 1) // chunk
        parts = F.pad(x, (0, 0, 0, chunks * chunk - seq)).view(batch, chunks, chunk, channels)
        entering = _entering(parts, kernel, state, None)
        y = _outputs(parts, entering, kernel)
        rest = torch.full((batch,), seq - (chunks - 1) * chunk, device=x.device)
        after = _leaving(parts[:, -1], entering[:, -1], kernel, rest)
        return y.reshape(batch, chunks * chunk, channels)[:, :seq], after
    places, chunks = _places(x, chunk, cu_seqlens, mask)
    flat = F.pad(x.flatten(0, 1), (0, 0, 0, 1))
    parts = flat.index_select(0, places.source).view(batch, chunks, chunk, channels)
    entering = _entering(parts, kernel, state, places.bounds)
    y = _outputs(parts, entering, kernel)
    y = F.pad(y.flatten(0, 2), (0, 0, 0, 1)).index_select(0, places.slots).view_as(x)
    last = (places.counts - 1).clamp(min=0) // chunk
    row = torch.arange(state.shape[0], device=x.device) if cu_seqlens is None else 0
    # The first chunk of an empty row may be another's, or lie behind the last.
    where = (places.first + last).clamp(max=chunks - 1)
    after = _leaving(parts[row, where], entering[row, where], kernel, places.counts - last * chunk)
    return y, torch.where(places.counts[:, None, None] > 0, after, state)


def _outputs(parts: Tensor, entering: Tensor, kernel: Kernel) -> Tensor:
    """What a chunk hears from itself and from the state that enters it; one product a channel.

    Args:
        parts: [batch, chunks, chunk, channels].
        entering: [batch, chunks, exponents, channels].
        kernel: of the encoding.
    """
    step = torch.arange(parts.shape[2], device=parts.device)
    powers = (step[:, None] * kernel.log_decay).exp()
    distance = step[:, None] - step
    tau = (powers @ kernel.mixing.mT)[distance.clamp(min=0)]
    toeplitz = tau.masked_fill((distance < 0)[..., None], 0.0).permute(2, 0, 1)
    reach = kernel.mixing[:, None] * (powers * kernel.log_decay.exp())
    # As [channels, .., batch * chunks]. No einsum: with symbolic lengths it takes seconds to trace.
    batch, chunks, chunk, channels = parts.shape
    mine, before = (z.flatten(0, 1).permute(2, 1, 0) for z in (parts, entering))
    y = torch.baddbmm(torch.bmm(toeplitz, mine), reach, before)
    return y.permute(2, 1, 0).reshape(batch, chunks, chunk, channels)


def _entering(parts: Tensor, kernel: Kernel, state: Tensor, bounds: Tensor | None) -> Tensor:
    """The states that enter the chunks: the recurrence of the op, chunks in place of tokens."""
    chunk = parts.shape[2]
    left = chunk - 1 - torch.arange(chunk, device=parts.device)
    weights = (left * kernel.log_decay[:, None]).exp()
    batch, chunks = parts.shape[:2]
    added = torch.bmm(weights.expand(batch * chunks, -1, -1), parts.flatten(0, 1))
    # Channels are heads, too, as far as kernels need it that have no wider values.
    width = _head_width(added.shape[2])
    added = added.view(batch, chunks, added.shape[1] * added.shape[2] // width, width)
    ones = parts.new_ones(*added.shape[:3], 1)
    if bounds is not None:
        state = F.pad(state, (0, 0, 0, 0, 0, 1))
    leaving, _ = linear_attention(
        ones,
        ones,
        added,
        (chunk * kernel.log_decay).repeat_interleave(added.shape[2] // state.shape[1]),
        initial_state=state.reshape(-1, added.shape[2], 1, width),
        cu_seqlens=bounds,
    )
    leaving = leaving.view(batch, chunks, *state.shape[1:])
    if bounds is None:
        return torch.cat([state[:, None], leaving[:, :-1]], 1)
    before = F.pad(leaving, (0, 0, 0, 0, 1, 0))[:, :-1]
    token = torch.arange(parts.shape[1], device=parts.device)
    row = torch.searchsorted(bounds[1:], token, right=True)
    begins = bounds[row] == token
    return torch.where(begins[:, None, None], state[row][None], before)


def _head_width(channels: int) -> int:
    """The largest divisor of the channels that the kernels take as a value_dim."""
    return next(width for width in range(min(channels, 512), 0, -1) if channels % width == 0)


def _leaving(part: Tensor, entering: Tensor, kernel: Kernel, count: Tensor) -> Tensor:
    """The state after ``count`` tokens of a chunk, for each row: part is [rows, chunk, channels]."""
    step = torch.arange(part.shape[1], device=part.device)
    left = (count[:, None] - 1 - step)[..., None]
    weights = (left.clamp(min=0) * kernel.log_decay).exp().masked_fill(left < 0, 0.0)
    decay = (count[:, None] * kernel.log_decay).exp()[..., None]
    return decay * entering + weights.mT @ part
