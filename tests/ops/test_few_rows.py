"""Products of few rows on a CPU: those of the matrices, to the dtype's rounding."""

import pytest
import torch
from tolerances import assert_close

from transnormer.ops import few_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(5, 3), (96, 64), (128, 33), (64, 2816)]


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_is_that_of_the_transposed_matrix(dtype: torch.dtype, rows: int) -> None:
    for outputs, inputs in SIZES:
        x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
        y = few_rows.product(x, weight)
        assert (y.dtype, y.is_contiguous()) == (dtype, True)
        assert_close(y, x.double() @ weight.double().T)


def integers(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix of integers and scales of its rows."""
    return torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8), torch.rand(outputs) + 0.1


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_with_integers_is_that_of_what_they_stand_for(
    dtype: torch.dtype, rows: int
) -> None:
    for outputs, inputs in SIZES:
        x, (weight, scales) = torch.randn(rows, inputs).to(dtype), integers(outputs, inputs)
        # Rows whose sizes differ have steps of their own.
        x = x * 10.0 ** -torch.arange(rows).unsqueeze(1).to(dtype)
        y = few_rows.int8_product(x, weight, scales.to(dtype))
        assert (y.dtype, y.is_contiguous()) == (dtype, True)
        exact = x.double() @ weight.double().T * scales.to(dtype).double()
        for made, row in zip(y, exact, strict=True):
            assert_close(made, row)


def test_bfloat16_elements_are_kept_exactly_down_to_2_to_the_minus_14_of_the_largest() -> None:
    x = torch.ones(1, 64)
    x[0, 1:] = -(1.0 + torch.arange(63) / 128) * 2.0**-14
    weight = torch.eye(64, dtype=torch.int8) * -128
    y = few_rows.int8_product(x.bfloat16(), weight, torch.full((64,), 2.0**-7))
    assert torch.equal(y, -x.bfloat16())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_gives_nan_and_leaves_the_others(bad: float) -> None:
    x, (weight, scales) = torch.randn(3, 32), integers(8, 32)
    x[1, 5] = bad
    y = few_rows.int8_product(x, weight, scales)
    assert y.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("size", [0.0, 1e-36, 3e38])
def test_rows_at_the_ends_of_float32_are_finite(size: float) -> None:
    weight = torch.ones(4, 32, dtype=torch.int8)
    y = few_rows.int8_product(torch.full((1, 32), size), weight, torch.full((4,), 0.01))
    assert y.isfinite().all()
    assert y[0, 0].item() == pytest.approx(0.32 * size, rel=0.01, abs=0.0)


def test_no_rows_have_a_product() -> None:
    weight, scales = integers(8, 32)
    assert few_rows.int8_product(torch.randn(0, 32), weight, scales).shape == (0, 8)
    assert few_rows.product(torch.randn(0, 32), weight.float()).shape == (0, 8)


def test_autocast_does_not_round_the_sums_of_integers() -> None:
    x, (weight, scales) = torch.randn(2, 32), integers(8, 32)
    exact = few_rows.int8_product(x, weight, scales)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(few_rows.int8_product(x, weight, scales), exact)


def test_products_of_integers_are_chosen_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = few_rows.reads_integers.__wrapped__
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert reads(65_536)
    assert not reads(65_537)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not reads(64)
