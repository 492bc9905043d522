"""Multi-query associative recall (MQAR): a task that tells memories apart."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from transnormer.data.loader import IGNORED

# Random numbers drawn at once, so that many examples of a large vocabulary stay in small memory.
_DRAWS = 1 << 22


class Recall(NamedTuple):
    """Examples of the task.

    Attributes:
        input_ids: int64 [examples, seq].
        labels: int64 [examples, seq]: the value of the key that stands there, where it stands for
            the second time; -100 elsewhere.
    """

    input_ids: Tensor
    labels: Tensor


def _smallest(x: np.ndarray, count: int) -> np.ndarray:
    """Places of the ``count`` smallest entries of each row, in increasing order of the entries."""
    if count < x.shape[1]:
        places = x.argpartition(count, 1)[:, :count]
    else:
        places = np.broadcast_to(np.arange(x.shape[1]), x.shape)
    order = np.take_along_axis(x, places, 1).argsort(1)
    return np.take_along_axis(places, order, 1)


def _distinct(rng: np.random.Generator, rows: int, size: int, count: int) -> np.ndarray:
    """``count`` of 0 .. size - 1 without repetition, in random order, [rows, count]."""
    return _smallest(rng.random((rows, size)), count)


def _places(rng: np.random.Generator, rows: int, size: int, count: int, power: float) -> np.ndarray:
    """``count`` distinct of 0 .. size - 1, drawn with weights (n + 1)^(power - 1), [rows, count].

    The largest of log weight + Gumbel noise, in order, are draws one after the other.
    """
    weight = (power - 1.0) * np.log(np.arange(1, size + 1))
    noise = -np.log(-np.log(rng.random((rows, size))))
    return _smallest(-(weight + noise), count)


def _examples(
    rng: np.random.Generator, rows: int, seq: int, pairs: int, vocab: int, power: float
) -> tuple[np.ndarray, np.ndarray]:
    keys = 1 + _distinct(rng, rows, vocab // 2 - 1, pairs)
    values = vocab // 2 + _distinct(rng, rows, vocab - vocab // 2, pairs)
    context = 2 * pairs
    places = context + 2 * _places(rng, rows, (seq - context) // 2, pairs, power)
    ids = rng.integers(vocab, size=(rows, seq))
    ids[:, :context:2], ids[:, 1:context:2] = keys, values
    np.put_along_axis(ids, places, keys, 1)
    labels = np.full((rows, seq), IGNORED)
    np.put_along_axis(labels, places, values, 1)
    return ids, labels


def mqar_examples(
    num_examples: int,
    *,
    seq: int = 64,
    num_pairs: int = 4,
    vocab_size: int = 8192,
    power_a: float = 0.01,
    seed: int = 0,
) -> Recall:
    """Examples of multi-query associative recall (Arora et al. 2023, Zoology, arXiv:2312.04927).

    A row begins with num_pairs pairs of a key and its value; later each key stands once more,
    at an even place whose distance follows a power law, and its value is to be said there. Keys are
    drawn from the lower half of the vocabulary (without 0), values from the upper half, neither
    twice in a row; all other tokens are random ones of the whole vocabulary. The same arguments
    give the same examples. Nobody who ignores the pairs says more than one of vocab_size / 2
    values right; who recalls the values without their keys, one of num_pairs.

    Published settings: vocabulary 8192, power_a 0.01, (seq, num_pairs) of (64, 4), (128, 8),
    (256, 16), and (32, 2) in Qin et al. 2024 (arXiv:2405.17383); 100,000 examples to train, 3,000
    to test.

    Args:
        num_examples: rows.
        seq: even length.
        num_pairs: at most seq / 4.
        vocab_size: above seq, and so large that keys and values suffice.
        power_a: exponent + 1 of the power law of the distances, above 0; small ones favour near.
        seed: another seed, other examples.

    Raises:
        ValueError: numbers that do not fit each other.
    """
    rules = (
        ("num_examples", num_examples, num_examples >= 1, "at least 1"),
        ("seq", seq, seq >= 4 and seq % 2 == 0, "an even number, at least 4"),
        ("num_pairs", num_pairs, 1 <= num_pairs <= seq // 4, f"1 to seq / 4, which is {seq // 4}"),
        ("vocab_size", vocab_size, vocab_size > seq, f"more than seq, which is {seq}"),
        ("power_a", power_a, power_a > 0, "a number above 0"),
        ("seed", seed, seed >= 0, "at least 0"),
    )
    for name, value, holds, expected in rules:
        if not holds:
            raise ValueError(f"{name} is {value}; expected {expected}")
    rng, block = np.random.default_rng(seed), max(_DRAWS // vocab_size, 1)
    parts = [
        _examples(rng, min(block, num_examples - start), seq, num_pairs, vocab_size, power_a)
        for start in range(0, num_examples, block)
    ]
    ids, labels = (torch.from_numpy(np.concatenate(x)) for x in zip(*parts))
    return Recall(ids, labels)
