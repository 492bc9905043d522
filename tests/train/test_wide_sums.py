"""Sums of gradients in float32 beside bfloat16 parameters."""

import pytest
import torch
from tolerances import ADAMW, assert_close
from torch import Tensor, nn

from transnormer.train.wide_sums import WideSums


class Mixed(nn.Module):
    """A bfloat16 matrix, used twice, and a float32 scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(8, 8).bfloat16())
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.matrix) @ self.matrix * self.scale).float().sum()


def inputs(passes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 8, generator=generator).bfloat16() for _ in range(passes)]


def gradient(x: Tensor) -> dict[str, Tensor]:
    """Of one pass alone."""
    model = Mixed()
    model(x).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def test_many_passes_add_up_in_float32() -> None:
    passes = inputs(200)
    exact: dict[str, Tensor] = {}
    for x in passes:
        for name, grad in gradient(x).items():
            exact[name] = exact.get(name, torch.zeros_like(grad)) + grad
    model = Mixed()
    seen = []

    def backward(model: Mixed, x: Tensor) -> Tensor:
        seen.append(model.matrix.grad)
        loss = model(x)
        loss.backward()
        seen.append(model.matrix.grad)
        return loss.detach()

    run = WideSums(model).around(backward)
    for x in passes:
        run(model, x)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert_close(parameter.grad, exact[name], limit=ADAMW, name=name)
    # Not in a pass.
    assert all(x is None for x in seen)


def test_what_one_call_left_the_next_adds_to() -> None:
    first, second = inputs(2)
    model = Mixed()
    run = WideSums(model).around(lambda model, x: model(x).backward())
    run(model, first)
    kept = model.matrix.grad
    run(model, second)
    assert model.matrix.grad is kept
    model.matrix.grad = None
    run(model, second)
    assert_close(model.matrix.grad, gradient(second)["matrix"], limit=0.0)


def test_outside_of_its_calls_gradients_are_plain() -> None:
    model = Mixed()
    WideSums(model)
    model(inputs(1)[0]).backward()
    assert model.matrix.grad is not None
    assert model.matrix.grad.dtype == torch.bfloat16


def test_a_pass_that_fails_leaves_no_call_open() -> None:
    model = Mixed()

    def fails(model: Mixed, x: Tensor) -> None:
        model(x).backward()
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        WideSums(model).around(fails)(model, inputs(1)[0])
    model.matrix.grad = None
    model(inputs(1)[0]).backward()
    assert model.matrix.grad.dtype == torch.bfloat16
