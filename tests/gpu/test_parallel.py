"""What of parallel/ is computed otherwise on a GPU."""

import pytest
import torch
from tolerances import KERNEL_GRADIENT, KERNEL_STATE, assert_close

from transnormer.nn.core import LinearAttentionCore
from transnormer.parallel.host_copies import HostCopies
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


def test_copies_are_made_beside_what_follows_and_before_what_changes_their_source() -> None:
    x, merged = torch.randn(1 << 26, device="cuda"), torch.randn(1 << 24, device="cuda") + 1
    exact = {"x": x.cpu(), "sum": merged.cpu()}
    copies = HostCopies()
    first = copies.take({"x": x, "sum": merged})
    assert all(copy.is_pinned() for copy in first.values())
    # Gone before it is copied: what comes next must not be put into its memory.
    del merged
    other = torch.zeros(1 << 24, device="cuda")
    copies.hold()
    x.zero_()
    copies.wait()
    for name, copy in first.items():
        assert torch.equal(copy, exact[name])
    again = copies.take({"x": x, "sum": other})
    copies.wait()
    assert all(not copy.any() for copy in again.values())
    assert [c.data_ptr() for c in again.values()] == [c.data_ptr() for c in first.values()]
