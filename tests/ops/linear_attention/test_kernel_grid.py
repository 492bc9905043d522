"""The grid that GPU tests run covers what it should, and its measure sees single bad rows."""

from itertools import combinations

import pytest
import torch
from kernel_grid import (
    BF16,
    FACTORS,
    FP32,
    PARTLY,
    TYPICAL,
    Case,
    assert_decay_close,
    assert_results_close,
    assert_rows_close,
    covering_grid,
    exact_results,
    make_call,
    pairs_of,
    run,
)
from tolerances import KERNEL_OUTPUT


def test_grid_has_every_setting_and_nearly_every_pair_of_settings() -> None:
    seen = set().union(*(pairs_of(case) for case in covering_grid()))
    for a, b in combinations(FACTORS, 2):
        wanted = {((a, x), (b, y)) for x in FACTORS[a] for y in FACTORS[b]}
        share = len(wanted & seen) / len(wanted)
        assert share >= (0.4 if {a, b} in PARTLY else 1.0), f"{a} with {b}: {share}"


def test_grid_is_the_same_at_every_call() -> None:
    assert covering_grid() == covering_grid()
    assert len({case.id for case in covering_grid()}) == len(covering_grid())


@pytest.mark.parametrize("name", ["few", "packed"])
def test_the_measure_accepts_rounding_and_sees_one_bad_row(name: str) -> None:
    case = Case((16, 20), 300, BF16, "mixed", name, state=True)
    call = make_call(case, "cpu")
    exact, actual = exact_results(call), run(call, "chunked")
    assert_results_close(actual, exact, BF16, 128)
    for result in ("o", "gradient of k", "final_state"):
        spoiled = dict(actual)
        spoiled[result] = actual[result].clone()
        spoiled[result][0, -1] *= 1.1
        with pytest.raises(AssertionError, match=result):
            assert_results_close(spoiled, exact, BF16, 128)
    spoiled = actual | {"gradient of log_decay": actual["gradient of log_decay"] * 1.03}
    with pytest.raises(AssertionError, match="log_decay"):
        assert_results_close(spoiled, exact, BF16, 128)


@pytest.mark.parametrize("row", [0, 63, 64, 127, 128, 299])
def test_the_measure_sees_what_is_wrong_at_edges_only(row: int) -> None:
    exact = torch.randn(1, 300, 2, 16, dtype=torch.float64)
    actual, limit = exact.float(), KERNEL_OUTPUT[FP32]
    assert_rows_close(actual, exact, limit, 128, "o")
    # Below the limit for the whole head, three times it for the rows at an edge.
    actual[:, row] += 3 * limit * exact[:, row].float() * (1.5 if row % 64 in (0, 63) else 4)
    with pytest.raises(AssertionError, match=r"o: errors .* at"):
        assert_rows_close(actual, exact, limit, 128, "o")


def test_a_gradient_small_by_chance_is_judged_by_its_typical_size() -> None:
    exact, typical = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    assert_decay_close(torch.tensor([1e-3, 0.0]), exact, typical, 1e-2)
    with pytest.raises(AssertionError, match="log_decay"):
        assert_decay_close(torch.tensor([0.1, 0.0]), exact, typical, 1e-2)


@pytest.mark.parametrize("decay", ["zero", "first", "paper", "inf"])
def test_typical_gradients_are_what_random_gradients_give(decay: str) -> None:
    call = make_call(Case((16, 20), 40, FP32, decay, state=True, heads=4), "cpu")
    typical, squares = exact_results(call)[TYPICAL], []
    for _ in range(40):
        draws = {"do": torch.randn_like(call.do), "d_final": torch.randn_like(call.d_final)}
        squares.append(run(call._replace(**draws), "chunked")["gradient of log_decay"].square())
    seen = torch.stack(squares).mean(0).sqrt()
    # 40 draws know a mean square to within a third or so.
    assert torch.allclose(seen.double(), typical, rtol=0.4, atol=1e-12)
