"""Gates of layers, cosine doubling and the complex scan on a GPU against float64, at real sizes."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from kernel_cases import assert_same, no_synchronisation
from ops.gates.gate_cases import assert_same_or_close, weighted
from tolerances import (
    CUMULATIVE_SOFTMAX,
    EPS,
    FORGET_GATE,
    GATE_GRADIENT,
    GRADIENT,
    OUTPUT,
    assert_close,
)
from torch import Tensor

from transnormer.ops.gates import cumulative_softmax, forget_gate
from transnormer.ops.lrpe import lrpe
from transnormer.ops.scan import complex_scan

pytestmark = pytest.mark.gpu
GPU = "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
# What a token's own rounding leaves of a result in half precision.
ROUNDED = {BF16: EPS[BF16], FP16: EPS[FP16], FP32: CUMULATIVE_SOFTMAX}


def doubled(x: object) -> object:
    """The same in float64."""
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def run(op: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], form: str) -> list[Tensor]:
    """Results of op(*inputs, form) and the gradients of the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    found = op(*leaves, form)
    return [*(x.detach() for x in found), *torch.autograd.grad(weighted(found), leaves)]


def check(
    op: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    limits: dict[str, float],
) -> None:
    """The kernels against float64, twice with the same bits."""
    exact = run(op, [x.double() for x in inputs], "torch")
    actual = run(op, inputs, "auto")
    for (name, limit), x, y in zip(limits.items(), actual, exact, strict=True):
        assert_same_or_close(x, y, limit, name)
    for x, y in zip(actual, run(op, inputs, "triton"), strict=True):
        assert torch.equal(x, y)


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(1, 1024), (1000, 1024), (70_001, 768), (333, 100)])
def test_forget_gate(rows: int, width: int, dtype: torch.dtype) -> None:
    x = (6.0 * torch.randn(1, rows, 3 * width, device=GPU)).to(dtype)
    bound = torch.rand(width, device=GPU)
    bound[:4] = torch.tensor([1e-30, 0.5, 0.999, 1.0 - EPS[FP32]])

    def op(x: Tensor, bound: Tensor, form: str) -> tuple[Tensor, ...]:
        return forget_gate(x.chunk(3, -1)[2], bound, dtype=x.dtype, implementation=form)

    limits = {"log f": FORGET_GATE, "1 - f": max(EPS[dtype], FORGET_GATE)}
    check(op, (x, bound), limits | {"dz": GATE_GRADIENT[dtype], "d bound": GATE_GRADIENT[FP32]})


@pytest.mark.parametrize("bound", [None, 0.0, 1e-30, 0.3, 0.99, 0.999999], ids=str)
def test_forget_gates_keep_their_relative_precision(bound: float | None) -> None:
    z = torch.linspace(-80, 70, 200_001, device=GPU)[:, None]
    row = None if bound is None else torch.tensor([bound], device=GPU)
    exact = forget_gate(z.double(), None if row is None else row.double())
    for actual, wanted in zip(forget_gate(z, row), exact, strict=True):
        assert bool(((actual.double() / wanted - 1).abs() <= FORGET_GATE).all())


@DTYPES
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("seq", [1, 15, 16, 17, 1000, 4097, 50_000])
def test_cumulative_softmax(seq: int, copies: int, dtype: torch.dtype) -> None:
    logits = (4.0 * torch.randn(2, seq, 4, 128, device=GPU)).to(dtype)
    log_mass = torch.randn(2, 4, 128, device=GPU)
    log_mass[0] = -math.inf

    def op(logits: Tensor, log_mass: Tensor, form: str) -> tuple[Tensor, ...]:
        return cumulative_softmax(logits, log_mass, copies=copies, implementation=form)

    check(op, (logits, log_mass), softmax_limits(dtype))


def softmax_limits(dtype: torch.dtype) -> dict[str, float]:
    return {
        "log_decay": CUMULATIVE_SOFTMAX,
        "keys": ROUNDED[dtype],
        "log_mass": CUMULATIVE_SOFTMAX,
        "d logits": GATE_GRADIENT[dtype],
        "d log_mass": GATE_GRADIENT[FP32],
    }


@pytest.mark.parametrize("size", [0.0, 4.0, 400.0])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_cumulative_softmax_of_packed_sequences(masked: bool, size: float) -> None:
    seq, ends = 20_000, [0, 0, 1, 700, 701, 13_000, 19_983, 20_000, 20_000]
    bounds = torch.tensor(ends, device=GPU, dtype=torch.int32)
    logits = size * torch.randn(1, seq, 3, 100, device=GPU)
    log_mass = torch.randn(len(ends) - 1, 3, 100, device=GPU)
    log_mass[::2] = -math.inf
    mask = (torch.rand(1, seq, device=GPU) < 0.7) if masked else None
    if mask is not None:
        mask[:, 1:40] = mask[:, 19_983:] = False

    def op(logits: Tensor, log_mass: Tensor, form: str) -> tuple[Tensor, ...]:
        return cumulative_softmax(
            logits, log_mass, mask=mask, cu_seqlens=bounds, implementation=form
        )

    check(op, (logits, log_mass), softmax_limits(FP32))


@pytest.mark.parametrize("first", [0.0, 1.0])
def test_a_long_text_loses_no_mass(first: float) -> None:
    # Equal weights: after a million tokens each key is a millionth. A larger first one makes every
    # term of the sum a number that rounds the same way.
    logits = torch.zeros(1, 1 << 20, 1, 64, device=GPU)
    logits[:, 0] = first
    none = torch.full((1, 1, 64), -math.inf, device=GPU)
    _, keys, log_mass = cumulative_softmax(logits, none)
    mass = torch.arange(1 << 20, device=GPU, dtype=torch.float64) + math.exp(first)
    assert_close(keys[0, 1:, 0, 0].double() * mass[1:], torch.ones_like(mass[1:]),
                 limit=CUMULATIVE_SOFTMAX)  # fmt: skip
    assert_close(log_mass.flatten(), mass[-1].log().expand(64), limit=CUMULATIVE_SOFTMAX)


def test_a_gradient_fades_rightly_over_a_long_text() -> None:
    # The last mass is passed back by a factor a token, a million of them near 1.
    logits = torch.randn(1, 1_000_003, 1, 64, device=GPU, requires_grad=True)
    none = torch.full((1, 1, 64), -math.inf, device=GPU)
    (grad,) = torch.autograd.grad(cumulative_softmax(logits, none)[2].sum(), logits)
    assert_close(grad, logits.detach().double().softmax(1), limit=GATE_GRADIENT[FP32])


def test_what_is_no_number_shows() -> None:
    z = torch.randn(1, 5000, 1, 128, device=GPU)
    z[:, 3000, :, :64] = math.nan
    found = (*forget_gate(z, None), *cumulative_softmax(z, torch.zeros(1, 1, 128, device=GPU)))
    for x in found[:2]:
        assert torch.equal(x.isnan(), z.isnan())
    after = torch.arange(5000, device=GPU).view(1, -1, 1, 1) >= 3000
    for x in found[2:4]:
        assert torch.equal(x.isnan(), (after & (torch.arange(128, device=GPU) < 64)))


@DTYPES
@pytest.mark.parametrize(("seq", "start"), [(1, 7), (1000, 0), (1000, 4_000_000)], ids=str)
@pytest.mark.parametrize(("heads", "dim"), [(8, 128), (3, 20)], ids=str)
def test_lrpe(heads: int, dim: int, seq: int, start: int, dtype: torch.dtype) -> None:
    projection = torch.randn(2, seq, 2 * heads * dim, device=GPU).to(dtype)
    positions = torch.arange(start, start + seq, device=GPU).expand(2, -1)
    theta = 8.0 * torch.rand(heads, dim, device=GPU) - 4.0

    def op(projection: Tensor, theta: Tensor, form: str) -> tuple[Tensor, ...]:
        pair = tuple(x.unflatten(-1, (heads, dim)) for x in projection.chunk(2, -1))
        return lrpe(pair, positions, theta, implementation=form)

    one = {FP32: OUTPUT[FP32], BF16: EPS[BF16], FP16: EPS[FP16]}[dtype]
    limits = {"q": one, "k": one, "d projection": GATE_GRADIENT[dtype]}
    check(op, (projection, theta), limits | {"d theta": GATE_GRADIENT[FP32]})


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("seq", [2, 17, 1000, 30_000])
def test_complex_scan(seq: int, packed: bool) -> None:
    size, angle = torch.rand(2, 1, seq, 300, device=GPU)
    a = torch.stack([size * (6.3 * angle).cos(), size * (6.3 * angle).sin()], -1)
    bounds = torch.tensor([0, 0, seq // 3, seq], device=GPU) if packed else None
    state = torch.randn(3 if packed else 1, 300, 2, device=GPU)

    def op(a: Tensor, x: Tensor, state: Tensor, form: str) -> tuple[Tensor, ...]:
        return complex_scan(a, x, initial_state=state, cu_seqlens=bounds, implementation=form)

    limits = {"h": OUTPUT[FP32], "state": OUTPUT[FP32]}
    limits |= dict.fromkeys(("da", "dx", "d state"), GRADIENT[FP32])
    check(op, (a, torch.randn_like(a), state), limits)


def layer_ops(
    z: Tensor, bound: Tensor, log_mass: Tensor, positions: Tensor, theta: Tensor, bounds: Tensor
) -> tuple[Tensor, ...]:
    """All gates of one projection [1, seq, 4, 64]."""
    log_f, taken = forget_gate(z.flatten(2), bound, dtype=z.dtype)
    log_decay, keys, end = cumulative_softmax(z, log_mass, cu_seqlens=bounds)
    return log_f, taken, log_decay, end, *lrpe((z, keys), positions, theta)


def layer_inputs(seq: int) -> list[Tensor]:
    z = torch.randn(1, seq, 4, 64, device=GPU, dtype=BF16)
    log_mass, theta = torch.randn(3, 4, 64, device=GPU), torch.rand(4, 64, device=GPU)
    positions = torch.arange(seq, device=GPU).expand(1, -1)
    bounds = torch.tensor([0, seq // 5, seq // 2, seq], device=GPU)
    return [z, torch.rand(256, device=GPU), log_mass, positions, theta, bounds]


def layer_results(
    function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    found = function(*leaves)
    wanted = [x for x in leaves if x.requires_grad]
    return [*found, *torch.autograd.grad(weighted(found), wanted)]


def test_nothing_waits_for_the_device() -> None:
    inputs = layer_inputs(3000)
    layer_results(layer_ops, inputs)
    torch.cuda.synchronize()
    with no_synchronisation():
        layer_results(layer_ops, inputs)


def test_compiled_whole_for_any_length() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layer_ops, fullgraph=True, dynamic=True, backend="aot_eager")
    for seq in (300, 1111):
        inputs = layer_inputs(seq)
        assert_same(layer_results(compiled, inputs), layer_results(layer_ops, inputs))


def test_a_graph_replays_with_other_bounds() -> None:
    inputs = layer_inputs(2000)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer_ops(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = layer_ops(*inputs)
        inputs[0].copy_(torch.randn_like(inputs[0]))
        inputs[-1].copy_(torch.tensor([0, 0, 1999, 2000]))
        graph.replay()
        assert_same(found, layer_ops(*inputs))


def launches_of(function: Callable[[], object]) -> int:
    """Kernels of ours that a call launches."""
    from torch.profiler import ProfilerActivity, profile

    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as record:
        function()
        torch.cuda.synchronize()
    # torch's own reductions are cut by the size of their input.
    return sum(e.count for e in record.key_averages() if "_kernel" in e.key and "::" not in e.key)


def test_launches_do_not_grow_with_the_length() -> None:
    def counted(seq: int) -> tuple[int, ...]:
        inputs = layer_inputs(seq)
        a = torch.rand(1, seq, 64, 2, device=GPU) / 2

        def gates() -> object:
            return layer_results(layer_ops, inputs)

        return launches_of(gates), launches_of(lambda: complex_scan(a, a))

    assert counted(4096) == counted(65_536)
