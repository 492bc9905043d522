"""The recall task is the published one."""

import pytest
import torch

from transnormer.data import mqar as module
from transnormer.data import mqar_examples
from transnormer.data.mqar import Recall


def test_every_key_stands_again_and_is_labelled_with_its_value() -> None:
    ids, labels = mqar_examples(50, seq=64, num_pairs=4, vocab_size=200, seed=3)
    assert ids.shape == labels.shape == (50, 64)
    assert ids.dtype == labels.dtype == torch.int64
    assert bool(((ids >= 0) & (ids < 200)).all())
    for row, label in zip(ids.tolist(), labels.tolist()):
        keys, values = row[0:8:2], row[1:8:2]
        assert len(set(keys)) == len(set(values)) == 4
        assert all(1 <= key < 100 for key in keys)
        assert all(100 <= value < 200 for value in values)
        queries = [place for place, y in enumerate(label) if y != -100]
        assert len(queries) == 4
        assert all(place >= 8 and place % 2 == 0 for place in queries)
        assert sorted(row[place] for place in queries) == sorted(keys)
        for place in queries:
            assert label[place] == values[keys.index(row[place])]


def test_examples_are_a_function_of_the_seed() -> None:
    first, same, other = (mqar_examples(20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.input_ids, same.input_ids)
    assert torch.equal(first.labels, same.labels)
    assert not torch.equal(first.input_ids, other.input_ids)


def test_blocks_of_draws_hold_examples_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DRAWS", 1000)
    data = mqar_examples(30, vocab_size=200)
    assert isinstance(data, Recall)
    assert len({tuple(row) for row in data.input_ids.tolist()}) == 30


def test_near_places_are_more_likely_by_the_power_law() -> None:
    _, labels = mqar_examples(4000, seq=44, num_pairs=2, vocab_size=60, power_a=0.5)
    places = (labels != -100).double().mean(0)[4::2]
    weights = torch.arange(1, 21, dtype=torch.float64) ** -0.5
    weights /= weights.sum()
    # Two draws without repetition: the second one from what the first has left.
    left = weights / (1 - weights)
    exact = weights + weights * (left.sum() - left)
    assert (places - exact).abs().max() < 0.03
    _, labels = mqar_examples(4000, seq=44, num_pairs=2, vocab_size=60, power_a=1.0)
    places = (labels != -100).double().mean(0)[4::2]
    assert (places - 0.1).abs().max() < 0.03


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_examples": 0}, "num_examples is 0"),
        ({"seq": 63}, "seq is 63; expected an even number"),
        ({"num_pairs": 17}, "num_pairs is 17; expected 1 to seq / 4, which is 16"),
        ({"vocab_size": 64}, "vocab_size is 64; expected more than seq"),
        ({"power_a": 0.0}, "power_a is 0.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mqar_examples(**{"num_examples": 3, **changes})
