"""Linear attentions with their decays, phases and gates as rows of eos: q, k and v in, arguments out.

Layout [batch, seq, heads, dim]. Each takes what the model's equation holds after its projections
and activations, unless its docstring says otherwise. The other rows are in ``rows_state_space``.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from transnormer.ops.checks import accumulation_dtype
from transnormer.ops.eos.row import EosRow
from transnormer.ops.logcumsumexp import logcumsumexp


def _by_key(x: Tensor) -> Tensor:
    """[batch, seq, heads, key_dim] or [heads, key_dim] as an o that is constant along value_dim."""
    return x[..., None] if x.dim() == 4 else x[None, None, ..., None]


def _by_head(x: Tensor) -> Tensor:
    """[heads] as an o."""
    return x.view(1, 1, -1, 1, 1)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> EosRow:
    """y_t = q_t sum_{s <= t} k_s v_s^T (Katharopoulos et al. 2020, arXiv:2006.16236, no denominator).

    q and k after their feature map.
    """
    return EosRow(i=v, e=k, s=q, o=1.0)


def tnl(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> EosRow:
    """A constant decay a head, log_decay [heads] (Qin et al. 2024, arXiv:2405.17381)."""
    return EosRow(i=v, e=k, s=q, log_o=_by_head(log_decay))


def retnet(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, theta: Tensor) -> EosRow:
    """Retention: pairs of channels turn with the position, a head decays (Sun et al. 2023,
    arXiv:2307.08621, equations 5 and 6, without scales and norm).

    With q_c, k_c the pairs as complex numbers, the score is
    Re(conj(q_c) k_c exp(-i theta (t - s))) = <R(t) q, R(s) k>. The sign of the phase belongs to the
    side of the conjugate: exp(+i theta) here is another model.

    Args:
        q, k: [batch, seq, heads, 2 pairs] before rotation; channels 2j and 2j + 1 are a pair.
        v: [batch, seq, heads, value_dim].
        log_decay: [heads].
        theta: [pairs] or [heads, pairs].
    """
    q, k = (torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) for x in (q, k))
    phase = _by_key(torch.atleast_2d(theta))
    return EosRow(i=v, e=k, s=q.conj(), log_o=torch.complex(*_pair(_by_head(log_decay), -phase)))


def _pair(real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors expanded to one shape, in the wider of float32 and float64."""
    dtype = accumulation_dtype(torch.promote_types(real.dtype, imag.dtype))
    real, imag = torch.broadcast_tensors(real.to(dtype), imag.to(dtype))
    return real, imag


def lrpe_cos(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, log_decay: Tensor | None = None
) -> EosRow:
    """Scores sum_j q_j k_j cos((t - s) theta_j): LRPE by cosine doubling (Qin et al. 2023,
    arXiv:2307.14995, section 3.1).

    theta is [heads, key_dim], log_decay [heads] or None.
    """
    phase = _by_key(theta)
    decay = torch.zeros_like(phase) if log_decay is None else _by_head(log_decay)
    return EosRow(i=v, e=k, s=q, log_o=torch.complex(*_pair(decay, phase)))


def cosformer(q: Tensor, k: Tensor, v: Tensor, max_length: int) -> EosRow:
    """Weights relu(q) . relu(k) cos(pi (t - s) / (2 M)), divided by their sum, at least 1e-6 (Qin et
    al. 2022, arXiv:2202.08791).

    A column of ones beside v carries the sum. q and k before relu; M = max_length is a constant of
    the model: taken from the input's length, a prefix would change with what follows it.
    """
    ones = torch.ones_like(v[..., :1])

    def divide(y: Tensor, _: Tensor) -> Tensor:
        return y[..., :-1] / y[..., -1:].clamp(min=1e-6)

    log_o = complex(0.0, math.pi / (2 * max_length))
    return EosRow(i=torch.cat([v, ones], -1), e=k.relu(), s=q.relu(), log_o=log_o, post=divide)


def cosformer2(q: Tensor, k: Tensor, v: Tensor, theta: Tensor) -> EosRow:
    """silu(q) and silu(k) with a learned phase a channel, no denominator (Shen et al. 2024,
    arXiv:2406.16690).

    q and k before silu; theta is [heads, key_dim] (0 in channels without a phase).
    """
    return lrpe_cos(F.silu(q), F.silu(k), v, theta)


def gla(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor) -> EosRow:
    """A gate a token and key channel, log_gate [batch, seq, heads, key_dim] (Yang et al. 2023,
    arXiv:2312.06635)."""
    return EosRow(i=v, e=k, s=q, log_o=_by_key(log_gate))


def gateloop(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, phase: Tensor) -> EosRow:
    """A complex gate exp(log_gate + i phase) a token and key channel (Katsch 2023,
    arXiv:2311.01927); log_gate and phase are [batch, seq, heads, key_dim]."""
    return EosRow(i=v, e=k, s=q, log_o=torch.complex(*_pair(_by_key(log_gate), _by_key(phase))))


def outer_gate(
    q: Tensor, k: Tensor, v: Tensor, log_key_gate: Tensor, log_value_gate: Tensor
) -> EosRow:
    """Gates on both sides of the memory, o_t = alpha_t beta_t^T (decaying fast weights, Mao 2022,
    arXiv:2210.04243, and the rows DUR and GFW of arXiv:2405.17383).

    log_key_gate is [batch, seq, heads, key_dim], log_value_gate [batch, seq, heads, value_dim].
    """
    return EosRow(i=v, e=k, s=q, log_o=log_key_gate[..., None] + log_value_gate[..., None, :])


def hgrn2(q: Tensor, v: Tensor, log_forget: Tensor) -> EosRow:
    """A forget gate f a key channel whose complement is the key (Qin et al. 2024, arXiv:2404.07904): S_t = Diag(f_t) S_{t-1} + (1 - f_t) v_t^T.

    log_forget is [batch, seq, heads, key_dim], with the lower bound in it; q is the output gate.
    """
    return gla(q, -log_forget.expm1().to(v.dtype), v, log_forget)


def hgrn1(c: Tensor, log_forget: Tensor, theta: Tensor) -> EosRow:
    """h_t = f_t e^{i theta} h_{t-1} + (1 - f_t) c_t a channel; y = Re(h) (Qin et al. 2023,
    arXiv:2311.04823). Pass -1j * c for Im(h).

    Args:
        c: complex, [batch, seq, heads, channels].
        log_forget: [batch, seq, heads, channels].
        theta: [heads, channels].
    """
    gate, phase = log_forget[..., None, :], theta[None, None, :, None]
    one = c.real.new_ones(1, 1, 1, 1)
    log_o = torch.complex(*_pair(gate, phase))
    return EosRow(i=-log_forget.expm1() * c, e=one, s=one, log_o=log_o)


def additive_gates(k: Tensor, log_mass: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The gates of a softmax over the past, from raw keys.

    z_t = log sum_{s <= t} exp(k_s); the weight of a token is exp(k_t - z_t), the decay of the others
    exp(z_{t-1} - z_t): at every token the weights sum to 1 (Qin et al. 2024, arXiv:2405.21022).

    Args:
        k: [batch, seq, heads, key_dim]; -inf is a token without weight (a pad).
        log_mass: z of what came before, [batch, heads, key_dim]; None or -inf is nothing.

    Returns:
        expand and log decay, as k, and the last z, all in float32 (float64 for float64 k).
    """
    k = k.to(accumulation_dtype(k.dtype))
    if log_mass is None:
        log_mass = torch.full_like(k[:, 0], -torch.inf)
    z = logcumsumexp(torch.cat([log_mass[:, None], k], 1))
    # k_t - z_{t-1}, of which both gates are a logistic function without cancellation. Nothing
    # after nothing is still nothing, though the difference is not a number.
    difference = torch.where(k == -torch.inf, -torch.inf, k - z[:, :-1])
    return torch.sigmoid(difference), F.logsigmoid(-difference), z[:, -1]


def lightnet(q: Tensor, k: Tensor, v: Tensor, log_mass: Tensor | None = None) -> EosRow:
    """Causal LightNet: memory of a softmax over the past, a key channel each (Qin et al. 2024,
    arXiv:2405.21022). q after silu, k raw; log_mass as ``additive_gates`` returns it.
    """
    expand, log_decay, _ = additive_gates(k, log_mass)
    return EosRow(i=v, e=expand.to(v.dtype), s=q, log_o=_by_key(log_decay))


def lightnet_bidirectional(q: Tensor, k: Tensor, v: Tensor) -> EosRow:
    """LightNet over a whole sequence: every token reads the last memory, softmax_seq(k)^T v, in one
    pass without order (Qin et al. 2024, arXiv:2405.21022)."""
    dtype = accumulation_dtype(k.dtype)
    weights = torch.softmax(k.to(dtype), 1).to(v.dtype)

    def read(y: Tensor, state: Tensor) -> Tensor:
        return torch.einsum("bthk,bhkv->bthv", q.to(dtype), state).to(y.dtype)

    return EosRow(i=v, e=weights, s=q, o=1.0, post=read)


def deltanet(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> EosRow:
    """The delta rule, o_t = I - beta_t k_t k_t^T as a matrix (Yang et al. 2024, arXiv:2406.06484): the old value of a key is removed before the new one is added.

    k is divided by its length first; beta is [batch, seq, heads].
    """
    k = F.normalize(k, dim=-1)
    written = beta[..., None] * k
    identity = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    o = identity - written[..., :, None] * k[..., None, :]
    return EosRow(i=v, e=written, s=q, o=o, psi="matmul")
