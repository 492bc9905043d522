"""Linear attention over parts of a sequence on several ranks equals that of one process."""

import pytest
import torch
from parallel_cases import Case, in_parts, inputs_of, joined, whole
from ranks import Ranks
from tolerances import KERNEL_OUTPUT, SEQUENCE_PARALLEL, assert_close, relative_error

from transnormer.ops import linear_attention

EVEN, UNEVEN, PAIR = (6, 5, 5, 5), (9, 1, 6, 5), (13, 8)
# A border inside a document, on one, just before one; an empty document; one that ends and one that
# begins in the same part, both over its border.
BORDERS = [(0, 3, 15, 16, 21), (0, 9, 9, 10, 21), (0, 8, 20, 21), (0, 21), (0, 13, 21)]


def compare(ranks: Ranks, case: Case, *, limit: float = SEQUENCE_PARALLEL) -> None:
    """Outputs and all gradients of the parts against those of the whole."""
    exact = whole(case)
    found = joined(case, ranks.run(len(case.lengths), in_parts, case))
    if case.prune:
        exact.pop("dlog_decay", None)
    for name, expected in exact.items():
        assert_close(found[name], expected, limit=limit, name=name)


@pytest.mark.parametrize("exchange", ["gather", "ring", "scan"])
@pytest.mark.parametrize("decay", ["none", "constant", "gate", "key_gate"])
@pytest.mark.parametrize("lengths", [(21,), PAIR, UNEVEN], ids=["ranks1", "ranks2", "ranks4"])
def test_parts_equal_the_whole(
    ranks: Ranks, lengths: tuple[int, ...], decay: str, exchange: str
) -> None:
    compare(ranks, Case(lengths, decay, exchange=exchange, prune=False, state=True))


@pytest.mark.parametrize("decay", ["constant", "key_gate"])
@pytest.mark.parametrize("overlap", [False, True], ids=["before", "overlap"])
@pytest.mark.parametrize("bounds", BORDERS, ids=["inside", "on", "before", "whole", "chain"])
def test_packed_documents_cross_the_borders_of_ranks(
    ranks: Ranks, bounds: tuple[int, ...], overlap: bool, decay: str
) -> None:
    # The state of an empty document stays on no rank.
    state = len(set(bounds)) == len(bounds)
    case = Case(UNEVEN, decay, bounds=bounds, overlap=overlap, prune=False, state=state)
    if not state:
        ends = tuple(sorted(set(bounds)))
        exact = whole(case._replace(bounds=ends))
        found = joined(case, ranks.run(4, in_parts, case._replace(bounds=ends)))
        for name, expected in exact.items():
            assert_close(found[name], expected, limit=SEQUENCE_PARALLEL, name=name)
        return
    compare(ranks, case)


@pytest.mark.parametrize("decay", ["none", "constant", "gate", "key_gate"])
def test_overlapped_exchange_equals_the_whole(ranks: Ranks, decay: str) -> None:
    compare(ranks, Case(UNEVEN, decay, overlap=True, prune=False, state=True))


@pytest.mark.parametrize("decay", ["none", "constant", "gate", "key_gate"])
@pytest.mark.parametrize("bounds", [None, BORDERS[0], BORDERS[4]], ids=["rows", "packed", "chain"])
def test_both_directions_equal_the_whole(
    ranks: Ranks, bounds: tuple[int, ...] | None, decay: str
) -> None:
    compare(ranks, Case(UNEVEN, decay, bounds=bounds, causal=False, prune=False))


@pytest.mark.parametrize("decay", ["none", "constant", "key_gate"])
@pytest.mark.parametrize("overlap", [False, True], ids=["before", "overlap"])
def test_pads_leave_no_trace_in_the_exchange(ranks: Ranks, overlap: bool, decay: str) -> None:
    compare(ranks, Case(UNEVEN, decay, overlap=overlap, pads=True))


@pytest.mark.parametrize("exchange", ["gather", "ring", "scan"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both"])
def test_pruned_heads_equal_the_whole(ranks: Ranks, causal: bool, exchange: str) -> None:
    # exp(-60 x 1) is below float64's precision: one of the four heads needs its neighbour alone.
    compare(ranks, Case(UNEVEN, exchange=exchange, causal=causal))


def test_error_does_not_grow_with_the_ranks(ranks: Ranks) -> None:
    case = Case((84,), "gate", prune=False, dtype=torch.bfloat16, forgets=False)
    given = inputs_of(case)
    q, k, v = (given[name].double() for name in ("q", "k", "v"))
    exact, _ = linear_attention(q, k, v, given["log_decay"])
    errors = {}
    for lengths in ((84,), (42, 42), (21, 21, 21, 21)):
        for overlap in (False, True):
            cut = case._replace(lengths=lengths, overlap=overlap)
            found = joined(cut, ranks.run(len(lengths), in_parts, cut))["o"]
            errors[len(lengths), overlap] = relative_error(found, exact)
    assert max(errors.values()) <= 1.5 * errors[1, False] < KERNEL_OUTPUT[torch.bfloat16]


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["gather", "ring", "scan"])
@pytest.mark.parametrize("decay", ["none", "constant", "gate", "key_gate"])
def test_eight_parts_equal_the_whole(many_ranks: Ranks, decay: str, exchange: str) -> None:
    lengths = (9, 1, 6, 5, 2, 7, 3, 8)
    for bounds in (None, (0, 4, 10, 33, 41)):
        for overlap in (False, True):
            case = Case(lengths, decay, bounds, exchange, overlap, prune=False, state=True)
            compare(many_ranks, case)
