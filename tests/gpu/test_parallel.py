"""What of parallel/ is computed otherwise on a GPU."""

import pytest
import torch
from tolerances import KERNEL_GRADIENT, KERNEL_STATE, assert_close

from transnormer.nn.core import LinearAttentionCore
from transnormer.parallel.sequence_cores import _decay_from, _write

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("gated", [False, True], ids=["constant", "gated"])
def test_states_of_parts_are_those_of_the_kernels(gated: bool) -> None:
    k, v = (torch.randn(2, 300, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    decay = -torch.rand(*((2, 300, 4) if gated else (4,)), device="cuda") * 0.1
    k.requires_grad_()
    found = _write(k, _decay_from(decay, k, reverse=False), v)
    assert found.dtype == torch.float32
    exact_k = k.detach().double().requires_grad_()
    core = LinearAttentionCore(implementation="chunked")
    q = torch.zeros_like(exact_k)
    _, exact = core(q, exact_k, v.double(), decay.double(), state=None, cu_seqlens=None, mask=None)
    assert_close(found, exact, limit=KERNEL_STATE[torch.bfloat16])
    grad = torch.randn_like(found)
    found.backward(grad)
    exact.backward(grad.double())
    assert k.grad is not None
    assert exact_k.grad is not None
    assert_close(k.grad, exact_k.grad, limit=KERNEL_GRADIENT[torch.bfloat16])
