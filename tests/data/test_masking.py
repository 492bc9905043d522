"""Hidden tokens: how many, which, what stands in their place, and that two integers decide it."""

import numpy as np
import pytest

from transnormer.data import ByteTokenizer, Masking
from transnormer.data.masking import Masked

MASK = 259
IDS = np.frombuffer(b"the state is a matrix", dtype=np.uint8).astype(np.int64)


def make(**changes: float) -> Masking:
    fields = {"share": 0.15, "mask": 0.8, "random": 0.1, "seed": 0} | changes
    return Masking(ByteTokenizer(), MASK, **fields)


def same(one: Masked, other: Masked) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("length", "count"), [(1, 1), (3, 1), (10, 2), (21, 3), (1000, 150)])
def test_a_fixed_share_of_the_tokens_is_asked_for(length: int, count: int) -> None:
    masked = make().apply(np.full(length, 65), 7)
    assert (masked.labels != -100).sum() == count


def test_labels_are_the_tokens_and_the_others_stay() -> None:
    masked = make(share=0.5).apply(IDS, 0)
    asked = masked.labels != -100
    assert np.array_equal(masked.labels[asked], IDS[asked])
    assert np.array_equal(masked.inputs[~asked], IDS[~asked])


def test_four_fifths_are_hidden_a_tenth_replaced_and_a_tenth_kept() -> None:
    ids = np.full(200_000, 65)
    masked = make(share=0.5).apply(ids, 3)
    seen = masked.inputs[masked.labels != -100]
    # Four standard deviations of a share of 100,000 draws are under 0.006.
    assert (seen == MASK).mean() == pytest.approx(0.8, abs=0.006)
    assert (seen == 65).mean() == pytest.approx(0.1, abs=0.006)
    drawn = seen[(seen != MASK) & (seen != 65)]
    assert drawn.min() == 0
    assert drawn.max() == 255


@pytest.mark.parametrize(
    ("shares", "expected"),
    [((1.0, 0.0), "hidden"), ((0.0, 1.0), "replaced"), ((0.0, 0.0), "kept")],
)
def test_the_shares_are_options(shares: tuple[float, float], expected: str) -> None:
    masked = make(share=1.0, mask=shares[0], random=shares[1]).apply(np.full(5000, 65), 1)
    if expected == "hidden":
        assert bool((masked.inputs == MASK).all())
    elif expected == "replaced":
        assert len(np.unique(masked.inputs)) == 256
    else:
        assert bool((masked.inputs == 65).all())


def test_special_tokens_are_never_asked_for_nor_put_in() -> None:
    ids = np.array([257, 65, 258, 256, 66])
    for number in range(50):
        masked = make(share=1.0).apply(ids, number)
        assert (masked.labels != -100).tolist() == [False, True, False, False, True]
        assert set(masked.inputs[[1, 4]].tolist()) <= {*range(256), MASK}
    assert make().apply(np.array([257, 258]), 0).labels.tolist() == [-100, -100]


def test_unusable_tokens_are_not_asked_for() -> None:
    usable = np.arange(len(IDS)) % 2 == 0
    asked = make(share=1.0).apply(IDS, 0, usable).labels != -100
    assert np.array_equal(asked, usable)


def test_the_draws_are_a_function_of_seed_and_number() -> None:
    assert same(make().apply(IDS, 5), make().apply(IDS.copy(), 5))
    assert not same(make().apply(IDS, 5), make().apply(IDS, 6))
    assert not same(make().apply(IDS, 5), make(seed=1).apply(IDS, 5))


def test_the_draws_are_the_same_in_every_release() -> None:
    masked = make(share=0.5, mask=0.5, random=0.4, seed=3).apply(IDS, 11)
    asked = masked.labels != -100
    assert np.flatnonzero(asked).tolist() == [1, 2, 6, 7, 8, 9, 11, 13, 18, 19]
    seen = [133, 101, 203, MASK, MASK, 193, MASK, 97, 239, MASK]
    assert masked.inputs[asked].tolist() == seen


def test_the_sample_is_not_modified() -> None:
    before = IDS.copy()
    make(share=1.0).apply(IDS, 0)
    assert np.array_equal(IDS, before)
