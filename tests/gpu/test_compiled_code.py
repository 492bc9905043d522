"""The machine code of the kernels has no product whose operand's address was never made."""

import importlib
import pkgutil
from collections.abc import Iterator

import pytest
import torch
from sass import lost_descriptors

import transnormer.ops
from transnormer.ops import decay, linear_attention

pytestmark = pytest.mark.gpu
GPU = "cuda"
DIMS = [(128, 128), (64, 64), (64, 128), (128, 64), (32, 32), (16, 16), (32, 128), (256, 256)]

# Two products in a row that take their second operands from UR10: with its address, and without.
RIGHT = """
/*0000*/ USGXT.U32 UR10, UR4, 0xe ;
/*0010*/ UMOV UR11, 0x80000020 ;
/*0020*/ HGMMA.64x32x16.F32 R24, R92, gdesc[UR8].tnspB, RZ, !UPT ;
/*0030*/ UIADD3 UR14, UP0, UR10, 0x40, URZ ;
/*0040*/ UIADD3.X UR15, UR5, -0x7fffffe0, URZ, UP0, !UPT ;
/*0050*/ HGMMA.64x32x16.F32 R24, R96, gdesc[UR12].tnspB, R24, gsb0 ;
"""


def test_an_offset_to_nothing_is_found() -> None:
    assert lost_descriptors(RIGHT) == (2, [])
    wrong = RIGHT.replace("UP0, UR10, 0x40", "UP0, UR7, 0x40")
    products, lost = lost_descriptors(wrong)
    assert products == 2
    assert [(x.at, x.register) for x in lost] == [("0050", 14)]


def compiled_kernels() -> Iterator[tuple[str, str]]:
    """Name and machine code of every kernel of the package that this process has compiled."""
    for module in pkgutil.walk_packages(transnormer.ops.__path__, "transnormer.ops."):
        if ".triton_" not in module.name:
            continue
        for name, kernel in vars(importlib.import_module(module.name)).items():
            for cache in getattr(kernel, "device_caches", {}).values():
                for compiled in cache[0].values():
                    yield name, compiled.asm["sass"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", DIMS, ids=lambda d: f"{d[0]}x{d[1]}")
def test_operands_have_addresses(dims: tuple[int, int], dtype: torch.dtype) -> None:
    key_dim, value_dim = dims
    shape = (1, 200, 2)
    q, k = (torch.randn(*shape, key_dim, device=GPU, dtype=dtype) for _ in range(2))
    v = torch.randn(*shape, value_dim, device=GPU, dtype=dtype)
    decays = [decay.tnl_log_decay(2, 0, 2).to(GPU), -torch.rand(shape, device=GPU)]
    decays.append(-torch.rand(*shape, key_dim, device=GPU))
    for log_decay in decays:
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, log_decay)]
        o, state = linear_attention(*leaves, implementation="triton")
        torch.autograd.grad(o.sum() + state.sum(), leaves)
    lost = {
        name: found[1] for name, sass in compiled_kernels() if (found := lost_descriptors(sass))[1]
    }
    assert not lost
