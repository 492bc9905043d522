"""The accuracy grid of the constant-decay kernels, and how one case of it is measured.

The truth is this package's chunked form in float64 on the rounded inputs: it is fast on a GPU, and
other tests hold it against the literal recurrence (1e-12; gradients 1e-11).
"""

import random
from itertools import combinations
from typing import NamedTuple

import torch
from attention_cases import MIXED_DECAYS
from kernel_cases import FORM
from tolerances import (
    KERNEL_GRADIENT,
    KERNEL_LOG_DECAY,
    KERNEL_OUTPUT,
    KERNEL_STATE,
    KERNEL_UNEVEN,
)
from torch import Tensor

from transnormer.ops import linear_attention
from transnormer.ops.decay import tnl_log_decay

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHORT = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
# Heads are judged one by one from so many rows on. Of fewer, one row may make the whole, and a row
# is a few numbers, of which the largest error is 2.4 times the mean one.
ROWS_OF_A_HEAD = 64
# Below this a float32 result may be flushed to 0.
NOTHING = 1e-30
TYPICAL = "typical size of log_decay's gradient"

FACTORS = {
    "dims": (
        (16, 20),
        (20, 16),
        (32, 64),
        (64, 32),
        (64, 64),
        (96, 128),
        (128, 96),
        (128, 128),
        (128, 428),
        (192, 192),
        (256, 512),
        (256, 128),
    ),
    "seq": (1, 15, 63, 64, 65, 127, 128, 257, 1000, 4097),
    "dtype": (BF16, FP16, FP32),
    "decay": ("none", "zero", "1e-6", "first", "last", "paper", "30", "inf", "mixed"),
    "layout": ("few", "many", "packed"),
    "reverse": (False, True),
    "grouped": (False, True),
    "state": (False, True),
}
# Their pairs are too many to have all.
PARTLY = ({"dims", "seq"}, {"dims", "decay"}, {"seq", "decay"})
GRID_SIZE = 72


class Case(NamedTuple):
    """One call; heads 0 is a number that ``layout`` asks for."""

    dims: tuple[int, int]
    seq: int
    dtype: torch.dtype = BF16
    decay: str = "first"
    layout: str = "few"
    reverse: bool = False
    grouped: bool = False
    state: bool = False
    heads: int = 0
    scale: float = 1.0

    @property
    def id(self) -> str:
        flags = [n for n in ("reverse", "grouped", "state") if getattr(self, n)]
        dims = f"{self.dims[0]}x{self.dims[1]}"
        parts = [f"seq{self.seq}", dims, SHORT[self.dtype], self.decay, self.layout, *flags]
        return "-".join(parts)

    @property
    def rows(self) -> tuple[int, int]:
        """batch and heads."""
        if self.heads:
            return 1, self.heads
        if self.layout == "many" and self.seq <= 1000:
            return 2, 72
        return 1, 10


def pairs_of(case: Case) -> set[tuple]:
    """The pairs of settings that a case tries together."""
    return {((a, getattr(case, a)), (b, getattr(case, b))) for a, b in combinations(FACTORS, 2)}


def covering_grid() -> list[Case]:
    """Cases that try settings in pairs, chosen greedily and the same at every call.

    Each is the best of some random ones: first by how many new pairs of those that must be there
    it brings, then by the other new pairs.
    """
    generator, seen, cases = random.Random(0), set(), []

    def gain(case: Case) -> tuple[int, int]:
        new = pairs_of(case) - seen
        partly = sum({a[0], b[0]} in PARTLY for a, b in new)
        return len(new) - partly, partly

    for _ in range(GRID_SIZE):
        drawn = [
            Case(**{name: generator.choice(levels) for name, levels in FACTORS.items()})
            for _ in range(200)
        ]
        cases.append(max(drawn, key=gain))
        seen.update(pairs_of(cases[-1]))
    return cases


def packed_bounds(seq: int) -> list[int]:
    """Bounds with empty sequences at both ends and inside, and sequences of one token."""
    inner = [0, 1, seq // 3, seq // 3, seq // 3 + 1, seq // 2 + 7, seq]
    return [0, *sorted(min(x, seq) for x in inner), seq]


def log_decay_of(kind: str, heads: int) -> Tensor | None:
    """[heads] float32."""
    if kind == "none":
        return None
    if kind in ("first", "last"):
        return tnl_log_decay(heads, 0 if kind == "first" else 23, 24)
    if kind == "paper":
        # 8 h / 32 of a model with 32 heads: 0 to 7.75.
        return -torch.linspace(0, 7.75, heads)
    if kind == "mixed":
        return torch.tensor(MIXED_DECAYS)[torch.arange(heads) % len(MIXED_DECAYS)]
    return torch.full((heads,), -{"zero": 0.0, "1e-6": 1e-6, "30": 30.0, "inf": float("inf")}[kind])


class Call(NamedTuple):
    """Tensors of a call and the gradients of its results."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    do: Tensor
    d_final: Tensor


def make_call(case: Case, device: str) -> Call:
    """Unit-scale inputs of a case."""
    (batch, heads), (key_dim, value_dim) = case.rows, case.dims
    kv_heads = heads // 2 if case.grouped else heads
    bounds, rows = None, batch
    if case.layout == "packed":
        bounds = torch.tensor(packed_bounds(case.seq), dtype=torch.int32, device=device)
        rows = len(bounds) - 1

    def draw(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    log_decay = log_decay_of(case.decay, kv_heads)
    state_shape = (rows, kv_heads, key_dim, value_dim)
    return Call(
        q=draw(batch, case.seq, heads, key_dim),
        k=draw(batch, case.seq, kv_heads, key_dim),
        v=draw(batch, case.seq, kv_heads, value_dim),
        log_decay=None if log_decay is None else log_decay.to(device),
        initial_state=draw(*state_shape, dtype=FP32) if case.state else None,
        cu_seqlens=bounds,
        do=draw(batch, case.seq, heads, value_dim),
        d_final=draw(*state_shape, dtype=FP32),
    )


def run(call: Call, form: str, **kwargs: object) -> dict[str, Tensor]:
    """Outputs, final state and gradients by name."""
    inputs = {name: getattr(call, name) for name in Call._fields[:5]}
    leaves = {n: x.detach().requires_grad_() for n, x in inputs.items() if x is not None}
    outputs = linear_attention(**leaves, cu_seqlens=call.cu_seqlens, implementation=form, **kwargs)
    grads = torch.autograd.grad(outputs, list(leaves.values()), (call.do, call.d_final))
    named = {f"gradient of {name}": grad for name, grad in zip(leaves, grads)}
    return {"o": outputs[0].detach(), "final_state": outputs[1].detach(), **named}


def exact_results(call: Call, **kwargs: object) -> dict[str, Tensor]:
    """The same in float64, and the typical size of log_decay's gradient."""
    doubled = [x if x is None or not x.is_floating_point() else x.double() for x in call]
    call = Call(*doubled)
    exact = run(call, "chunked", **kwargs)
    if call.log_decay is not None:
        exact[TYPICAL] = typical_decay_gradient(call, exact, **kwargs)
    return exact


def typical_decay_gradient(call: Call, exact: dict[str, Tensor], **kwargs: object) -> Tensor:
    """Root mean square of log_decay's gradient over standard normal gradients of the results.

    It is the norm of the results' derivatives by log_decay, here a difference quotient; [kv_heads].
    """
    assert call.log_decay is not None
    # The step changes no product of decays by more than a 10,000th; it goes down, since up is
    # not allowed.
    step = 1e-4 / call.k.shape[1]
    with torch.no_grad():
        o, state = linear_attention(
            *call[:3],
            call.log_decay - step,
            initial_state=call.initial_state,
            cu_seqlens=call.cu_seqlens,
            implementation="chunked",
            **kwargs,
        )
    squares = (o - exact["o"]).square().sum((0, 1, 3)).unflatten(0, (call.k.shape[2], -1)).sum(1)
    return (squares + (state - exact["final_state"]).square().sum((0, 2, 3))).sqrt() / step


def errors(actual: Tensor, exact: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Relative Frobenius errors over ``dims``."""
    difference = (actual.double() - exact).square().sum(dims).sqrt()
    return difference / exact.square().sum(dims).sqrt().clamp(min=NOTHING)


def edges(seq: int, segment: int) -> dict[str, list[int]]:
    """Rows where kernels go wrong first, in groups of at least four."""
    groups = {"the first rows": list(range(8)), "the tail": list(range(seq - 16, seq))}
    for name, size in (("chunk boundaries", 64), ("segment boundaries", segment)):
        near = [t for t in range(size - 2, seq) if (t + 2) % size < 4]
        groups[name] = near if len(near) >= 4 else []
    return {name: rows for name, rows in groups.items() if rows}


def segment_of(call: Call) -> int:
    """Tokens of the segments that the kernels choose."""
    from transnormer.ops.linear_attention import constant_decay

    batch, seq = call.k.shape[:2]
    sequences = None if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    return constant_decay.plan(batch, seq, call.q.shape[2], call.k.device, sequences).length


def assert_rows_close(actual: Tensor, exact: Tensor, limit: float, segment: int, name: str) -> None:
    """Every (batch, head) of [batch, seq, heads, dim] within the limit, and even along seq."""
    seq = exact.shape[1]
    if seq < ROWS_OF_A_HEAD:
        error = errors(actual, exact, (0, 1, 2, 3)).item()
        assert error <= limit, f"{name}: error {error:.3g} exceeds {limit:.3g}"
        return
    whole = errors(actual, exact, (1, 3))
    assert whole.max() <= limit, f"{name}: errors of heads {whole.tolist()} exceed {limit:.3g}"
    # A whole far below its limit is luck; twice the limit's half is no unevenness.
    even = KERNEL_UNEVEN * whole.clamp(min=limit / KERNEL_UNEVEN)
    for place, rows in edges(seq, segment).items():
        index = torch.tensor(rows, device=exact.device)
        part = errors(actual[:, index], exact[:, index], (1, 3))
        message = f"{name}: errors {part.tolist()} at {place}, {whole.tolist()} of all rows"
        assert bool((part <= even).all()), message


def assert_decay_close(actual: Tensor, exact: Tensor, typical: Tensor, limit: float) -> None:
    """The gradient of a constant log_decay over all heads, [kv_heads]."""
    # One number a head: where it comes out small by chance, its error does not.
    size = max(exact.norm().item(), typical.norm().item(), NOTHING)
    error = (actual.double() - exact).norm().item() / size
    assert error <= limit, f"gradient of log_decay: error {error:.3g} exceeds {limit:.3g}"


def assert_results_close(
    actual: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype, segment: int
) -> None:
    """Every result of a call within the limits of its inputs' dtype."""
    assert actual.keys() == exact.keys() - {TYPICAL}
    for name, x in actual.items():
        assert bool(torch.isfinite(x).all()), f"{name} has NaN or infinite entries"
        state = "state" in name or "log_decay" in name
        assert x.dtype == (FP32 if state else dtype), f"{name} is {x.dtype}"
        if name == "gradient of log_decay":
            assert_decay_close(x, exact[name], exact[TYPICAL], KERNEL_LOG_DECAY[dtype])
            continue
        assert x.shape == exact[name].shape, f"{name} has shape {x.shape}"
        limit = (KERNEL_GRADIENT if "gradient" in name else KERNEL_OUTPUT)[dtype]
        if not state:
            assert_rows_close(x, exact[name], limit, segment, name)
            continue
        limit = limit if "gradient" in name else KERNEL_STATE[dtype]
        error = errors(x, exact[name], (2, 3))
        assert error.max() <= limit, f"{name}: error {error.max().item():.3g} exceeds {limit:.3g}"


def check(case: Case, device: str) -> None:
    """Run a case by the kernels and hold every result against float64."""
    call = make_call(case, device)
    arguments = {"scale": case.scale, "reverse": case.reverse}
    actual = run(call, FORM, **arguments)
    assert_results_close(actual, exact_results(call, **arguments), case.dtype, segment_of(call))
