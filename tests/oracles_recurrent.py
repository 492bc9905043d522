"""Literal float64 forms of RetNet, HGRN2 and HGRN: slow, short, independent of the package.

Layouts as in ``oracles``. Sources: Sun et al. 2023 (arXiv:2307.08621) and torchscale; Qin et al. 2024
(arXiv:2404.07904); Qin et al. 2023 (arXiv:2311.04823) and their released code.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from oracles import srms_norm
from torch import Tensor


def retnet_gamma(heads: int) -> Tensor:
    """1 - 2^(-5 - h)."""
    return torch.tensor([1 - 2.0 ** (-5 - h) for h in range(heads)], dtype=torch.float64)


def retnet_gamma_of_experiments(heads: int) -> Tensor:
    """1 - exp(linspace(log 1/32, log 1/512, heads))."""
    steps = torch.linspace(math.log(1 / 32), math.log(1 / 512), heads, dtype=torch.float64)
    return 1 - steps.exp()


def turned(x: Tensor, start: int = 0) -> Tensor:
    """Channel pairs (2i, 2i + 1) as complex numbers times exp(i n theta_i), theta to 1/10000."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    count = pairs.shape[-1]
    theta = torch.pow(10000.0, -torch.linspace(0, 1, count, dtype=torch.float64))
    index = torch.arange(start, start + x.shape[1], dtype=torch.float64)
    turn = torch.polar(torch.ones(()).double(), index[:, None, None] * theta)
    return torch.view_as_real(pairs * turn).flatten(-2)


def retention_inputs(
    x: Tensor, weights: Mapping[str, Tensor], heads: int, start: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Turned q and k, k scaled by key_dim^-1/2, and v; [batch, seq, heads, dim] each."""
    q, k, v = (
        (x.double() @ weights[f"{name}_proj.weight"].double().T).unflatten(-1, (heads, -1))
        for name in "qkv"
    )
    return turned(q, start), turned(k / k.shape[-1] ** 0.5, start), v


def retention_output(x: Tensor, o: Tensor, weights: Mapping[str, Tensor], eps: float) -> Tensor:
    """(swish(x W_g) * merged normed heads) W_o."""
    gate = F.silu(x.double() @ weights["gate_proj.weight"].double().T)
    return (gate * srms_norm(o, eps).flatten(2)) @ weights["out_proj.weight"].double().T


def decay_matrix(gamma: Tensor, seq: int) -> Tensor:
    """gamma_h^(n - m) for n >= m, else 0, [heads, seq, seq]."""
    distance = torch.arange(seq)[:, None] - torch.arange(seq)
    powers = gamma.double()[:, None, None] ** distance.clamp(min=0)
    return torch.where(distance >= 0, powers, 0.0)


def parallel_retention(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
    """(Q K^T * D) V."""
    scores = torch.einsum("bnhk,bmhk->bhnm", q, k) * decay_matrix(gamma, q.shape[1]).to(q.dtype)
    return torch.einsum("bhnm,bmhv->bnhv", scores, v)


def torchscale_retention(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
    """The same with torchscale's factors: D rows / sqrt(sum), scores / max(|sum of scores|, 1)."""
    decays = decay_matrix(gamma, q.shape[1])
    decays = (decays / decays.sum(-1, keepdim=True).sqrt()).to(q.dtype)
    scores = torch.einsum("bnhk,bmhk->bhnm", q, k) * decays
    scores = scores / scores.sum(-1, keepdim=True).abs().clamp(1, 5e4)
    return torch.einsum("bhnm,bmhv->bnhv", scores, v)


def chunk_retention(
    q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, state: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Chunks: the parallel form inside, R_i = K^T (V * zeta) + gamma^B R_{i-1} between (eq. 7)."""
    outputs = []
    for q_i, k_i, v_i in zip(q.split(size, 1), k.split(size, 1), v.split(size, 1)):
        length = q_i.shape[1]
        steps = torch.arange(length, dtype=torch.float64)[:, None]
        cross = gamma ** (steps + 1)
        inner = parallel_retention(q_i, k_i, v_i, gamma)
        outputs.append(inner + torch.einsum("bnhk,bhkv->bnhv", q_i * cross[..., None], state))
        weighted = v_i * (gamma ** (length - 1 - steps))[..., None]
        state = torch.einsum("bnhk,bnhv->bhkv", k_i, weighted) + (
            gamma[:, None, None] ** length * state
        )
    return torch.cat(outputs, 1), state


def recurrent_retention(
    q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """S_n = gamma S_{n-1} + K_n^T V_n; O_n = Q_n S_n."""
    outputs = []
    for n in range(q.shape[1]):
        state = gamma[:, None, None] * state + k[:, n, :, :, None] * v[:, n, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, n], state))
    return torch.stack(outputs, 1), state


def lower_bounds(gamma: Tensor, rule: str) -> Tensor:
    """Layer l: the sum of softmax rows 1..l ("cumulative") or 0..l-1 ("exclusive")."""
    shares = gamma.double().softmax(0)
    if rule == "cumulative":
        return shares.cumsum(0) - shares[0]
    return torch.stack([shares[:i].sum(0) for i in range(len(shares))])


def hgrn2(
    x: Tensor,
    weights: Mapping[str, Tensor],
    bound: Tensor | float,
    head_dim: int,
    q_activation: str = "silu",
    v_activation: str = "none",
    *,
    both_ways: bool = False,
) -> Tensor:
    """HGRN2's layer up to the norm, without biases: merged heads, [batch, seq, width]."""
    v, q, z = (x.double() @ weights["in_proj.weight"].double().T).chunk(3, -1)
    f = bound + (1 - bound) * z.sigmoid()
    q = F.silu(q) if q_activation == "silu" else q.sigmoid()
    v = F.silu(v) if v_activation == "silu" else v
    q, v, f = (y.unflatten(-1, (-1, head_dim)) for y in (q, v, f))

    def scan(order: range) -> list[Tensor]:
        state, states = torch.zeros(*f.shape[:1], *f.shape[2:], head_dim).double(), {}
        for t in order:
            state = f[:, t, :, :, None] * state + (1 - f[:, t])[..., None] * v[:, t, :, None, :]
            states[t] = state
        return [states[t] for t in sorted(states)]

    states = torch.stack(scan(range(x.shape[1])), 1)
    if both_ways:
        states = states + torch.stack(scan(range(x.shape[1] - 1, -1, -1)), 1)
    return torch.einsum("bthk,bthkv->bthv", q, states).flatten(2)


def hgrn1(
    x: Tensor,
    weights: Mapping[str, Tensor],
    bound: Tensor | float,
    state: Tensor,
    *,
    both_ways: bool = False,
) -> tuple[Tensor, Tensor]:
    """HGRN's recurrence in complex numbers, without biases: h [batch, seq, width] and the last h."""
    c = F.silu(x.double() @ weights["input_proj.weight"].double().T).unflatten(-1, (-1, 2))
    c = torch.view_as_complex(c.contiguous())
    f = bound + (1 - bound) * (x.double() @ weights["forget_proj.weight"].double().T).sigmoid()
    turn = torch.exp(1j * weights["phase.theta"].double())

    def scan(order: range, h: Tensor) -> dict[int, Tensor]:
        found = {}
        for t in order:
            h = f[:, t] * turn * h + (1 - f[:, t]) * c[:, t]
            found[t] = h
        return found

    ahead = scan(range(x.shape[1]), state)
    h = torch.stack([ahead[t] for t in range(x.shape[1])], 1)
    if both_ways:
        back = scan(range(x.shape[1] - 1, -1, -1), torch.zeros_like(state))
        h = h + torch.stack([back[t] for t in range(x.shape[1])], 1)
    return h, ahead[x.shape[1] - 1]
