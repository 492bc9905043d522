"""State-space models, long convolutions and RWKV-4 as rows of eos.

Layout [batch, seq, heads, dim]; models of single channels have a head a channel and value_dim 1.
"""

import torch
from torch import Tensor

from transnormer.ops.checks import accumulation_dtype
from transnormer.ops.eos.call import COMPLEX_OF
from transnormer.ops.eos.row import EosRow


def _channels_out(y: Tensor, _: Tensor) -> Tensor:
    """[batch, seq, channels, 1] -> [batch, seq, channels]."""
    return y[..., 0]


def _constant(x: Tensor) -> Tensor:
    """[heads, key_dim] as a constant e or s."""
    return x[None, None]


def mamba(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> EosRow:
    """The selective scan S6: m_t = exp(delta_t A) m_{t-1} + B_t (delta_t u_t)^T, y_t = m_t^T C_t (Gu
    and Dao 2023, arXiv:2312.00752, algorithm 2); the skip D u, gate and convolution are outside.

    Args:
        u: [batch, seq, heads, value_dim]; one head is the published model.
        delta: step sizes after softplus, as u.
        a: [heads, key_dim, value_dim], negative.
        b, c: [batch, seq, heads, key_dim].
    """
    dtype = accumulation_dtype(delta.dtype)
    return EosRow(i=delta * u, e=b, s=c, log_o=delta.to(dtype)[..., None, :] * a.to(dtype))


def s4d(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> EosRow:
    """Diagonal state spaces, S4D and DSS, by zero-order hold (Gu et al. 2022, arXiv:2206.11893;
    Gupta et al. 2022, arXiv:2203.14343).

    x' = A x + B u, y = 2 Re(C x): one of each pair of conjugate poles is stored. The kernel is
    2 Re sum_k C_k B_k (exp(delta A_k) - 1) / A_k exp(j delta A_k).

    Args:
        u: real, [batch, seq, channels].
        delta: step sizes, [channels].
        a, b, c: complex, [channels, poles]; Re(a) < 0.
    """
    steps = delta[:, None] * a
    expand = b * torch.expm1(steps) / a
    return EosRow(
        i=u[..., None],
        e=_constant(expand),
        s=_constant(2.0 * c),
        log_o=steps[None, None, ..., None],
        post=_channels_out,
    )


def s4(
    u: Tensor, delta: Tensor, diagonal: Tensor, p: Tensor, q: Tensor, b: Tensor, c: Tensor
) -> EosRow:
    """S4: A = Diag(diagonal) - p q^*, by the bilinear rule, as one dense matrix a channel (Gu et al.
    2021, arXiv:2111.00396).

    A_ = (I - delta/2 A)^-1 (I + delta/2 A), B_ = (I - delta/2 A)^-1 delta B, y = Re(C x).

    Args:
        u: real, [batch, seq, channels].
        delta: [channels].
        diagonal, p, q, b, c: complex, [channels, poles].
    """
    identity = torch.eye(b.shape[-1], dtype=b.dtype, device=b.device)
    a = torch.diag_embed(diagonal) - p[..., :, None] * q.conj()[..., None, :]
    half = a * (delta / 2)[:, None, None]
    both = torch.cat([identity + half, (delta[:, None] * b)[..., None]], -1)
    discrete = torch.linalg.solve(identity - half, both)
    return EosRow(
        i=u[..., None],
        e=_constant(discrete[..., -1]),
        s=_constant(c),
        o=discrete[None, None, ..., :-1],
        psi="matmul",
        post=_channels_out,
    )


def s5(u: Tensor, a: Tensor, b: Tensor, c: Tensor) -> EosRow:
    """S5, many inputs and outputs of one state: x_t = A x_{t-1} + B u_t, y_t = Re(C x_t) (Smith et
    al. 2022, arXiv:2208.04933), A, B discretised already.

    A diagonal A (how S5 is computed) is a memory of key_dim 1 whose value_dim holds x and -i x, so
    that both parts of x leave eos and one state feeds all outputs. A dense one acts by psi
    "matmul" on a head for each output, since a head has one shrink vector.

    Args:
        u: real, [batch, seq, inputs].
        a: complex, [poles] or [poles, poles].
        b: complex, [poles, inputs].
        c: complex, [outputs, poles].
    """
    driven = (u.to(b.dtype) @ b.transpose(0, 1))[:, :, None]
    if a.dim() == 2:
        heads = c.shape[0]
        one = u.new_ones(1, 1, 1, 1).expand(*u.shape[:2], heads, 1)
        return EosRow(
            i=one, e=driven, s=_constant(c), o=a[None, None, None], psi="matmul", post=_channels_out
        )
    one = u.new_ones(1, 1, 1, 1)

    def read(y: Tensor, _: Tensor) -> Tensor:
        real, imag = y[:, :, 0].chunk(2, -1)
        return real @ c.real.transpose(0, 1) - imag @ c.imag.transpose(0, 1)

    factor = torch.cat([a, a]).view(1, 1, 1, 1, -1)
    return EosRow(i=torch.cat([driven, -1j * driven], -1), e=one, s=one, o=factor, post=read)


def rwkv4(k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor) -> EosRow:
    """RWKV-4's weighted average of values: exp(-(t - 1 - s) w + k_s) for s < t and exp(u + k_t) for
    the token itself (Peng et al. 2023, arXiv:2305.13048).

    Two memories of one entry a channel, numerator and denominator, side by side in value_dim; they
    are read one token late, and the token's own term is added. For whole sequences: the largest k
    of each channel is taken out of both, so that nothing overflows, and a state carries that scale.
    A convolution rounds relative to the largest term: for k that spread by more than a few units in
    float32 name implementation "scan".

    Args:
        k, v: [batch, seq, heads, channels].
        decay: w > 0, [heads, channels].
        bonus: u, [heads, channels].
    """
    weight = (k - k.detach().amax(1, keepdim=True)).exp()
    one = k.new_ones(1, 1, 1, 1)
    log_o = -torch.cat([decay, decay], -1)[None, None, :, None]

    def average(y: Tensor, _: Tensor) -> Tensor:
        past = torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1)
        numerator, denominator = past.chunk(2, -1)
        own = bonus.exp() * weight
        return (numerator + own * v) / (denominator + own)

    return EosRow(i=torch.cat([weight * v, weight], -1), e=one, s=one, log_o=log_o, post=average)


def tnn_exact(x: Tensor, coefficients: Tensor) -> EosRow:
    """A long convolution y_t = sum_{j < N} c_j x_{t-j} (TNN: Qin et al. 2023, arXiv:2305.04749) whose
    memory is the last N inputs, shifted by a matrix: exact at any length, N entries a channel.

    A definition, not a way to compute it: its state is as long as the kernel.

    Args:
        x: [batch, seq, heads, value_dim].
        coefficients: c, [heads, N].
    """
    size = coefficients.shape[1]
    shift = torch.diag(x.new_ones(size - 1), -1)
    first = x.new_zeros(1, 1, 1, size)
    first[..., 0] = 1.0
    return EosRow(i=x, e=first, s=_constant(coefficients), o=shift[None, None, None], psi="matmul")


def tnn_diagonal(x: Tensor, coefficients: Tensor, radius: float) -> EosRow:
    """The same convolution by N complex poles radius * exp(2 pi i j / N), for at most N tokens.

    The poles' powers are a Fourier basis times radius^t, so the shrink vector is the transform of
    c_t radius^-t: exact for lags below N, and radius^N times the kernel again at lag N. Rounding
    is amplified by radius^-N: choose radius = exp(-a / N) with a of about 1 to 3.

    Args:
        x: [batch, seq, heads, value_dim], seq at most N.
        coefficients: c, [heads, N].
        radius: in (0, 1].
    """
    size = coefficients.shape[1]
    if x.shape[1] > size:
        raise ValueError(f"seq is {x.shape[1]}; expected at most {size}, the length of the kernel")
    if not 0.0 < radius <= 1.0:
        raise ValueError(f"radius is {radius}; expected a number in (0, 1]")
    lags = torch.arange(size, dtype=torch.float64, device=x.device)
    scaled = coefficients.double() * radius**-lags
    dtype = COMPLEX_OF[accumulation_dtype(x.dtype)]
    shrink = torch.fft.fft(scaled).div(size).to(dtype)
    log_radius = torch.full_like(lags, radius).log()
    log_o = torch.complex(log_radius, lags * (2.0 * torch.pi / size)).view(1, 1, 1, -1, 1)
    return EosRow(i=x, e=x.new_ones(1, 1, 1, size), s=_constant(shrink), log_o=log_o)
