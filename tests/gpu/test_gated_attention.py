"""The kernels for gated decay on a GPU against float64, at real sizes and in memory full of NaN."""

from typing import NamedTuple

import pytest
import torch
from attention_cases import MIXED_DECAYS, Inputs
from kernel_cases import FORM, assert_same, fused, laid_out, no_synchronisation, results
from kernel_grid import (
    BF16,
    FP16,
    FP32,
    SHORT,
    Call,
    assert_rows_close,
    errors,
    packed_bounds,
    run,
)
from tolerances import (
    KERNEL_GATE_GRADIENT,
    KERNEL_GRADIENT,
    KERNEL_OUTPUT,
    KERNEL_STATE,
    assert_close,
)
from torch import Tensor

from transnormer.ops import linear_attention, linear_attention_step

pytestmark = pytest.mark.gpu
# The leaves belong to the stream that made them, on purpose.
OTHER_STREAMS = pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
GPU = "cuda"
CHUNK = 64


class Case(NamedTuple):
    """One call; every pair of dims, dtype, gate, packing and direction costs a compilation."""

    gate: str
    seq: int
    decay: str
    dims: tuple[int, int] = (128, 128)
    dtype: torch.dtype = BF16
    heads: tuple[int, int] = (4, 4)
    batch: int = 2
    packed: bool = False
    reverse: bool = False
    state: bool = True
    scale: float = 1.0

    @property
    def id(self) -> str:
        flags = [n for n in ("packed", "reverse") if getattr(self, n)]
        dims = f"{self.dims[0]}x{self.dims[1]}"
        return "-".join([self.gate, f"seq{self.seq}", self.decay, dims, SHORT[self.dtype], *flags])


def log_decay_of(kind: str, shape: tuple[int, ...]) -> Tensor:
    """Gates of one kind, float32 on the GPU; dim 1 is seq."""
    if kind == "mixed":
        # Ordinary values with extremes among them.
        values = torch.tensor(MIXED_DECAYS, device=GPU)
        drawn = values[torch.randint(len(values), shape, device=GPU)]
        ordinary = -torch.rand(shape, device=GPU).square()
        return torch.where(torch.rand(shape, device=GPU) < 0.1, drawn, ordinary)
    if kind == "runs":
        # Strong decay over some tokens, hardly any over the next.
        strong = torch.arange(shape[1], device=GPU) // 50 % 2 == 0
        strong = strong.view(-1, *[1] * (len(shape) - 2))
        return torch.where(strong, -30.0, -1e-3 * torch.rand(shape, device=GPU))
    if kind == "weak":
        return -1e-3 * torch.rand(shape, device=GPU)
    if kind == "any":
        # exp(0) to exp(-30), evenly in the logarithm.
        return -torch.logspace(-5, 1.477, 1000, device=GPU)[torch.randint(1000, shape, device=GPU)]
    return torch.full(shape, float(kind), device=GPU)


KINDS = ("mixed", "runs", "weak", "any", "0", "-1e-6", "-1.2", "-2.5", "-9", "-30", "-inf")
PLAIN = [Case(gate, 1000, kind) for gate in ("key", "token") for kind in KINDS]
# The same programs: other lengths compile nothing.
LENGTHS = [
    Case(gate, seq, "mixed", batch=1, heads=(8, 8))
    for gate in ("key", "token")
    for seq in (1, 15, 63, 64, 65, 127, 128, 129, 4097)
]
LONG = [
    Case("key", 65_536, "weak", batch=1, heads=(2, 2)),
    Case("token", 65_536, "weak", batch=1, heads=(2, 2)),
    # Segments of which the last has no token.
    Case("key", 16_385, "mixed", batch=1, heads=(1, 1)),
]
OTHER = [
    Case("key", 1000, "mixed", heads=(6, 2), reverse=True, scale=0.3),
    Case("token", 1000, "mixed", heads=(6, 2), packed=True, batch=1),
    Case("key", 5000, "any", heads=(4, 2), packed=True, batch=1),
    Case("key", 5000, "weak", heads=(2, 2), packed=True, reverse=True, batch=1, state=False),
    Case("token", 5000, "weak", heads=(4, 2), packed=True, reverse=True, batch=1, state=False),
    Case("token", 1000, "mixed", dtype=FP16, reverse=True),
    Case("token", 257, "mixed", (96, 192)),
    Case("key", 300, "any", (64, 64), FP16, state=False),
    Case("token", 300, "any", (64, 64), FP16),
    Case("key", 300, "-30", (64, 64), FP16, heads=(1, 1), batch=1),
    Case("key", 300, "any", (64, 64), FP32),
    Case("token", 300, "mixed", (64, 64), FP32),
    Case("key", 300, "mixed", (128, 128), FP32),
    Case("key", 257, "mixed", (36, 20)),
    Case("key", 257, "mixed", (20, 36)),
    Case("key", 257, "weak", (20, 36)),
    Case("key", 257, "weak", (16, 16)),
    Case("key", 300, "any", (64, 64)),
    Case("key", 300, "weak", (64, 64)),
    Case("key", 300, "weak", (64, 64), FP16),
    Case("key", 300, "mixed", (32, 64)),
    Case("key", 300, "weak", (64, 128)),
    Case("key", 300, "weak", (128, 64)),
    Case("key", 257, "mixed", (96, 192), FP16),
    Case("key", 257, "mixed", (256, 512)),
    Case("token", 257, "mixed", (256, 128), FP16),
    Case("key", 257, "mixed", (256, 64), FP32),
]


def make_call(case: Case) -> Call:
    """Unit-scale inputs of a case."""
    (key_dim, value_dim), (heads, kv_heads) = case.dims, case.heads
    bounds, rows = None, case.batch
    if case.packed:
        bounds = torch.tensor(packed_bounds(case.seq), dtype=torch.int32, device=GPU)
        rows = len(bounds) - 1

    def draw(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(shape, device=GPU).to(dtype)

    shape = (case.batch, case.seq, kv_heads, key_dim)
    states = (rows, kv_heads, key_dim, value_dim)
    return Call(
        q=draw(case.batch, case.seq, heads, key_dim),
        k=draw(*shape),
        v=draw(case.batch, case.seq, kv_heads, value_dim),
        log_decay=log_decay_of(case.decay, shape if case.gate == "key" else shape[:3]),
        initial_state=draw(*states, dtype=FP32) if case.state else None,
        cu_seqlens=bounds,
        do=draw(case.batch, case.seq, heads, value_dim),
        d_final=draw(*states, dtype=FP32),
    )


def poison() -> None:
    """Leave memory full of NaN to the allocator."""
    blocks = [torch.full((1 << 18,), float("nan"), device=GPU) for _ in range(64)]
    blocks.append(torch.full((1 << 27,), float("nan"), device=GPU))
    del blocks


def assert_results_close(actual: dict[str, Tensor], exact: dict[str, Tensor], case: Case) -> None:
    """Every result of a call within the limits of its inputs' dtype."""
    assert actual.keys() == exact.keys()
    for name, x in actual.items():
        assert bool(torch.isfinite(x).all()), f"{name} has NaN or infinite entries"
        assert x.shape == exact[name].shape, f"{name} has shape {x.shape}"
        state = "state" in name
        assert x.dtype == (FP32 if state or "log_decay" in name else case.dtype)
        limit = (KERNEL_GRADIENT if "gradient" in name else KERNEL_OUTPUT)[case.dtype]
        if name == "gradient of log_decay":
            # Over tokens and keys of each head; a scalar gate's over the heads too: one token's is
            # one number, which random signs may make small while its error stays.
            dims = (1, 3) if x.dim() == 4 else (1, 2)
            error, limit = errors(x, exact[name], dims), KERNEL_GATE_GRADIENT[case.dtype]
            assert error.max() <= limit, f"{name}: errors {error.tolist()} exceed {limit:.3g}"
        elif state:
            limit = limit if "gradient" in name else KERNEL_STATE[case.dtype]
            error = errors(x, exact[name], (2, 3))
            assert error.max() <= limit, f"{name}: error {error.max().item():.3g} of {limit:.3g}"
        else:
            assert_rows_close(x, exact[name], limit, CHUNK, name)


@pytest.mark.parametrize("case", [*PLAIN, *LENGTHS, *LONG, *OTHER], ids=lambda case: case.id)
def test_grid(case: Case) -> None:
    call = make_call(case)
    arguments = {"scale": case.scale, "reverse": case.reverse}
    doubled = Call(*(x if x is None or not x.is_floating_point() else x.double() for x in call))
    exact = run(doubled, "chunked", **arguments)
    poison()
    assert_results_close(run(call, FORM, **arguments), exact, case)


def make(gate: str, seq: int, dtype: torch.dtype = BF16, rows: int = 1) -> Inputs:
    """Inputs of batch 1 and 2 heads of 128 with an initial state, of programs compiled above."""
    q, k, v = (torch.randn(1, seq, 2, 128, device=GPU).to(dtype) for _ in range(3))
    log_decay = log_decay_of("mixed", k.shape if gate == "key" else k.shape[:3])
    return Inputs(q, k, v, log_decay, torch.randn(rows, 2, 128, 128, device=GPU))


GATES = pytest.mark.parametrize("gate", ["key", "token"])


@GATES
def test_runs_repeat_bit_for_bit_in_any_memory(gate: str) -> None:
    inputs = make(gate, 16_384)
    first = results(inputs)
    for _ in range(3):
        poison()
        assert_same(results(inputs), first)


@GATES
def test_decoding_equals_prefill(gate: str) -> None:
    inputs = make(gate, 200)
    whole, whole_state = linear_attention(
        *inputs[:4], initial_state=inputs.initial_state, implementation=FORM
    )
    state, outputs = inputs.initial_state, []
    for t in range(200):
        o, state = linear_attention_step(*(x[:, t] for x in inputs[:4]), state)
        outputs.append(o)
    assert_close(torch.stack(outputs, 1), whole, limit=2 * KERNEL_OUTPUT[BF16])
    assert_close(state, whole_state, limit=KERNEL_STATE[BF16])


def test_strides_change_nothing() -> None:
    inputs = make("key", 300)
    sliced = Inputs(*fused(*inputs[:3]), laid_out(inputs.log_decay, "surrounded"), inputs[4])
    assert_same(results(sliced), results(inputs))


@OTHER_STREAMS
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@GATES
def test_nothing_waits_for_the_device(gate: str, packed: bool) -> None:
    bounds = torch.tensor([0, 0, 700, 701, 5000], device=GPU) if packed else None
    leaves = make(gate, 5000, rows=4 if packed else 1).leaves()
    grads = None
    for turn in range(2):
        o, state = linear_attention(
            *leaves[:4], initial_state=leaves[4], cu_seqlens=bounds, implementation=FORM
        )
        grads = grads or (torch.randn_like(o), torch.randn_like(state))
        torch.autograd.grad((o, state), leaves, grads)
        if turn == 0:
            torch.cuda.synchronize()
            continue
    with no_synchronisation():
        o, state = linear_attention(
            *leaves[:4], initial_state=leaves[4], cu_seqlens=bounds, implementation=FORM
        )
        torch.autograd.grad((o, state), leaves, grads)


@OTHER_STREAMS
@GATES
def test_a_graph_of_forward_and_backward_replays(gate: str) -> None:
    leaves = make(gate, 5000).leaves()

    def work() -> list[Tensor]:
        outputs = linear_attention(
            *leaves[:4], initial_state=leaves.initial_state, implementation=FORM
        )
        grads = [torch.ones_like(x) for x in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for _ in range(2):
        with torch.no_grad():
            for x in leaves[:3]:
                x.copy_(torch.randn_like(x))
        graph.replay()
        assert_same([x.detach() for x in captured], [x.detach() for x in work()])


def test_log_decay_gradient_does_not_lose_its_digits_with_length() -> None:
    for seq in (1024, 65_536):
        case = Case("key", seq, "weak", batch=1, heads=(2, 2), state=False)
        call = make_call(case)
        doubled = Call(*(x if x is None or not x.is_floating_point() else x.double() for x in call))
        exact, actual = run(doubled, "chunked"), run(call, FORM)
        name = "gradient of log_decay"
        assert_close(actual[name], exact[name], limit=KERNEL_GATE_GRADIENT[BF16], name=f"at {seq}")
