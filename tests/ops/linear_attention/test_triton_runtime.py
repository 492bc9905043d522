"""Direct calls of compiled kernels: what is told apart, and what arrives."""

import types

import pytest
import torch
from kernel_cases import needs_interpreter


class Compiled:
    """Stands for what Triton returns from a first launch."""

    def __init__(self, calls: list) -> None:
        self.calls = calls

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *arguments: self.calls.append((grid, arguments))


class Kernel:
    """Stands for a function under triton.jit with the signature (x, y, n, C, D)."""

    __name__ = "kernel"
    arg_names = ["x", "y", "n", "C", "D"]
    params = [types.SimpleNamespace(is_constexpr=name in "CD") for name in arg_names]

    def __init__(self) -> None:
        self.compiled, self.direct = [], []

    def __getitem__(self, grid: tuple[int, ...]):
        def run(*arguments: object, **constants: object) -> Compiled:
            self.compiled.append((grid, arguments, constants))
            return Compiled(self.direct)

        return run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    from transnormer.ops.linear_attention import triton_runtime

    monkeypatch.setattr(triton_runtime, "CompiledKernel", Compiled)
    monkeypatch.setattr(triton_runtime, "_compiled", {})
    return Kernel()


@needs_interpreter
def test_a_second_launch_goes_to_the_compiled_kernel(kernel: Kernel) -> None:
    from transnormer.ops.linear_attention.triton_runtime import launch

    x, y = torch.zeros(8), torch.ones(8)
    launch(kernel, 3, x, None, 32, D=2, C=1, num_warps=4)
    launch(kernel, 5, y, None, 64, D=2, C=1, num_warps=4)
    assert len(kernel.compiled) == 1
    ((grid, arguments),) = kernel.direct
    assert grid == (5, 1, 1)
    # In the order of the signature, whatever the order of the keywords; options are no arguments.
    assert arguments[0] is y
    assert arguments[1:] == (None, 64, 1, 2)


@needs_interpreter
@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(8, dtype=torch.bfloat16)},
        {"x": torch.zeros(9)[1:]},
        {"y": torch.zeros(8)},
        {"n": 1},
        {"n": 33},
        {"n": 2**32},
        {"C": 3},
        {"num_warps": 8},
    ],
    ids=["dtype", "alignment", "none", "one", "odd", "int64", "constant", "option"],
)
def test_what_triton_compiles_anew_is_told_apart(kernel: Kernel, other: dict) -> None:
    from transnormer.ops.linear_attention.triton_runtime import launch

    usual = {"x": torch.zeros(8), "y": None, "n": 32, "C": 1, "D": 2, "num_warps": 4}
    for call in (usual, usual | other):
        x, y, n = (call[name] for name in ("x", "y", "n"))
        constants = {name: call[name] for name in ("C", "D", "num_warps")}
        launch(kernel, 1, x, y, n, **constants)
    assert len(kernel.compiled) == 2
    assert not kernel.direct


@needs_interpreter
def test_a_constant_by_position_is_refused(kernel: Kernel) -> None:
    from transnormer.ops.linear_attention.triton_runtime import launch

    with pytest.raises(TypeError, match="constexpr argument by position"):
        launch(kernel, 1, torch.zeros(8), None, 32, 1, D=2, num_warps=4)
