"""Expand, oscillate, shrink (EOS): the contract, its checks and the choice of an implementation.

One op for linear recurrences with a matrix memory, the frame of Qin et al. 2024 (LCSM,
arXiv:2405.17383). ``rows`` and ``rows_state_space`` hold the known models as its arguments.
"""

import math
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from transnormer.ops import checks
from transnormer.ops.dispatch import Implementation, choose
from transnormer.ops.eos.attention import attention, doubled
from transnormer.ops.eos.call import COMPLEX_OF, REAL_OF, Call, varies
from transnormer.ops.eos.convolution import convolution
from transnormer.ops.eos.reference import recurrence
from transnormer.ops.eos.scan import scan

__all__ = ["eos"]

Oscillation: TypeAlias = Tensor | complex | float | None


class Request(NamedTuple):
    """What an implementation may refuse on."""

    psi: str
    seq: int
    constant: bool  # e, s and o do not vary along seq
    is_complex: bool
    bounded: bool  # |o| <= 1 is known: log_o, no oscillation, or a number
    value_varies: bool  # o varies along value_dim
    value_dim: int
    named: bool


def _refusal(name: str, why: str) -> Exception:
    return NotImplementedError(f"implementation {name!r}: {why}; use 'auto' or 'scan'")


def _needs_constants(request: Request) -> Exception | None:
    if not request.constant:
        return _refusal("convolution", "e, s or o varies along seq; expected seq dim 1 or stride 0")
    if request.seq == 1 and not request.named:
        return _refusal("convolution", "seq is 1, a step")
    return None


def _why_not_attention(name: str, request: Request) -> Exception | None:
    if request.psi == "matmul":
        return _refusal(name, "psi is 'matmul'; expected 'diag'")
    if request.value_varies:
        return _refusal(name, "o varies along value_dim; expected value dim 1 or stride 0")
    if request.value_dim == 1 and not request.named:
        # Scores of two tokens serve all values of a head; a single one is had cheaper without.
        return _refusal(name, "value_dim is 1")
    if not request.bounded:
        return _refusal(name, "o is a tensor, of any size; expected log_o")
    return None


def _needs_real_decay(request: Request) -> Exception | None:
    if request.is_complex:
        return _refusal("attention", "o is complex; expected a real one")
    return _why_not_attention("attention", request)


def _needs_complex_decay(request: Request) -> Exception | None:
    if not request.is_complex:
        return _refusal("doubled", "o is real; expected a complex one")
    return _why_not_attention("doubled", request)


# The first automatic row that does not refuse runs.
IMPLEMENTATIONS = (
    Implementation("convolution", _needs_constants, convolution),
    Implementation("attention", _needs_real_decay, attention),
    Implementation("doubled", _needs_complex_decay, doubled),
    Implementation("scan", lambda _: None, scan),
    Implementation("reference", lambda _: None, recurrence, False),
)


def _check_dtype(name: str, x: Tensor, i: Tensor) -> None:
    """e and s: i's dtype, or complex with the precision of the sums."""
    output = REAL_OF.get(i.dtype, i.dtype)
    legal = (output, COMPLEX_OF[checks.accumulation_dtype(output)])
    if x.dtype not in legal:
        raise TypeError(f"{name} is {x.dtype}; expected {legal[0]} or {legal[1]}, as i; convert it")
    if x.device != i.device:
        raise ValueError(f"{name} is on {x.device}; expected {i.device}, the device of i; move it")


def _check_broadcast(name: str, x: Tensor, shape: tuple[int, ...], dims: str) -> None:
    """x broadcasts to shape, dim by dim."""
    if x.dim() != len(shape) or any(n not in (1, m) for n, m in zip(x.shape, shape)):
        named = ", ".join(f"{d} {n}" for d, n in zip(dims.split(), shape))
        raise ValueError(
            f"{name} has shape {list(x.shape)}; expected {list(shape)} or 1 in any place ({named})"
        )


def _check_inputs(i: Tensor, e: Tensor, s: Tensor) -> None:
    checks.check_rank("i", i, "batch seq heads value_dim")
    checks.check_rank("e", e, "batch seq heads key_dim")
    for name, size in zip(("batch", "heads", "value_dim"), (i.shape[0], *i.shape[2:])):
        if size == 0:
            raise ValueError(f"{name} is 0; expected at least 1")
    if e.shape[3] == 0:
        raise ValueError("key_dim is 0; expected at least 1")
    for name, x in (("e", e), ("s", s)):
        _check_dtype(name, x, i)
        dims = "batch seq heads key_dim"
        _check_broadcast(name, x, (*i.shape[:3], e.shape[3]), dims)
        if x.shape[3] != e.shape[3]:
            raise ValueError(f"key_dim of s is {x.shape[3]}; expected e's, which is {e.shape[3]}")


def _check_oscillation(name: str, x: Tensor, i: Tensor, keys: int, psi: str) -> Tensor:
    """A tensor o or log_o, checked, as rank 5."""
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"{name} is {x.dtype}; expected a floating or complex dtype")
    if x.device != i.device:
        raise ValueError(f"{name} is on {x.device}; expected {i.device}, the device of i; move it")
    if x.dim() == 0:
        x = x.view(1, 1, 1, 1, 1)
    batch, seq, heads, values = i.shape
    if psi == "matmul":
        dims = "batch seq heads key_dim key_dim"
        _check_broadcast(name, x, (batch, seq, heads, keys, keys), dims)
        if x.shape[3:] != (keys, keys):
            raise ValueError(f"{name} ends in {list(x.shape[3:])}; expected [{keys}, {keys}]")
    else:
        dims = "batch seq heads key_dim value_dim"
        _check_broadcast(name, x, (batch, seq, heads, keys, values), dims)
    if name == "log_o":
        real = x.real if x.is_complex() else x
        if checks.values_are_visible(x) and not bool((real <= 0).all()):
            what = "NaN" if bool(real.isnan().any()) else f"real part {float(real.max())}"
            raise ValueError(f"log_o holds {what}; expected real parts <= 0, since o is exp(log_o)")
    return x


def _number_as_log(name: str, x: complex | float) -> complex | float | None:
    """A number o or log_o as log_o; None where |o| > 1, or where a real o is below 0."""
    if isinstance(x, bool) or not isinstance(x, int | float | complex):
        raise TypeError(f"{name} is {x!r}; expected a tensor or a number")
    if name == "log_o":
        if not complex(x).real <= 0:
            raise ValueError(f"log_o is {x!r}; expected a real part <= 0, since o is exp(log_o)")
        return x
    if isinstance(x, complex):
        if x == 0:
            return complex(-math.inf, 0.0)
        # cmath.log puts numbers of modulus 1 above 0, and compilers do not know it.
        size = math.hypot(x.real, x.imag)
        return complex(math.log(size), math.atan2(x.imag, x.real)) if size <= 1 else None
    if not 0 <= x <= 1:
        return None
    return math.log(x) if x else -math.inf


def _oscillation(
    o: Oscillation, log_o: Oscillation, i: Tensor, keys: int, psi: str
) -> tuple[Tensor | None, Tensor | None, bool, str]:
    """o, log_o, whether the oscillation is complex, and psi; o = 1 is None, None."""
    if (o is None) == (log_o is None):
        given = "neither" if o is None else "both"
        raise ValueError(f"of o and log_o {given} is given; expected one; o=1.0 never forgets")
    name, x = ("o", o) if o is not None else ("log_o", log_o)
    scalar = not isinstance(x, Tensor) or x.dim() == 0
    if psi == "matmul" and name == "log_o" and not scalar:
        raise ValueError("log_o is given with psi 'matmul'; expected o, the matrices themselves")
    # A number is that multiple of the identity.
    psi = "diag" if scalar else psi
    dtype = checks.accumulation_dtype(REAL_OF.get(i.dtype, i.dtype))
    if isinstance(x, Tensor):
        x = _check_oscillation(name, x, i, keys, psi)
        return (x, None, x.is_complex(), psi) if name == "o" else (None, x, x.is_complex(), psi)
    assert x is not None
    is_complex = isinstance(x, complex)
    log = _number_as_log(name, x)
    if log == 0 and not is_complex:
        return None, None, False, psi
    dtype = COMPLEX_OF[dtype] if is_complex else dtype
    value = torch.full((1,) * 5, x if log is None else log, dtype=dtype, device=i.device)
    return (value, None, is_complex, psi) if log is None else (None, value, is_complex, psi)


def eos(
    i: Tensor,
    e: Tensor,
    s: Tensor,
    o: Oscillation = None,
    *,
    log_o: Oscillation = None,
    psi: Literal["diag", "matmul"] = "diag",
    state: Tensor | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Expand, oscillate, shrink: a linear recurrence with a matrix memory, its state returned.

    m_t = psi(o_t, m_{t-1}) + e_t i_t^T;  y_t = Re(m_t^T s_t), where psi is the product of entries
    ("diag") or of matrices ("matmul"). No conjugate is taken. Sums and state are float32 (float64
    for float64 inputs) or the complex dtype of that precision. Differentiable in every tensor.
    Under autocast real i, e and s are cast (beside a complex i none is), the others are not.
    Source: Qin et al. 2024 (LCSM), arXiv:2405.17383.

    Args:
        i: inputs, [batch, seq, heads, value_dim], float64, float32, bfloat16, float16 or complex.
        e: expand vectors, [batch, seq, heads, key_dim] in i's dtype or complex64 (complex128 with
            float64); batch, seq and heads may be 1, which means constant there, as stride 0 does.
        s: shrink vectors, as e.
        o: a number, a tensor of rank 0, or one of rank 5 that broadcasts to
            [batch, seq, heads, key_dim, value_dim] ("matmul": [..., key_dim, key_dim]); real or
            complex. Complex i, e or s need a complex o (1.0 + 0.0j).
        log_o: instead of o, for o = exp(log_o), e.g. -a + i theta: real part at most 0, -inf is
            legal. The form for training: only with it are o's bounds known, which the fast
            implementations need (numbers are taken either way).
        psi: "diag" or "matmul"; for a scalar o the two are one.
        state: memory before the first token, [batch, heads, key_dim, value_dim], complex exactly
            when o is. None is zero.
        implementation: "auto" takes the first that can run: "convolution" (FFT; e, s and o constant
            along seq), "attention" (real log_o, constant along value_dim: ``linear_attention``,
            constant or gated), "doubled" (the same for complex log_o, over 2 key_dim real
            channels), "scan" (anything, chunk by chunk). "reference" is token by token.

    Returns:
        y, [batch, seq, heads, value_dim] in i's dtype (its real one), and the state after the last
        token.

    Raises:
        ValueError: a shape, device, unknown name, both or neither of o and log_o, or (CPU, eager) a
            log_o that is NaN or has a positive real part.
        TypeError: a dtype; complex inputs or state with a real o.
        NotImplementedError: the named implementation cannot run; says why.
    """
    for name, x in (("i", i), ("e", e), ("s", s)):
        checks.check_tensor(name, x)
    if i.dtype not in REAL_OF:
        checks.check_float("i", i)
    if checks.is_autocast_enabled(i.device.type) and not i.is_complex():
        i, e, s = (x if x.is_complex() else x.to(checks.autocast_dtype(x)) for x in (i, e, s))
    _check_inputs(i, e, s)
    if psi not in ("diag", "matmul"):
        raise ValueError(f"psi is {psi!r}; expected 'diag' or 'matmul'")
    checks.check_tensor("state", state, optional=True)
    o, log_o, is_complex, kind = _oscillation(o, log_o, i, e.shape[3], psi)
    call = Call(i, e, s, o, log_o, kind, state, is_complex)
    if not is_complex and (i.is_complex() or e.is_complex() or s.is_complex()):
        raise TypeError("o is real and i, e or s complex; expected a complex o; e.g. o=1.0 + 0.0j")
    if state is not None:
        shape = (i.shape[0], i.shape[2], e.shape[3], i.shape[3])
        checks.check_shape("state", state, shape, "batch heads key_dim value_dim")
        checks.check_same("state", state, call.state_dtype, i.device, "the sums")
    if i.shape[1] == 0:
        return i.real.to(call.output_dtype) if i.is_complex() else i, call.initial_state()
    x = log_o if o is None else o
    request = Request(
        psi=kind,
        seq=i.shape[1],
        constant=not (varies(e, 1) or varies(s, 1) or (x is not None and varies(x, 1))),
        is_complex=is_complex,
        bounded=o is None,
        value_varies=x is not None and kind == "diag" and varies(x, 4),
        value_dim=i.shape[3],
        named=implementation != "auto",
    )
    row = choose("eos", IMPLEMENTATIONS, request, implementation)
    with checks.no_autocast(i.device.type):
        return row.run(call)
