"""The op between a layer's projections with the kernels that a GPU runs."""

from collections.abc import Callable

import pytest
import torch
from tolerances import JOINT_ATTENTION, assert_close
from torch import Tensor

from transnormer.ops.decay import tnl_log_decay
from transnormer.ops.joint_attention import joint_attention

pytestmark = pytest.mark.gpu
Call = Callable[[Tensor, Tensor], Tensor]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("batch", "seq", "heads", "dim"),
    # Of the last but one a sequence is cut into segments.
    [(2, 300, 4, 128), (1, 1000, 12, 64), (1, 5000, 2, 128), (2, 200, 1, 256)],
)
def test_the_op_is_the_formula(
    batch: int, seq: int, heads: int, dim: int, dtype: torch.dtype, compiled: bool
) -> None:
    def call(x: Tensor, decay: Tensor, implementation: str = "auto") -> Tensor:
        return joint_attention(x, decay, head_dim=dim, eps=1e-6, implementation=implementation)

    torch.manual_seed(0)
    torch._dynamo.reset()
    run: Call = torch.compile(call, fullgraph=True) if compiled else call
    joint = torch.randn(batch, seq, 4 * heads * dim, device="cuda").to(dtype).requires_grad_()
    grad = torch.randn(batch, seq, heads * dim, device="cuda").to(dtype)
    decay = tnl_log_decay(heads, 3, 24).cuda()
    y = run(joint, decay)
    y.backward(grad)
    exact = joint.detach().double().requires_grad_()
    expected = call(exact, decay.double(), "torch")
    expected.backward(grad.double())
    for actual, wanted in ((y, expected), (joint.grad, exact.grad)):
        assert_close(actual, wanted, limit=JOINT_ATTENTION[dtype])
