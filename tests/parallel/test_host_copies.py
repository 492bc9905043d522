"""Copies in the host's memory that are taken again and again."""

from typing import Any

import pytest
import torch

from transnormer.parallel import host_copies
from transnormer.parallel.host_copies import HostCopies, packed


def test_copies_keep_their_values_and_later_ones_their_memory() -> None:
    x = {
        "matrix": torch.randn(5, 7).T,
        "half": torch.randn(3).bfloat16(),
        "number": torch.tensor(2.5),
        "nothing": torch.empty(0, 4),
        "whole": torch.arange(9).view(3, 3),
    }
    copies = HostCopies()
    first = copies.take(x)
    before = {name: value.clone() for name, value in x.items()}
    for value in x.values():
        value.add_(1)
    copies.hold()
    copies.wait()
    for name, value in before.items():
        assert first[name].dtype == value.dtype
        assert torch.equal(first[name], value)
        assert first[name].is_contiguous()
    again = copies.take(x)
    assert all(torch.equal(again[name], value) for name, value in x.items())
    assert [c.data_ptr() for c in again.values()] == [c.data_ptr() for c in first.values()]


def test_a_tensor_that_has_grown_gets_memory_of_its_own() -> None:
    copies = HostCopies()
    small = copies.take({"a": torch.ones(3), "b": torch.zeros(3)})
    found = copies.take({"a": torch.full((400,), 2.0), "b": torch.full((3,), 3.0)})
    assert found["a"].tolist() == [2.0] * 400
    assert found["b"].tolist() == [3.0] * 3
    assert found["b"].data_ptr() == small["b"].data_ptr()


def test_memory_comes_in_few_pieces_in_which_nothing_overlaps() -> None:
    sizes = {f"x{i}": 997 * i for i in range(60)} | {"large": 1 << 17}
    lengths, places = packed(sizes, 1 << 16)
    assert len(lengths) <= sum(sizes.values()) / (1 << 16) + 2
    assert max(lengths) == 1 << 17
    for piece, length in enumerate(lengths):
        spans = sorted((at, at + sizes[n]) for n, (where, at) in places.items() if where == piece)
        assert all(start % 64 == 0 for start, _ in spans)
        assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
        assert spans[-1][1] <= length
    assert packed({"a": 10}, 1 << 30)[0] == [256]


def test_a_host_without_room_is_told_of_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(host_copies.torch, "empty", full)
    with pytest.raises(RuntimeError, match=r"no room for copies of 0\.0 GB .* set it to false"):
        HostCopies().take({"a": torch.ones(3)})
