"""From the joint projection to the gated norm in one op: values, gradients, graphs, refusals."""

import pytest
import torch
from kernel_cases import force_segments, needs_interpreter
from tolerances import JOINT_ATTENTION, assert_close
from torch import Tensor

from transnormer.ops.joint_attention import joint_attention


def inputs(
    batch: int, seq: int, heads: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """A projection, decays and a gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    joint = torch.randn(batch, seq, 4 * heads * dim, generator=generator).to(dtype)
    grad = torch.randn(batch, seq, heads * dim, generator=generator).to(dtype)
    return joint, -0.3 * torch.rand(heads, generator=generator), grad


def run(joint: Tensor, decay: Tensor | None, grad: Tensor, dim: int, **options: object) -> object:
    leaf = joint.detach().requires_grad_()
    y = joint_attention(leaf, decay, head_dim=dim, eps=1e-6, **options)
    y.backward(grad)
    return y.detach(), leaf.grad


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("batch", "seq", "heads", "dim"), [(2, 19, 3, 16), (1, 1, 1, 32), (2, 1, 1, 16), (1, 9, 2, 20)]
)
def test_the_kernels_are_the_formula(
    batch: int, seq: int, heads: int, dim: int, dtype: torch.dtype
) -> None:
    joint, decay, grad = inputs(batch, seq, heads, dim, dtype)
    exact = run(joint.double(), decay.double(), grad.double(), dim)
    found = run(joint, decay, grad, dim, implementation="triton")
    for actual, expected in zip(found, exact):
        assert actual.dtype == dtype
        assert_close(actual, expected, limit=JOINT_ATTENTION[dtype])


@needs_interpreter
def test_the_derivative_of_silu_holds_at_any_size() -> None:
    joint, decay, grad = inputs(1, 24, 1, 16, torch.float32)
    joint *= torch.tensor([1e-3, 1.0, 4.0, 8.0, 12.0, 18.0]).repeat(4)[:, None]
    exact = run(joint.double(), decay.double(), grad.double(), 16)
    found = run(joint, decay, grad, 16, implementation="triton")
    # A part each: the gradients of q, k, v and the gate differ in size.
    for actual, expected in zip(found[1].chunk(4, -1), exact[1].chunk(4, -1)):
        assert bool(actual.isfinite().all())
        assert_close(actual, expected, limit=JOINT_ATTENTION[torch.float32])


@needs_interpreter
def test_packed_rows_and_no_decay() -> None:
    joint, _, grad = inputs(1, 40, 2, 16, torch.float32)
    bounds = torch.tensor([0, 7, 7, 40])
    exact = run(joint.double(), None, grad.double(), 16, cu_seqlens=bounds)
    found = run(joint, None, grad, 16, cu_seqlens=bounds, implementation="triton")
    for actual, expected in zip(found, exact):
        assert_close(actual, expected, limit=JOINT_ATTENTION[torch.float32])


@needs_interpreter
def test_a_projection_with_strides_and_a_gradient_with_strides() -> None:
    joint, decay, grad = inputs(2, 9, 2, 16, torch.float32)
    exact = run(joint, decay, grad, 16, implementation="triton")
    wide = torch.cat([joint, joint], -1)[..., : joint.shape[-1]].requires_grad_()
    y = joint_attention(wide, decay, head_dim=16, eps=1e-6, implementation="triton")
    y.backward(torch.cat([grad, grad], -1)[..., : grad.shape[-1]])
    assert torch.equal(y.detach(), exact[0])
    assert torch.equal(wide.grad, exact[1])


@needs_interpreter
def test_the_states_of_segments_are_kept_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from transnormer.ops.linear_attention.triton_launch import Call

    force_segments(monkeypatch, 16)
    made = []
    original = Call.states
    monkeypatch.setattr(Call, "states", lambda *given: made.append(original(*given)) or made[-1])
    joint, decay, grad = inputs(1, 40, 2, 16, torch.float32)
    exact = run(joint.double(), decay.double(), grad.double(), 16)
    found = run(joint, decay, grad, 16, implementation="triton")
    assert [list(states.shape) for states in made] == [[3, 2, 16, 16]]
    for actual, expected in zip(found, exact):
        assert_close(actual, expected, limit=JOINT_ATTENTION[torch.float32])
    # Packed rows have a number of segments that nobody knows before: nothing is kept.
    for bounds, units in ((None, 3), (torch.tensor([0, 7, 40]), 0)):
        given = (joint.detach().requires_grad_(), decay, bounds, 16, 1e-6)
        op = torch.ops.transnormer.joint_attention
        assert op(*given)[3].shape == (units, 2, 16, 16)
        torch.library.opcheck(op, given, test_utils="test_faketensor")


@needs_interpreter
def test_the_op_keeps_torch_s_contract() -> None:
    joint, decay, _ = inputs(1, 5, 1, 16, torch.float32)
    op = torch.ops.transnormer.joint_attention
    torch.library.opcheck(
        op,
        (joint.requires_grad_(), decay, None, 16, 1e-6),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@needs_interpreter
def test_it_compiles_whole_at_symbolic_lengths() -> None:
    torch._dynamo.reset()
    call = torch.compile(
        lambda x, decay: joint_attention(
            x, decay, head_dim=16, eps=1e-6, implementation="triton"
        ).sum(),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for seq in (6, 11):
        joint, decay, grad = inputs(1, seq, 2, 16, torch.float32)
        leaf = joint.detach().requires_grad_()
        call(leaf, decay).backward()
        exact = run(joint, decay, torch.ones_like(grad), 16, implementation="triton")
        assert_close(leaf.grad, exact[1].double())


@pytest.mark.parametrize(
    "implementation", ["torch", pytest.param("triton", marks=needs_interpreter)]
)
def test_autocast_casts_the_projection(implementation: str) -> None:
    joint, decay, grad = inputs(1, 9, 2, 16, torch.float32)
    exact = run(joint.bfloat16(), decay, grad.bfloat16(), 16, implementation=implementation)
    leaf = joint.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = joint_attention(leaf, decay, head_dim=16, eps=1e-6, implementation=implementation)
    y.backward(grad.bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, exact[0])
    assert torch.equal(leaf.grad, exact[1].float())


def test_wrong_calls_are_refused() -> None:
    joint, decay, _ = inputs(1, 4, 2, 16, torch.float32)
    with pytest.raises(ValueError, match="a width that is a multiple of 4 head_dim, which is 24"):
        joint_attention(joint, decay, head_dim=24, eps=1e-6)
    with pytest.raises(ValueError, match=r"log_decay has shape \[3\]"):
        joint_attention(joint, torch.zeros(3), head_dim=16, eps=1e-6)
    with pytest.raises(NotImplementedError, match="joint is torch.float64; expected float32"):
        joint_attention(joint.double(), None, head_dim=16, eps=1e-6, implementation="triton")
    with pytest.raises(NotImplementedError, match="log_decay wants a gradient; expected a const"):
        joint_attention(
            joint, decay.requires_grad_(), head_dim=16, eps=1e-6, implementation="triton"
        )
