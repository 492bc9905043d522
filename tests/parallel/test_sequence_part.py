"""How sequences are cut among ranks."""

import pytest
import torch

from transnormer.parallel.sequence_part import cut, even_lengths


def test_equal_parts_differ_by_a_token_at_most() -> None:
    assert even_lengths(11, 4) == (3, 3, 3, 2)
    with pytest.raises(ValueError, match="seq is 3; expected at least one token for each of 4"):
        even_lengths(3, 4)


def test_a_part_knows_how_far_its_sequences_reach() -> None:
    bounds = torch.tensor([0, 3, 3, 9, 12])
    part, local = cut(12, 1, (4, 4, 4), cu_seqlens=bounds)
    assert local is not None
    assert local.tolist() == [0, 4]
    assert (part.history, part.future, part.one_sequence) == (1, 1, True)
    part, local = cut(12, 2, (4, 4, 4), cu_seqlens=bounds)
    assert local is not None
    assert local.tolist() == [0, 1, 4]
    assert (part.first_end, part.last_start, part.history, part.future) == (1, 1, 5, 0)
    part, local = cut(12, 0, (3, 5, 4), cu_seqlens=bounds)
    assert (part.history, part.future) == (0, 0)


def test_rows_reach_over_all_parts() -> None:
    part, local = cut(12, 1, (4, 5, 3))
    assert local is None
    assert (part.start, part.end, part.history, part.future) == (4, 9, 4, 3)


@pytest.mark.parametrize("lengths", [(4, 4, 3), (0, 12), (13, -1)])
def test_lengths_that_do_not_fit_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected positive numbers whose sum is 12"):
        cut(12, 0, lengths)
