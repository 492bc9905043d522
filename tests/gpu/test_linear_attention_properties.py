"""What holds for the constant-decay kernels on a GPU whatever the numbers are."""

import gc

import pytest
import torch
from attention_cases import Inputs
from kernel_cases import BOUNDS, FORM, LAYOUTS, assert_same, fused, laid_out, results
from kernel_grid import (
    BF16,
    FP16,
    FP32,
    TYPICAL,
    Call,
    assert_results_close,
    exact_results,
    run,
)
from tolerances import (
    KERNEL_GRADIENT,
    KERNEL_LOG_DECAY,
    KERNEL_OUTPUT,
    KERNEL_STATE,
    assert_close,
)
from torch import Tensor

from transnormer.ops import linear_attention, linear_attention_step

pytestmark = pytest.mark.gpu
GPU = "cuda"
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
# batch, seq, heads: many short rows, and few long ones, which are cut into segments.
SHAPES = pytest.mark.parametrize("shape", [(2, 300, 80), (1, 8200, 2)], ids=["short", "long"])


def make(
    shape: tuple[int, int, int], dim: int = 64, dtype: torch.dtype = BF16, rows: int | None = None
) -> Inputs:
    """Unit-scale inputs with slow and fast heads and an initial state."""
    batch, seq, heads = shape
    q, k, v = (torch.randn(batch, seq, heads, dim, device=GPU).to(dtype) for _ in range(3))
    log_decay = -torch.logspace(-4, 0.5, heads, device=GPU)
    state = torch.randn(rows or batch, heads, dim, dim, device=GPU)
    return Inputs(q, k, v, log_decay, state)


def attend(q, k, v, log_decay, state=None, **kwargs):
    return linear_attention(q, k, v, log_decay, initial_state=state, implementation=FORM, **kwargs)


def poison(megabytes: int = 2048) -> None:
    """Leave memory full of NaN to the allocator, in blocks of every size."""
    size = 1 << 18
    blocks = [torch.full((size,), float("nan"), device=GPU) for _ in range(64)]
    blocks += [torch.full((128,), float("nan"), device=GPU) for _ in range(2000)]
    blocks.append(torch.full((megabytes << 18,), float("nan"), device=GPU))
    del blocks


def test_auto_takes_the_kernels() -> None:
    inputs = make((1, 300, 4))
    assert_same(results(inputs, "auto"), results(inputs, FORM))
    # What they refuse still runs.
    assert_same(results(inputs.double(), "auto"), results(inputs.double(), "chunked"))
    gated = inputs._replace(log_decay=inputs.log_decay.expand(1, 300, 4).contiguous())
    assert_same(results(gated, "auto"), results(gated, FORM))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("position", [0, 63, 64, 255, 256, 299])
@SHAPES
def test_nothing_depends_on_later_tokens(
    shape: tuple[int, int, int], position: int, reverse: bool
) -> None:
    inputs = make(shape)
    before = results(inputs, reverse=reverse)
    changed = [x.clone() for x in inputs[:3]]
    for x in changed:
        x[:, position] += 1.0
    after = results(Inputs(*changed, *inputs[3:]), reverse=reverse)
    early, late = slice(0, position), slice(position + 1, None)
    if reverse:
        early, late = late, early
    assert torch.equal(before[0][:, early], after[0][:, early])
    assert not torch.equal(before[0][:, position], after[0][:, position])
    # Keys and values take gradients from no earlier query.
    for i in (3, 4):
        assert torch.equal(before[i][:, late], after[i][:, late])


@DTYPES
@pytest.mark.parametrize("split", [1, 63, 64, 65, 4096])
def test_prefill_in_two_calls_equals_one(split: int, dtype: torch.dtype) -> None:
    q, k, v, log_decay, state = make((1, 8200, 2), dtype=dtype)
    whole, whole_state = attend(q, k, v, log_decay, state)
    outputs = []
    for part in (slice(0, split), slice(split, None)):
        o, state = attend(q[:, part], k[:, part], v[:, part], log_decay, state)
        outputs.append(o)
    # Two results with an error each.
    assert_close(torch.cat(outputs, 1), whole, limit=2 * KERNEL_OUTPUT[dtype])
    assert_close(state, whole_state, limit=2 * KERNEL_STATE[dtype])


@DTYPES
def test_decoding_equals_prefill(dtype: torch.dtype) -> None:
    q, k, v, log_decay, state = make((2, 200, 8), dtype=dtype)
    whole, whole_state = attend(q, k, v, log_decay, state)
    outputs = []
    for t in range(200):
        o, state = linear_attention_step(q[:, t], k[:, t], v[:, t], log_decay, state)
        outputs.append(o)
    assert_close(torch.stack(outputs, 1), whole, limit=2 * KERNEL_OUTPUT[dtype])
    assert_close(state, whole_state, limit=KERNEL_STATE[dtype])


@SHAPES
def test_permuted_heads_permute_results(shape: tuple[int, int, int]) -> None:
    inputs = make(shape)
    order = torch.randperm(shape[2], device=GPU)
    grads = [torch.randn_like(x) for x in attend(*inputs)]
    outcomes = []
    for heads in (slice(None), order):
        parts = [x[:, :, heads] for x in inputs[:3]]
        part = Inputs(*parts, inputs.log_decay[heads], inputs.initial_state[:, heads]).leaves()
        outputs = attend(*part)
        torch.autograd.backward(outputs, [grads[0][:, :, heads], grads[1][:, heads]])
        outcomes.append([x.detach() for x in outputs] + [x.grad for x in part])
    for i, (x, y) in enumerate(zip(*outcomes)):
        dim = {1: 1, 5: 0, 6: 1}.get(i, 2)
        assert torch.equal(x.index_select(dim, order), y), f"result {i}"


@DTYPES
@SHAPES
def test_reverse_is_the_call_on_flipped_tokens(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    inputs = make(shape, dtype=dtype)
    flipped = Inputs(*(x.flip(1) for x in inputs[:3]), *inputs[3:])
    o_grad, state_grad = (torch.randn_like(x) for x in attend(*inputs))
    outcomes = []
    for part, grad, reverse in ((inputs, o_grad, True), (flipped, o_grad.flip(1), False)):
        leaves = part.leaves()
        outputs = attend(*leaves, reverse=reverse)
        torch.autograd.backward(outputs, [grad, state_grad])
        outcomes.append([x.detach() for x in outputs] + [x.grad for x in leaves])
    for i, (x, y) in enumerate(zip(*outcomes)):
        y = y.flip(1) if i in (0, 2, 3, 4) else y
        limit = (KERNEL_LOG_DECAY if i == 5 else KERNEL_GRADIENT)[dtype]
        assert_close(x, y, limit=2 * limit, name=f"result {i}")


@DTYPES
def test_results_are_linear_in_the_values(dtype: torch.dtype) -> None:
    q, k, v, log_decay, state = make((1, 1000, 4), dtype=dtype)
    once, once_state = attend(q, k, v, log_decay, state)
    twice, twice_state = attend(q, k, 2 * v, log_decay, 2 * state)
    # Powers of two commute with every rounding but that of float16's subnormals.
    if dtype != FP16:
        assert torch.equal(twice, 2 * once)
        assert torch.equal(twice_state, 2 * once_state)
    assert_close(twice, 2 * once, limit=KERNEL_OUTPUT[dtype])
    other = torch.randn_like(v)
    joined, _ = attend(q, k, torch.cat([v, other, v], -1), log_decay)
    alone, _ = attend(q, k, other, log_decay)
    assert_close(joined[..., 64:128], alone, limit=2 * KERNEL_OUTPUT[dtype])
    if dtype == FP32:
        total, _ = attend(q, k, v + other, log_decay, state)
        assert_close(total, once + alone, limit=1e-5)


@DTYPES
@SHAPES
def test_runs_repeat_bit_for_bit(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    inputs = make(shape, dtype=dtype)
    first = results(inputs)
    for _ in range(5):
        assert_same(results(inputs), first)


@pytest.mark.parametrize("filled", [True, False], ids=["filled_by_torch", "left_by_others"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@SHAPES
def test_no_result_comes_from_memory_that_nobody_wrote(
    shape: tuple[int, int, int], packed: bool, filled: bool
) -> None:
    shape = (1, *shape[1:]) if packed else shape
    bounds = torch.tensor([*BOUNDS[:-1], shape[1], shape[1]], device=GPU) if packed else None
    inputs = make(shape, dim=36, rows=len(bounds) - 1 if packed else None)
    exact = results(inputs, cu_seqlens=bounds)
    torch.utils.deterministic.fill_uninitialized_memory = filled
    for _ in range(3):
        poison()
        assert_same(results(inputs, cu_seqlens=bounds), exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@SHAPES
def test_strides_change_nothing(shape: tuple[int, int, int], layout: str) -> None:
    inputs = make(shape, dim=36)
    moved = Inputs(*(laid_out(x, layout) for x in inputs[:3]), *inputs[3:])
    assert_same(results(moved), results(inputs))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_slices_of_one_packed_projection(reverse: bool) -> None:
    inputs = make((1, 8200, 4), rows=4)
    bounds = torch.tensor([0, 0, 4000, 4001, 8200], dtype=torch.int32, device=GPU)
    sliced = Inputs(*fused(*inputs[:3]), *inputs[3:])
    arguments = {"cu_seqlens": bounds, "reverse": reverse}
    assert_same(results(sliced, **arguments), results(inputs, **arguments))


@pytest.mark.parametrize("layout", ["heads_first", "surrounded", "unaligned", "expanded"])
def test_gradients_of_outputs_with_strides(layout: str) -> None:
    leaves = make((1, 600, 4)).leaves()
    outputs = attend(*leaves)
    o_grad, state_grad = (torch.randn_like(x) for x in outputs)
    if layout == "expanded":
        moved = o_grad[:, :1, :, :1].expand_as(o_grad)
    else:
        moved = laid_out(o_grad, layout)
    plain = moved.contiguous()
    exact = torch.autograd.grad(outputs, leaves, (plain, state_grad), retain_graph=True)
    assert_same(torch.autograd.grad(outputs, leaves, (moved, state_grad.mT.contiguous().mT)), exact)


def test_one_sequence_of_a_pack_does_not_reach_another() -> None:
    inputs = make((1, 8200, 4), rows=3)
    bounds = torch.tensor([0, 3001, 6000, 8200], device=GPU)
    before = results(inputs, cu_seqlens=bounds)
    spoiled = [x.clone() for x in inputs[:3]]
    for x in spoiled:
        x[:, 3001:6000] = float("nan")
    after = results(Inputs(*spoiled, *inputs[3:]), cu_seqlens=bounds)
    for i in (0, 2, 3, 4):
        assert torch.equal(before[i][:, :3001], after[i][:, :3001])
        assert torch.equal(before[i][:, 6000:], after[i][:, 6000:])
    for i in (1, 6):
        assert torch.equal(before[i][[0, 2]], after[i][[0, 2]])


def test_packed_sequences_equal_separate_calls() -> None:
    bounds = [0, 0, 1, 1500, 1564, 6000, 6000, 8200]
    inputs = make((1, 8200, 4), rows=7)
    packed = attend(*inputs, cu_seqlens=torch.tensor(bounds, device=GPU))
    for i, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        part = [x[:, start:stop] for x in inputs[:3]]
        o, state = attend(*part, inputs.log_decay, inputs.initial_state[i : i + 1])
        assert_close(packed[0][:, start:stop], o, limit=2 * KERNEL_OUTPUT[BF16])
        assert_close(packed[1][i : i + 1], state, limit=2 * KERNEL_STATE[BF16])


# Elements that int32 cannot count; float64 of the last rows alone, since the decays below leave
# nothing of what came before them.
FAR = 1 << 31
WINDOW = 4096


def far_decay(heads: int) -> Tensor:
    return -torch.linspace(0.05, 1.0, heads, device=GPU)


def assert_far_rows(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Run on the whole, and compare the last rows of every result with float64."""
    log_decay = far_decay(q.shape[2])
    do = torch.randn(*q.shape[:3], v.shape[3], device=GPU, dtype=v.dtype)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    outputs = attend(*leaves, log_decay)
    d_final = torch.randn_like(outputs[1])
    grads = torch.autograd.grad(outputs, leaves, (do, d_final))
    tail = [x[:, -WINDOW:] for x in (q, k, v)]
    call = Call(*tail, log_decay, None, None, do[:, -WINDOW:], d_final)
    exact = exact_results(call)
    del exact["gradient of log_decay"], exact[TYPICAL]
    actual = {"o": outputs[0].detach()[:, -WINDOW:], "final_state": outputs[1].detach()}
    for name, grad in zip("qkv", grads):
        actual[f"gradient of {name}"] = grad[:, -WINDOW:]
    # The first rows of the window lack what lies before it.
    for name in ("o", "gradient of q", "gradient of k", "gradient of v"):
        actual[name], exact[name] = actual[name][:, -1024:], exact[name][:, -1024:]
    assert_results_close(actual, exact, q.dtype, 64)


def needs_memory(gigabytes: int) -> None:
    """Skip on a smaller GPU, free what earlier tests cached."""
    if torch.cuda.get_device_properties(0).total_memory < gigabytes << 30:
        pytest.skip(f"needs a GPU with {gigabytes} GiB")
    gc.collect()
    torch.cuda.empty_cache()
    # Filling 30 GB with NaN is tested by smaller calls.
    torch.utils.deterministic.fill_uninitialized_memory = False


@pytest.fixture
def _all_memory():
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("_all_memory")
def test_more_elements_than_int32_counts() -> None:
    needs_memory(60)
    seq = FAR // (8 * 128) + 1000
    q, k, v = (torch.randn(1, seq, 8, 128, device=GPU, dtype=BF16) for _ in range(3))
    assert q.numel() > FAR
    assert_far_rows(q, k, v)


@pytest.mark.usefixtures("_all_memory")
def test_strides_beyond_int32() -> None:
    needs_memory(16)
    # Token strides of one projection: offsets exceed int32 though no tensor has so many elements.
    seq = FAR // (16 * 4 * 128) + 5000
    projection = torch.randn(1, seq, 16 * 4 * 128, device=GPU, dtype=BF16)
    parts = [x.unflatten(-1, (16, 128))[:, :, -2:] for x in projection.chunk(4, -1)]
    assert parts[2].stride(1) * seq > FAR
    assert_far_rows(parts[3], parts[1], parts[2])


@pytest.mark.usefixtures("_all_memory")
def test_batch_and_head_strides_beyond_int32() -> None:
    needs_memory(16)
    flat = torch.randn(FAR + (1 << 22), device=GPU, dtype=BF16)
    shape, dims = (2, 300, 2, 64), {"batch": (FAR, 256, 64, 1), "heads": (100_000, 256, FAR, 1)}
    for strides in dims.values():
        views = [flat.as_strided(shape, strides, offset) for offset in (0, 1 << 18, 1 << 19)]
        state = torch.randn(2, 2, 64, 64, device=GPU)
        inputs = Inputs(*views, torch.tensor([-0.1, 0.0], device=GPU), state)
        plain = Inputs(*(x.contiguous() for x in views), *inputs[3:])
        assert_same(results(inputs), results(plain))


@pytest.mark.usefixtures("_all_memory")
def test_packed_bounds_beyond_int32_elements() -> None:
    needs_memory(60)
    seq = FAR // (8 * 128) + 1000
    q, k, v = (torch.randn(1, seq, 8, 128, device=GPU, dtype=BF16) for _ in range(3))
    last = seq - 900
    bounds = torch.tensor([0, 1000, last, last, seq], dtype=torch.int32, device=GPU)
    with torch.no_grad():
        o, states = attend(q, k, v, far_decay(8), cu_seqlens=bounds)
    tail = [x[:, last:] for x in (q, k, v)]
    do, d_final = torch.zeros_like(tail[2]), torch.zeros_like(states[3:])
    exact = exact_results(Call(*tail, far_decay(8), None, None, do, d_final))
    assert_close(o[:, last:], exact["o"], limit=KERNEL_OUTPUT[BF16])
    assert_close(states[3:], exact["final_state"], limit=KERNEL_STATE[BF16])
    assert bool((states[2] == 0).all())


def test_log_decay_gradient_does_not_lose_its_digits_with_length() -> None:
    for seq in (1024, 65_536):
        shape = (1, seq, 4, 64)
        q, k, v, do = (torch.randn(shape, device=GPU, dtype=BF16) for _ in range(4))
        log_decay = torch.tensor([-1e-5, -1e-3, -0.1, -2.0], device=GPU)
        d_final = torch.zeros(1, 4, 64, 64, device=GPU)
        call = Call(q, k, v, log_decay, None, None, do, d_final)
        actual, exact = run(call, FORM), exact_results(call)
        name = "gradient of log_decay"
        # Head by head: the slow ones would hide the fast ones.
        size = exact[name].abs().maximum(exact[TYPICAL])
        error = (actual[name].double() - exact[name]).abs() / size
        assert error.max() <= 2 * KERNEL_LOG_DECAY[BF16], f"errors {error.tolist()} at {seq} tokens"
