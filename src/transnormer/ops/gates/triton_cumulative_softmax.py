"""The gates of a softmax over the tokens so far, in three launches each way whatever the length.

    z_t = log(exp(z_{t-1}) + exp(x_t));    key_t = exp(x_t - z_t);    g_t = log_decay_t = z_{t-1} - z_t

per channel, z_0 of a sequence from its initial mass. A sum of exponentials is a pair (peak, sum),
sum = exp(z - peak): peaks are inputs, exactly, and sums are relative to the peak, so that nothing
overflows and nothing is lost by adding up rounded logarithms. A token with x at -1e30 or less, or a
masked one, is none: key 0, log_decay 0.

With d_t the gradient of x_t - z_{t-1} through the token's own two results and r_t what comes back
to z_t from later ones, both a share of what comes in, no difference of sums:

    d_t = key_t (dkey_t exp(g_t) - dg_t);    r_{t-1} = exp(g_t) r_t - d_t;    dx_t = d_t + key_t r_t

a reverse recurrence with factors of at most 1. It needs log_decay alone: key_t = 1 - exp(g_t).

Both run in units, segments of a sequence (``scan_units``): sums of every unit; a scan over units;
results of every unit from what enters it. Sequences of one unit take the last launch alone. A
program has W channels of one unit and goes through its tokens; nothing crosses threads.
Source: Qin et al. 2024, arXiv:2405.21022, section 3.

Layout: x [B, T, C] with any row strides; all else contiguous. Legend: T tokens of a row, L tokens a
unit, C channels, W a block of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from transnormer.ops.linear_attention.triton_runtime import block, device_of, launch
from transnormer.ops.linear_attention.triton_units import find_unit, unit_table
from transnormer.ops.scan_units import Units, units_of
from transnormer.ops.triton_math import decay_and_rest, exp_precise, log_quotient

# Arguments stand in lines as they belong together.
# fmt: off


# Stands for log 0 where -inf minus -inf would be NaN; exp of it is 0.
_EMPTY: tl.constexpr = tl.constexpr(-1e30)


@triton.jit
def load_logit(x, at, mask, token, live, MASKED: tl.constexpr):
    """A token's logits in float32; those of a masked token stand for none."""
    value = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    value = tl.where(value < _EMPTY, _EMPTY, value)
    if MASKED:
        value = tl.where(tl.load(mask + token) != 0, value, _EMPTY)
    return value


@triton.jit
def place_of_program(C, W: tl.constexpr):
    """(unit or sequence, channels, where its numbers are in a tensor [units or sequences, C])."""
    blocks = (C + W - 1) // W
    unit, channels = tl.program_id(0) // blocks, tl.program_id(0) % blocks * W + tl.arange(0, W)
    return unit, channels, unit.to(tl.int64) * C + channels


@triton.jit
def gate_places(channels, K: tl.constexpr, COPIES: tl.constexpr):
    """Where among a token's log decays those of its channels are, of COPIES of a head's K in turn."""
    if COPIES == 1:
        return channels
    return channels // K * (COPIES * K) + channels % K


@triton.jit
def load_mass(log_mass, at, live):
    """A log mass as (peak, sum)."""
    value = tl.load(log_mass + at, mask=live, other=0.0)
    return tl.where(value < _EMPTY, _EMPTY, value), tl.where(value <= _EMPTY, 0.0, 1.0)


@triton.jit
def store_mass(log_mass, at, peak, total, live):
    """The log of (peak, sum); -inf of no mass."""
    some = total > 0.0
    value = peak + tl.log(tl.where(some, total, 1.0))
    tl.store(log_mass + at, tl.where(some | (total != total), value, -float("inf")), mask=live)


@triton.jit
def compensated(total, lost, part):
    """total + part and what rounding adds to it (Kahan 1965).

    Many equal terms are rounded the same way, which adds up: over 500 of them to 1e-5.
    """
    part -= lost
    after = total + part
    return after, (after - total) - part


@triton.jit
def add_mass(peak, total, lost, other_peak, other_total):
    """The sum of two; ``lost`` is what rounding has added to the first."""
    difference = other_peak - peak
    fade = tl.exp(-tl.abs(difference))
    rises = difference > 0.0
    kept, other = tl.where(rises, fade, 1.0), tl.where(rises, 1.0, fade)
    total, lost = compensated(total * kept, lost * kept, other_total * other)
    return tl.maximum(peak, other_peak, propagate_nan=tl.PropagateNan.ALL), total, lost


@triton.jit(do_not_specialize=["T", "L", "SEGMENTS"])
def mass_kernel(
    x, mask, table, peaks, totals, x_batch, x_token, T, L, SEGMENTS, C,
    W: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr, STAGES: tl.constexpr,
):
    """(peak, sum) of every unit, float32 [units, C] each."""
    unit, channels, at_unit = place_of_program(C, W)
    sequence, row, start, length, first, final = find_unit(unit, table, T, L, SEGMENTS, PACKED)
    if sequence < 0:
        return
    live = channels < C
    x += row * x_batch + start * x_token + channels
    token, step = row * T + start, tl.cast(x_token, tl.int64)
    peak, total = tl.full([W], _EMPTY, tl.float32), tl.zeros([W], tl.float32)
    lost = tl.zeros([W], tl.float32)
    for t in tl.range(0, length.to(tl.int32), num_stages=STAGES):
        value = load_logit(x, t * step, mask, token + t, live, MASKED)
        some = tl.where(value <= _EMPTY, 0.0, 1.0)
        peak, total, lost = add_mass(peak, total, lost, value, some)
    tl.store(peaks + at_unit, peak, mask=live)
    tl.store(totals + at_unit, total, mask=live)


@triton.jit
def units_of_sequence(n, first_unit, SEGMENTS, PACKED: tl.constexpr):
    """First unit of a sequence and the one after its last."""
    if PACKED:
        return tl.load(first_unit + n), tl.load(first_unit + n + 1)
    return n.to(tl.int64) * SEGMENTS, n.to(tl.int64) * SEGMENTS + SEGMENTS


@triton.jit(do_not_specialize=["SEGMENTS"])
def mass_scan_kernel(
    peaks, totals, start, first_unit, SEGMENTS, C,
    W: tl.constexpr, PACKED: tl.constexpr, STAGES: tl.constexpr,
):
    """In place of each unit's (peak, sum) that of all tokens before it."""
    n, channels, at_sequence = place_of_program(C, W)
    live = channels < C
    begin, end = units_of_sequence(n, first_unit, SEGMENTS, PACKED)
    peak, total = load_mass(start, at_sequence, live)
    lost = tl.zeros([W], tl.float32)
    for i in tl.range(0, (end - begin).to(tl.int32), num_stages=STAGES):
        at = (begin + i) * C + channels
        own_peak = tl.load(peaks + at, mask=live, other=_EMPTY)
        own_total = tl.load(totals + at, mask=live, other=0.0)
        tl.store(peaks + at, peak, mask=live)
        tl.store(totals + at, total, mask=live)
        peak, total, lost = add_mass(peak, total, lost, own_peak, own_total)


@triton.jit(do_not_specialize=["T", "L", "SEGMENTS"])
def cumulative_softmax_kernel(
    x, mask, table, peaks, totals, start_mass, log_decay, keys, end_mass, x_batch, x_token,
    T, L, SEGMENTS, C,
    W: tl.constexpr, K: tl.constexpr, COPIES: tl.constexpr, MASKED: tl.constexpr,
    PACKED: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr,
):
    """Keys and log decays of a unit, and the mass after a sequence's last one.

    WHOLE: every sequence is one unit, which begins with the mass that it starts from.
    """
    unit, channels, at_unit = place_of_program(C, W)
    sequence, row, start, length, first, final = find_unit(unit, table, T, L, SEGMENTS, PACKED)
    if sequence < 0:
        return
    live = channels < C
    gates = gate_places(channels, K, COPIES)
    if WHOLE:
        peak, total = load_mass(start_mass, sequence * C + channels, live)
    else:
        peak = tl.load(peaks + at_unit, mask=live, other=_EMPTY)
        total = tl.load(totals + at_unit, mask=live, other=0.0)
    x += row * x_batch + start * x_token + channels
    token, step = row * T + start, tl.cast(x_token, tl.int64)
    lost = tl.zeros([W], tl.float32)
    for t in tl.range(0, length.to(tl.int32), num_stages=STAGES):
        value = load_logit(x, t * step, mask, token + t, live, MASKED)
        difference = value - peak
        rises = difference > 0.0
        fade = exp_precise(-tl.abs(difference))
        own = tl.where(rises, 1.0, tl.where(value <= _EMPTY, 0.0, fade))
        kept = tl.where(rises, fade, 1.0)
        before = total * kept
        after, lost = compensated(before, lost * kept, own)
        # log(before / after) from the smaller share; where the token has the larger one, the
        # quotient of the shares is total exp(-difference), though before itself may be 0.
        less = tl.minimum(own, before, propagate_nan=tl.PropagateNan.ALL)
        more = tl.maximum(own, before, propagate_nan=tl.PropagateNan.ALL)
        some = total > 0.0
        behind = tl.where(some, tl.log(tl.where(some, total, 1.0)) - difference, -float("inf"))
        behind = tl.where(own > before, behind, 0.0)
        gate = behind - log_quotient(less, tl.where(more == 0.0, 1.0, more))
        to = (token + t) * (C * COPIES) + gates
        tl.store(log_decay + to, gate, mask=live)
        if COPIES == 2:
            tl.store(log_decay + to + K, gate, mask=live)
        key = own / tl.where(after == 0.0, 1.0, after)
        tl.store(keys + (token + t) * C + channels, key.to(keys.dtype.element_ty), mask=live)
        peak, total = tl.maximum(peak, value, propagate_nan=tl.PropagateNan.ALL), after
    if final:
        store_mass(end_mass, sequence * C + channels, peak, total, live)


@triton.jit
def token_gradient(
    log_decay, d_log, d_keys, token, channels, gates, C, live, K: tl.constexpr, COPIES: tl.constexpr
):
    """g, the key, and d of a token; ``gates`` are the places of the channels' log decays."""
    at = token * (C * COPIES) + gates
    gate = tl.load(log_decay + at, mask=live, other=0.0)
    decay, key = decay_and_rest(gate)
    d_gate = tl.load(d_log + at, mask=live, other=0.0)
    if COPIES == 2:
        d_gate += tl.load(d_log + at + K, mask=live, other=0.0)
    grad = tl.load(d_keys + token * C + channels, mask=live, other=0.0).to(tl.float32) * decay
    return gate, decay, key, key * (grad - d_gate)


@triton.jit
def faded(r, decay, key):
    """decay * r. Near 1 a rounded decay is off the same way at many tokens, r - key r is not."""
    return tl.where(key < 0.4, r - key * r, decay * r)


@triton.jit(do_not_specialize=["T", "L", "SEGMENTS"])
def gradient_sums_kernel(
    log_decay, d_log, d_keys, table, factors, sums, T, L, SEGMENTS, C,
    W: tl.constexpr, K: tl.constexpr, COPIES: tl.constexpr, PACKED: tl.constexpr, STAGES: tl.constexpr,
):
    """What a unit makes of r: r before it = exp(factor) r behind it + sum; float32 [units, C] each."""
    unit, channels, at_unit = place_of_program(C, W)
    sequence, row, start, length, first, final = find_unit(unit, table, T, L, SEGMENTS, PACKED)
    if sequence < 0:
        return
    live = channels < C
    gates, last = gate_places(channels, K, COPIES), row * T + start + length - 1
    factor, r = tl.zeros([W], tl.float32), tl.zeros([W], tl.float32)
    lost = tl.zeros([W], tl.float32)
    for t in tl.range(0, length.to(tl.int32), num_stages=STAGES):
        gate, decay, key, d = token_gradient(
            log_decay, d_log, d_keys, last - t, channels, gates, C, live, K, COPIES
        )
        r = faded(r, decay, key) - d
        # Decay below exp(-10,000) is none, also that of -inf.
        factor, lost = compensated(factor, lost, tl.where(gate < -1e4, -1e4, gate))
    tl.store(factors + at_unit, factor, mask=live)
    tl.store(sums + at_unit, r, mask=live)


@triton.jit(do_not_specialize=["SEGMENTS"])
def gradient_scan_kernel(
    factors, sums, d_end, first_unit, SEGMENTS, C,
    W: tl.constexpr, PACKED: tl.constexpr, STAGES: tl.constexpr,
):
    """In place of each unit's sum the r behind it."""
    n, channels, at_sequence = place_of_program(C, W)
    live = channels < C
    begin, end = units_of_sequence(n, first_unit, SEGMENTS, PACKED)
    r = tl.load(d_end + at_sequence, mask=live, other=0.0)
    for i in tl.range(0, (end - begin).to(tl.int32), num_stages=STAGES):
        at = (end - 1 - i) * C + channels
        decay, key = decay_and_rest(tl.load(factors + at, mask=live, other=0.0))
        own = tl.load(sums + at, mask=live, other=0.0)
        tl.store(sums + at, r, mask=live)
        r = faded(r, decay, key) + own


@triton.jit(do_not_specialize=["T", "L", "SEGMENTS"])
def cumulative_softmax_gradient_kernel(
    log_decay, d_log, d_keys, table, behind, d_end, start_mass, dx, d_start, T, L, SEGMENTS, C,
    W: tl.constexpr, K: tl.constexpr, COPIES: tl.constexpr, PACKED: tl.constexpr,
    WHOLE: tl.constexpr, STAGES: tl.constexpr,
):
    """dx of a unit, and the gradient of the mass that a sequence starts from."""
    unit, channels, at_unit = place_of_program(C, W)
    sequence, row, start, length, first, final = find_unit(unit, table, T, L, SEGMENTS, PACKED)
    if sequence < 0:
        return
    live = channels < C
    if WHOLE:
        r = tl.load(d_end + sequence * C + channels, mask=live, other=0.0)
    else:
        r = tl.load(behind + at_unit, mask=live, other=0.0)
    gates, last = gate_places(channels, K, COPIES), row * T + start + length - 1
    for t in tl.range(0, length.to(tl.int32), num_stages=STAGES):
        gate, decay, key, d = token_gradient(
            log_decay, d_log, d_keys, last - t, channels, gates, C, live, K, COPIES
        )
        at = (last - t) * C + channels
        tl.store(dx + at, (d + key * r).to(dx.dtype.element_ty), mask=live)
        r = faded(r, decay, key) - d
    if first:
        # No mass at all cannot change: its logarithm has no gradient.
        mass = tl.load(start_mass + sequence * C + channels, mask=live, other=0.0)
        r = tl.where(mass > _EMPTY, r, 0.0)
        tl.store(d_start + sequence * C + channels, r, mask=live)


class Call:
    """How a call is cut, and what its kernels share."""

    def __init__(self, x: Tensor, cu_seqlens: Tensor | None) -> None:
        self.units: Units = units_of(x.shape[0], x.shape[1], x.shape[2], cu_seqlens)
        self.packed = cu_seqlens is not None
        self.table, self.first_unit = None, None
        if cu_seqlens is not None:
            self.table, self.first_unit = unit_table(cu_seqlens, x.shape[1], self.units.length)
        self.cut = (x.shape[1], self.units.length, self.units.segments, x.shape[2])
        self.device = x.device

    def sums(self) -> tuple[Tensor, Tensor]:
        """Two numbers a unit and channel."""
        shape = (self.units.count, self.cut[3])
        first, second = (
            torch.empty(shape, dtype=torch.float32, device=self.device) for _ in range(2)
        )
        return first, second

    def run_units(self, kernel, *arguments, **constants) -> None:
        """Launch a kernel over units; T, L, SEGMENTS and C follow its own arguments."""
        launch(
            kernel, self.units.count * self.units.blocks, *arguments, *self.cut,
            W=self.units.width, PACKED=self.packed, STAGES=3, num_warps=self.units.warps, **constants,
        )

    def run_scan(self, kernel, first: Tensor, second: Tensor, seed: Tensor) -> None:
        """Launch a scan over the units of every sequence."""
        channels = self.cut[3]
        launch(
            kernel, self.units.sequences * -(-channels // 32), first, second, seed, self.first_unit,
            self.units.segments, channels, W=32, PACKED=self.packed, STAGES=6, num_warps=1,
        )


def forward(
    x: Tensor, log_mass: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, key_dim: int,
    copies: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """log_decay, float32, and keys, in x's dtype, [batch, seq, channels]; the masses at the ends.

    log_decay is copies times as wide: each head's key_dim channels, so many times.
    """
    batch, seq, channels = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    log_mass, mask, cu_seqlens = log_mass.contiguous(), block(mask), block(cu_seqlens)
    log_decay = torch.empty(
        batch, seq, copies * channels, dtype=torch.float32, device=x.device
    )
    keys = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    end_mass = torch.empty_like(log_mass)
    strides, masked = x.stride()[:2], mask is not None
    with device_of(x):
        call = Call(x, cu_seqlens)
        peaks, totals, whole = None, None, call.units.whole
        if not whole:
            peaks, totals = call.sums()
            call.run_units(mass_kernel, x, mask, call.table, peaks, totals, *strides, MASKED=masked)
            call.run_scan(mass_scan_kernel, peaks, totals, log_mass)
        call.run_units(
            cumulative_softmax_kernel, x, mask, call.table, peaks, totals, log_mass, log_decay, keys,
            end_mass, *strides, K=key_dim, COPIES=copies, MASKED=masked, WHOLE=whole,
        )
    return log_decay, keys, end_mass


def backward(
    d_log: Tensor,
    d_keys: Tensor,
    d_end: Tensor,
    log_decay: Tensor,
    log_mass: Tensor,
    cu_seqlens: Tensor | None,
    key_dim: int,
    copies: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of x, in d_keys' dtype, and of the masses at the start, float32."""
    d_log, d_keys, d_end = d_log.contiguous(), d_keys.contiguous(), d_end.contiguous()
    log_mass, cu_seqlens = log_mass.contiguous(), block(cu_seqlens)
    dx, d_start = torch.empty_like(d_keys), torch.empty_like(log_mass)
    with device_of(d_log):
        call, form = Call(d_keys, cu_seqlens), {"K": key_dim, "COPIES": copies}
        sums, whole = None, call.units.whole
        if not whole:
            factors, sums = call.sums()
            call.run_units(
                gradient_sums_kernel, log_decay, d_log, d_keys, call.table, factors, sums, **form
            )
            call.run_scan(gradient_scan_kernel, factors, sums, d_end)
        call.run_units(
            cumulative_softmax_gradient_kernel, log_decay, d_log, d_keys, call.table, sums, d_end,
            log_mass, dx, d_start, WHOLE=whole, **form,
        )
    return dx, d_start
