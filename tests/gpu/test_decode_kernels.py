"""The decode kernels on a GPU at real sizes: accuracy, graphs, large pools, what they leave alone."""

import oracles
import pytest
import torch
from kernel_cases import no_synchronisation
from tolerances import OUTPUT, STATE, assert_close
from torch import Tensor

from transnormer.ops import RingState, decay, linear_attention_ring_step, linear_attention_step

pytestmark = pytest.mark.gpu
GPU = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(batch: int, tokens: int, heads: int, kv_heads: int, dims: tuple[int, int], dtype):
    key_dim, value_dim = dims
    q = (torch.randn(batch, tokens, heads, key_dim, device=GPU) * key_dim**-0.5).to(dtype)
    k = torch.randn(batch, tokens, kv_heads, key_dim, device=GPU).to(dtype)
    v = torch.randn(batch, tokens, kv_heads, value_dim, device=GPU).to(dtype)
    return q, k, v


def gates(kind: str, batch: int, tokens: int, kv_heads: int, key_dim: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "constant":
        return decay.tnl_log_decay(kv_heads, 0, 8).to(GPU)
    shape = (batch, tokens, kv_heads, key_dim)[: 3 if kind == "token" else 4]
    values = -torch.rand(shape, device=GPU).square()
    return torch.where(torch.rand(shape, device=GPU) < 0.1, -torch.inf, values)


# batch, tokens, heads, kv_heads, (key_dim, value_dim)
SHAPES = [
    (1, 1, 32, 32, (128, 128)),
    (64, 1, 32, 32, (128, 128)),
    (3, 8, 16, 4, (128, 128)),
    (5, 3, 4, 4, (256, 512)),
    (2, 4, 8, 8, (96, 96)),
    (9, 1, 6, 2, (192, 428)),
    (40, 2, 8, 8, (16, 16)),
    (7, 5, 4, 4, (20, 36)),
]
# Every kind of decay in every dtype at one shape, two of them at every shape.
CASES = [
    (SHAPES[2], kind, dtype) for kind in ("none", "constant", "token", "key") for dtype in DTYPES
]
CASES += [(shape, "constant", torch.bfloat16) for shape in SHAPES]
CASES += [(shape, "key", torch.float32) for shape in SHAPES]


@pytest.mark.parametrize(("shape", "kind", "dtype"), CASES, ids=str)
def test_steps_equal_float64_on_rounded_inputs(
    shape: tuple[int, int, int, int, tuple[int, int]], kind: str, dtype: torch.dtype
) -> None:
    batch, tokens, heads, kv_heads, dims = shape
    q, k, v = make(batch, tokens, heads, kv_heads, dims, dtype)
    log_decay = gates(kind, batch, tokens, kv_heads, dims[0])
    state = torch.randn(batch, kv_heads, *dims, device=GPU)
    exact, exact_state = oracles.linear_attention(q, k, v, log_decay, initial_state=state)
    o, after = linear_attention_step(q, k, v, log_decay, state)
    # Memory that no program wrote is NaN here, which these would show.
    assert_close(o, exact, limit=OUTPUT[dtype], name="o")
    assert_close(after, exact_state, limit=STATE[dtype], name="state")
    for head in range(kv_heads):
        assert_close(after[:, head], exact_state[:, head], limit=STATE[dtype], name=f"head {head}")
    again = linear_attention_step(q, k, v, log_decay, state, inplace=True)
    assert torch.equal(again[0], o)
    assert torch.equal(state, after)


@pytest.mark.parametrize(
    ("dims", "tokens", "capacity", "dtype"),
    [
        ((128, 128), 1, 16, torch.bfloat16),
        ((128, 128), 8, 16, torch.bfloat16),
        ((128, 128), 5, 32, torch.float32),
        ((128, 128), 3, 10, torch.float16),
        ((96, 64), 4, 16, torch.float32),
        ((256, 512), 2, 16, torch.bfloat16),
        ((192, 428), 1, 6, torch.bfloat16),
        ((20, 36), 8, 32, torch.float32),
    ],
    ids=str,
)
def test_ring_steps_equal_float64(
    dims: tuple[int, int], tokens: int, capacity: int, dtype: torch.dtype
) -> None:
    batch, heads, kv_heads, steps = 5, 8, 4, 70 // tokens
    q, k, v = make(batch, steps * tokens, heads, kv_heads, dims, dtype)
    log_decay = decay.tnl_log_decay(kv_heads, 0, 8).to(GPU)
    state = torch.randn(batch, kv_heads, *dims, device=GPU)
    exact, exact_state = oracles.linear_attention(q, k, v, log_decay, initial_state=state)
    ring = RingState.from_state(state.clone(), capacity=capacity, dtype=dtype)
    ring.keys.fill_(float("nan"))
    ring.values.fill_(float("nan"))
    outputs = []
    for step in range(steps):
        part = [x[:, step * tokens : (step + 1) * tokens] for x in (q, k, v)]
        outputs.append(linear_attention_ring_step(*part, log_decay, ring))
    assert_close(torch.cat(outputs, 1), exact, limit=OUTPUT[dtype], name="o")
    assert_close(ring.fold(log_decay), exact_state, limit=STATE[dtype], name="state")


def test_speculated_tokens_are_rolled_back_exactly() -> None:
    q, k, v = make(2, 80, 8, 8, (128, 128), torch.float32)
    log_decay = decay.tnl_log_decay(8, 0, 8).to(GPU)
    exact, _ = oracles.linear_attention(q, k, v, log_decay)
    ring, seen = RingState.empty(2, 8, 128, 128, device=GPU), [0, 0]
    kept = torch.tensor([8, 3], device=GPU)
    while max(seen) + 8 <= 80:
        rows = torch.tensor(seen, device=GPU)[:, None] + torch.arange(8, device=GPU)
        part = [x[torch.arange(2, device=GPU)[:, None], rows] for x in (q, k, v)]
        o = linear_attention_ring_step(*part, log_decay, ring)
        for row in range(2):
            assert_close(o[row], exact[row, seen[row] : seen[row] + 8])
        ring.roll_back(8 - kept)
        seen = [a + b for a, b in zip(seen, kept.tolist(), strict=True)]


@pytest.mark.parametrize("form", ["step", "ring"])
def test_a_graph_replays_with_new_slots(form: str) -> None:
    q, k, v = make(3, 1, 8, 8, (128, 128), torch.bfloat16)
    log_decay = decay.tnl_log_decay(8, 0, 8).to(GPU)
    start = torch.randn(6, 8, 128, 128, device=GPU)
    slots = torch.tensor([4, -1, 0], dtype=torch.int32, device=GPU)

    def make_run(state: Tensor):
        if form == "step":
            return state, lambda: linear_attention_step(q, k, v, log_decay, state, slots=slots)[0]
        ring = RingState.from_state(state, capacity=4, dtype=torch.bfloat16)
        return ring, lambda: linear_attention_ring_step(q, k, v, log_decay, ring, slots=slots)

    captured, run = make_run(start.clone())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = run()
    eager, run_eager = make_run(start.clone())
    run_eager()
    for step in range(12):
        slots.copy_(torch.tensor([[4, -1, 0], [1, 2, 3], [-1, -1, -1], [0, 4, 5]][step % 4]))
        q.normal_()
        graph.replay()
        assert torch.equal(o, run_eager())
    pairs = zip(captured, eager, strict=True) if form == "ring" else [(captured, eager)]
    assert all(torch.equal(x, y) for x, y in pairs)


def test_rows_beyond_two_to_the_31_elements_are_reached() -> None:
    # 4,100 rows of 32 x 128 x 128: the last ones lie beyond 2^31 elements, 8 GiB.
    heads, dim, rows = 32, 128, 4100
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free memory")
    pool = torch.zeros(rows, heads, dim, dim, device=GPU)
    assert pool.numel() > 2**31
    pool[-1] = 1.0
    q, k, v = make(2, 2, heads, heads, (dim, dim), torch.bfloat16)
    slots = torch.tensor([rows - 1, 0], dtype=torch.int32, device=GPU)
    log_decay = decay.tnl_log_decay(heads, 0, 8).to(GPU)
    state = pool[[rows - 1, 0]]
    exact, exact_state = oracles.linear_attention(q, k, v, log_decay, initial_state=state)
    ring = RingState.from_state(pool, capacity=4, dtype=torch.bfloat16)
    for t in range(2):
        o = linear_attention_ring_step(q[:, t], k[:, t], v[:, t], log_decay, ring, slots=slots)
        assert_close(o, exact[:, t])
    # Two tokens more fold the first two.
    linear_attention_ring_step(q, k, v, None, ring, slots=slots)
    linear_attention_ring_step(q, k, v, None, ring, slots=slots)
    assert (pool[-1] == 1).float().mean() < 1e-3
    pool[[rows - 1, 0]] = state
    o, _ = linear_attention_step(q, k, v, log_decay, pool, slots=slots)
    assert_close(o, exact)
    assert_close(pool[[rows - 1, 0]], exact_state)
    assert bool((pool[1:-1] == 0).all())


def test_a_view_of_a_larger_tensor_is_updated_alone() -> None:
    store = torch.randn(4, 3, 8, 64, 64, device=GPU)
    before = store.clone()
    q, k, v = make(4, 1, 8, 8, (64, 64), torch.bfloat16)
    linear_attention_step(q, k, v, None, store[:, 1], inplace=True)
    assert torch.equal(store[:, ::2], before[:, ::2])
    _, exact = oracles.linear_attention(q, k, v, initial_state=before[:, 1])
    assert_close(store[:, 1], exact)


def test_no_call_waits_for_the_gpu() -> None:
    q, k, v = make(2, 1, 8, 8, (64, 64), torch.bfloat16)
    slots = torch.tensor([1, -1], dtype=torch.int32, device=GPU)
    log_decay = decay.tnl_log_decay(8, 0, 8).to(GPU)
    pool = torch.zeros(2, 8, 64, 64, device=GPU)
    ring = RingState.empty(2, 8, 64, 64, dtype=torch.bfloat16, device=GPU)
    dropped = torch.ones(2, dtype=torch.int32, device=GPU)
    with no_synchronisation():
        linear_attention_step(q, k, v, log_decay, pool, slots=slots)
        linear_attention_step(q, k, v, log_decay, pool)
        linear_attention_ring_step(q, k, v, log_decay, ring, slots=slots)
        ring.roll_back(dropped, slots)
        linear_attention_ring_step(q, k, v, log_decay, ring, slots=slots)
        ring.roll_back(1, slots)
        ring.roll_back(0)


def test_a_compiled_step_equals_the_eager_one() -> None:
    q, k, v = make(4, 1, 8, 8, (64, 64), torch.bfloat16)
    log_decay = decay.tnl_log_decay(8, 0, 8).to(GPU)
    states = [torch.randn(4, 8, 64, 64, device=GPU)]
    states.append(states[0].clone())

    def step(state: Tensor) -> Tensor:
        return linear_attention_step(q, k, v, log_decay, state, inplace=True)[0]

    compiled = torch.compile(step, fullgraph=True)
    for _ in range(3):
        assert torch.equal(compiled(states[0]), step(states[1]))
    assert torch.equal(*states)
