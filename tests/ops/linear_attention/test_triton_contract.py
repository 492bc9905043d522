"""What the kernels promise beside their results: refusals, memory safety, op schemas."""

import pytest
import torch
from attention_cases import make_inputs
from kernel_cases import FORM, needs_interpreter
from torch._subclasses.fake_tensor import FakeTensorMode

from transnormer.ops import linear_attention

OPS = ("constant_decay_attention", "lightning1_attention")


@needs_interpreter
def test_a_second_derivative_is_refused() -> None:
    q, k, v, log_decay, _ = make_inputs(20)
    q.requires_grad_()
    o, _ = linear_attention(q, k, v, log_decay, implementation=FORM)
    (grad,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(grad.square().sum(), q)


@needs_interpreter
@pytest.mark.parametrize("bounds", [[0, 1000], [0, 30, 10, 64], [-5, 64], [0, 500, 1000, 2000]])
def test_bounds_that_are_none_touch_no_other_memory(bounds: list[int]) -> None:
    from transnormer.ops.linear_attention.triton_units import unit_table_kernel

    tokens, length = 64, 16
    sequences = len(bounds) - 1
    units = sequences + tokens // length
    block = torch.full((units + 200, 4), -7, dtype=torch.int64)
    first = torch.full((sequences + 1 + 50,), -7, dtype=torch.int64)
    cu_seqlens = torch.tensor(bounds)
    unit_table_kernel[(sequences + 1,)](
        cu_seqlens, block, first, sequences, tokens, length, units, BLOCK=16
    )
    assert bool((block[units:] == -7).all())
    assert bool((first[sequences + 1 :] == -7).all())
    table, first = block[:units], first[: sequences + 1]
    assert bool((first.diff() >= 0).all())
    assert int(first[-1]) <= units
    live = table[table[:, 0] >= 0]
    assert bool((live[:, 1] >= 0).all())
    assert bool((live[:, 1] + live[:, 2] <= tokens).all())


@needs_interpreter
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", OPS)
def test_backward_ops_keep_their_schema(name: str, groups: int) -> None:
    inputs = make_inputs(20, heads=2, kv_heads=2 // groups, dtype=torch.float16)
    q, k, v, log_decay, _ = inputs
    grad_o = torch.randn(*q.shape[:3], v.shape[3]).half()
    op = getattr(torch.ops.transnormer, f"{name}_backward").default
    arguments = (grad_o, None, q, k, v, log_decay, None, None, 1.0, False, False, False)
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", ["auto", "triton", "lightning1"])
def test_fake_cuda_tensors_need_no_gpu(name: str) -> None:
    with FakeTensorMode():
        x = torch.empty(1, 5, 2, 16, device="cuda", dtype=torch.bfloat16)
        o, state = linear_attention(x, x, x, implementation=name)
    assert o.shape == x.shape
    assert o.device.type == "cuda"
    assert state.dtype == torch.float32


def test_no_tokens_still_reach_every_input() -> None:
    leaves = [x.requires_grad_() for x in make_inputs(0)[:4]]
    o, state = linear_attention(*leaves)
    grads = torch.autograd.grad(o.sum() + state.sum(), leaves)
    assert all(not x.any() for x in grads)
