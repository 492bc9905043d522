"""The constant-decay kernels among graphs, compilers, autocast and memory budgets on a GPU."""

import pytest
import torch
from attention_cases import Inputs
from kernel_cases import (
    FORM,
    OP,
    assert_same,
    fused,
    gradients_of,
    no_synchronisation,
    results,
)
from kernel_grid import BF16
from tolerances import KERNEL_OUTPUT, assert_close
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from transnormer.ops import linear_attention

pytestmark = pytest.mark.gpu
GPU = "cuda"
# The leaves belong to the stream that made them, on purpose.
OTHER_STREAMS = pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])


def make(
    seq: int, heads: int = 4, dim: int = 64, dtype: torch.dtype = BF16, rows: int = 1
) -> Inputs:
    """Unit-scale inputs of batch 1 with slow and fast heads and initial states."""
    q, k, v = (torch.randn(1, seq, heads, dim, device=GPU).to(dtype) for _ in range(3))
    log_decay = -torch.logspace(-4, 0.5, heads, device=GPU)
    return Inputs(q, k, v, log_decay, torch.randn(rows, heads, dim, dim, device=GPU))


def attend(q, k, v, log_decay, state=None, cu_seqlens=None):
    return linear_attention(
        q, k, v, log_decay, initial_state=state, cu_seqlens=cu_seqlens, implementation=FORM
    )


def bounds_of(seq: int, packed: bool) -> Tensor | None:
    return torch.tensor([0, 1, 1, seq // 2, seq], device=GPU) if packed else None


@OTHER_STREAMS
@PACKED
@pytest.mark.parametrize("seq", [300, 8200])
def test_a_graph_of_forward_and_backward_replays(seq: int, packed: bool) -> None:
    inputs, bounds = make(seq, rows=4 if packed else 1), bounds_of(seq, packed)
    leaves = inputs.leaves()
    grads = gradients_of(attend(*leaves, bounds))

    def work() -> list[Tensor]:
        outputs = attend(*leaves, bounds)
        return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for turn in range(3):
        with torch.no_grad():
            for x in leaves[:3]:
                x.copy_(torch.randn_like(x))
            if bounds is not None:
                bounds.copy_(torch.tensor([0, 7 * turn, seq // 3, seq - turn, seq]))
        graph.replay()
        assert_same([x.detach() for x in captured], [x.detach() for x in work()])


@PACKED
@pytest.mark.parametrize("seq", [300, 8200])
def test_nothing_waits_for_the_device(seq: int, packed: bool) -> None:
    inputs, bounds = make(seq, rows=4 if packed else 1), bounds_of(seq, packed)
    leaves = inputs.leaves()
    grads = gradients_of(attend(*leaves, bounds))
    # Compiling a kernel may wait; running it may not.
    torch.autograd.grad(attend(*leaves, bounds), leaves, grads)
    torch.cuda.synchronize()
    with no_synchronisation():
        torch.autograd.grad(attend(*leaves, bounds), leaves, grads)


@PACKED
def test_lengths_share_one_compiled_graph(packed: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for seq in (300, 1000, 513, 8200, 64):
        inputs, bounds = make(seq, rows=4 if packed else 1), bounds_of(seq, packed)
        outcomes = []
        for call in (compiled, attend):
            leaves = inputs.leaves()
            outputs = call(*leaves, bounds)
            torch.autograd.backward(outputs, gradients_of(outputs))
            outcomes.append([*(x.detach() for x in outputs), *(x.grad for x in leaves)])
        assert_same(*outcomes)
    # One for the first length, one for all others.
    assert counter.frame_count <= 2


def test_inductor_gives_the_eager_result() -> None:
    def layer(x: Tensor, log_decay: Tensor) -> Tensor:
        q, k, v = x.unflatten(-1, (3, 4, 64)).unbind(2)
        return torch.tanh(attend(torch.relu(q), k, v, log_decay)[0])

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    log_decay = -torch.logspace(-4, 0.5, 4, device=GPU)
    for seq in (300, 513):
        x = torch.randn(1, seq, 768, device=GPU, dtype=BF16)
        outcomes = []
        for call in (compiled, layer):
            leaf = x.clone().requires_grad_()
            y = call(leaf, log_decay)
            y.sum().backward()
            outcomes.append((y, leaf.grad))
        for actual, exact in zip(*outcomes):
            assert_close(actual, exact, limit=2 * KERNEL_OUTPUT[BF16])


def test_kernels_are_compiled_once_for_all_lengths() -> None:
    from triton import knobs

    compiled = []
    for seq in (1000, 3000):
        results(make(seq, heads=200))
        results(make(seq + 1, heads=200))
    previous = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda *args, **kwargs: compiled.append(kwargs)
    try:
        for seq in (1024, 2048, 1111, 4099):
            results(make(seq, heads=200))
    finally:
        knobs.runtime.jit_post_compile_hook = previous
    assert not compiled, f"{len(compiled)} kernels were compiled for another length"


@pytest.mark.parametrize(("seq", "heads"), [(4096, 160), (32_768, 16)], ids=["whole", "segments"])
def test_memory_holds_outputs_and_gradients_and_little_else(seq: int, heads: int) -> None:
    inputs = make(seq, heads, 128)
    # Slices of one projection: a copy of each would be as large as an output.
    views = [x.detach() for x in fused(*inputs[:3])]
    leaves = [x.requires_grad_() for x in views]
    log_decay = inputs.log_decay
    do = torch.randn_like(inputs.v)
    del inputs
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o, _ = attend(*leaves, log_decay)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 1.2 * o.numel() * o.element_size()
    grads = torch.autograd.grad(o, leaves, do)
    peak = torch.cuda.max_memory_allocated() - before
    size = sum(x.numel() * x.element_size() for x in (o, *grads))
    assert peak <= 1.1 * size, f"{peak / size:.3f} of outputs and gradients"


@PACKED
def test_the_library_op_passes_opcheck(packed: bool) -> None:
    q, k, v, log_decay, state = make(100, rows=4 if packed else 1).leaves()
    op = getattr(torch.ops.transnormer, OP).default
    bounds = bounds_of(100, packed)
    torch.library.opcheck(op, (q, k, v, log_decay, state, bounds, 1.0, False))


def test_autocast_casts_q_k_v_and_nothing_else() -> None:
    inputs = make(300)
    exact = results(inputs)
    leaves = Inputs(*(x.float() for x in inputs)).leaves()
    with torch.autocast(GPU, dtype=BF16):
        outputs = attend(*leaves)
        grads = torch.autograd.grad(outputs, leaves, gradients_of(outputs))
    assert outputs[0].dtype == BF16
    assert outputs[1].dtype == torch.float32
    actual = [*(x.detach() for x in outputs), *(x.to(y.dtype) for x, y in zip(grads, exact[2:]))]
    assert_same(actual, exact)
    assert all(x.dtype == torch.float32 for x in grads)


def test_activation_checkpointing_changes_nothing() -> None:
    inputs = make(1000)
    outcomes = []
    for call in (attend, lambda *x: checkpoint(attend, *x, use_reentrant=False)):
        leaves = inputs.leaves()
        outputs = call(*leaves)
        torch.autograd.backward(outputs, gradients_of(outputs))
        outcomes.append([x.grad for x in leaves])
    assert_same(*outcomes)


@OTHER_STREAMS
def test_streams_of_their_own_give_the_same() -> None:
    inputs = make(8200)
    exact = results(inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = results(inputs)
    stream.synchronize()
    assert_same(actual, exact)
