"""The machine code of the kernels: every product's operands have addresses, and loops no spills."""

import importlib
import pkgutil
import re
from collections.abc import Iterator

import pytest
import torch
from sass import local_accesses_in_loops, lost_descriptors

import transnormer.ops
from transnormer.ops import decay, linear_attention

on_a_gpu = pytest.mark.gpu
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


# As Triton prints it: what the instruction waits for in place of its address.
TRITONS = re.sub(r"/\*\d+\*/ ", "--:-:-:Y:2\t", RIGHT)


@pytest.mark.parametrize(("code", "at"), [(RIGHT, "0050"), (TRITONS, "line 6")])
def test_an_offset_to_nothing_is_found(code: str, at: str) -> None:
    assert lost_descriptors(code) == (2, [])
    wrong = code.replace("UP0, UR10, 0x40", "UP0, UR7, 0x40")
    products, lost = lost_descriptors(wrong)
    assert products == 2
    assert [(x.at, x.register) for x in lost] == [(at, 14)]


def test_local_memory_counts_where_a_loop_has_products() -> None:
    spill, product = "--:-:-:Y:2\tLDL R1, [R2];\n", "--:-:-:Y:2\tHGMMA R24, R92, gdesc[UR8];\n"
    loop = "LBB{0}:\n{1}04:-:-:-:5\t@P0 BRA LBB{0};\n"
    code = spill + loop.format(0, spill) + loop.format(1, product + spill + spill) + spill
    assert local_accesses_in_loops(code + loop.format(2, product)) == [2, 0]


def compiled_kernels() -> Iterator[tuple[str, str]]:
    """Name and machine code of every kernel of the package that this process has compiled."""
    for module in pkgutil.walk_packages(transnormer.ops.__path__, "transnormer.ops."):
        if ".triton_" not in module.name:
            continue
        for name, kernel in vars(importlib.import_module(module.name)).items():
            for cache in getattr(kernel, "device_caches", {}).values():
                for compiled in cache[0].values():
                    yield name, compiled.asm["sass"]


@on_a_gpu
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
    found = [(name, *lost_descriptors(sass)) for name, sass in compiled_kernels()]
    assert sum(products for _, products, _ in found) > 0
    assert not [(name, lost) for name, _, lost in found if lost]


@on_a_gpu
def test_the_loop_of_a_backward_pass_of_few_rows_keeps_in_registers() -> None:
    # Chunks of 64, whose sweep takes 255 registers: addresses that need one more spill it there.
    from transnormer.ops.linear_attention import triton_form
    from transnormer.ops.linear_attention.triton_constant import backward_kernel

    triton_form._remembered.cache_clear()
    for cache in backward_kernel.device_caches.values():
        cache[0].clear()
    q, k, v = (
        torch.randn(1, 500, 22, 128, device=GPU).bfloat16().requires_grad_() for _ in range(3)
    )
    o = linear_attention(q, k, v, decay.tnl_log_decay(22, 0, 2).to(GPU))[0]
    torch.autograd.grad(o, (q, k, v), torch.ones_like(o))
    found = [sass for name, sass in compiled_kernels() if name == "backward_kernel"]
    assert [local_accesses_in_loops(sass) for sass in found] == [[0]]
