"""A gated linear unit as compiled training on a GPU runs it."""

import pytest
import torch
from tolerances import GRADIENT, assert_close

from transnormer.nn.channel_mixers import GluConfig

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["none", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_compiled_training_is_the_formula(dtype: torch.dtype, name: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    mixer = GluConfig(hidden_dim=352, activation=name).build(128).cuda()
    x = torch.randn(3, 50, 128, device="cuda").requires_grad_()
    grad = torch.randn_like(x)
    leaves = [x, *mixer.parameters()]
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = torch.compile(mixer, fullgraph=True)(x)
    found = [y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))]
    assert y.dtype == dtype
    wide = mixer.double()
    exact = wide(x.double())
    leaves = [x, *wide.parameters()]
    expected = [exact, *torch.autograd.grad(exact, leaves, grad.double())]
    # Weights, inputs, the factors and their product are rounded, each once.
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual, wanted, limit=2 * GRADIENT[dtype])
