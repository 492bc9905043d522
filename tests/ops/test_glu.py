"""A gated linear unit behind its joint projection: values, gradients, contract, refusals."""

import pytest
import torch
from kernel_cases import needs_interpreter
from tolerances import GRADIENT, assert_close
from torch import Tensor

from transnormer.ops.glu import gated_projection


def inputs(dtype: torch.dtype, hidden_dim: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """joint, weight and a gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 5, 2 * hidden_dim), (7, hidden_dim), (3, 5, 7))
    joint, weight, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return joint, weight, grad


def run(joint: Tensor, weight: Tensor, grad: Tensor, **options: object) -> tuple[Tensor, ...]:
    joint, weight = joint.detach().requires_grad_(), weight.detach().requires_grad_()
    o = gated_projection(joint, weight, **options)
    o.backward(grad)
    return o.detach(), joint.grad, weight.grad


@needs_interpreter
@pytest.mark.parametrize("silu", [False, True], ids=["plain", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden_dim", [20, 1_100], ids=str)
def test_the_kernels_are_the_formula(hidden_dim: int, dtype: torch.dtype, silu: bool) -> None:
    joint, weight, grad = inputs(dtype, hidden_dim)
    exact = run(joint.double(), weight.double(), grad.double(), silu=silu)
    found = run(joint, weight, grad, silu=silu, implementation="triton")
    for actual, expected in zip(found, exact, strict=True):
        assert actual.dtype == dtype
        assert_close(actual, expected, limit=GRADIENT[dtype])


@needs_interpreter
def test_strides_change_nothing() -> None:
    joint, weight, grad = inputs(torch.float32)
    exact = run(joint, weight, grad, implementation="triton")
    wide = torch.cat([joint, joint], -1)[..., : joint.shape[-1]].requires_grad_()
    o = gated_projection(wide, weight, implementation="triton")
    o.backward(grad.mT.contiguous().mT)
    assert torch.equal(o.detach(), exact[0])
    assert_close(wide.grad, exact[1].double())


@needs_interpreter
def test_no_rows_give_none_and_leave_the_weight_a_gradient_of_zeros() -> None:
    joint, weight, grad = inputs(torch.float32)
    o, d_joint, d_weight = run(joint[:0], weight, grad[:0], implementation="triton")
    assert (o.shape, d_joint.shape) == ((0, 5, 7), (0, 5, 40))
    assert torch.equal(d_weight, torch.zeros(7, 20))


@needs_interpreter
@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_autocast_casts_both(implementation: str) -> None:
    joint, weight, grad = inputs(torch.float32)
    half = [x.bfloat16() for x in (joint, weight, grad)]
    exact = run(*half, silu=True, implementation=implementation)
    with torch.autocast("cpu", torch.bfloat16):
        made = run(joint, weight, half[2], silu=True, implementation=implementation)
        mixed = run(half[0], weight, half[2], silu=True, implementation=implementation)
    assert [x.dtype for x in made] == [torch.bfloat16, torch.float32, torch.float32]
    for found in (made, mixed):
        assert all(torch.equal(x, y.to(x.dtype)) for x, y in zip(found, exact, strict=True))


@needs_interpreter
def test_the_op_keeps_torch_s_contract() -> None:
    joint, weight, _ = inputs(torch.float32)
    torch.library.opcheck(
        torch.ops.transnormer.gated_projection,
        (joint.requires_grad_(), weight.requires_grad_(), True),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_wrong_calls_are_refused() -> None:
    joint, weight, _ = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"expected \[..., 2 \* hidden_dim\], two parts"):
        gated_projection(joint[..., 1:], weight)
    with pytest.raises(ValueError, match=r"weight has shape \[7, 19\]"):
        gated_projection(joint, weight[:, 1:])
    with pytest.raises(TypeError, match=r"weight is torch.float64"):
        gated_projection(joint, weight.double())
    with pytest.raises(NotImplementedError, match=r"torch.float64; expected float32"):
        gated_projection(joint.double(), weight.double(), implementation="triton")
