"""A held-out share by hashes: neither order nor place of files plays a part."""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def split_by_key(
    items: Sequence[T], keys: Sequence[str], share: float, seed: int
) -> tuple[list[T], list[T]]:
    """Cut items into a training part and a held-out part, both in their order.

    That share of the different keys (one at least, all but one at most) is held out whose SHA-256,
    salted with the seed, is lowest; items of one key are on one side.

    Raises:
        ValueError: a share outside of (0, 1), fewer than two keys.
    """
    if not 0 < share < 1:
        raise ValueError(f"data.heldout is {share}; expected a share in (0, 1)")
    digests = [hashlib.sha256(f"{seed}:{key}".encode()).digest() for key in keys]
    order = sorted(set(digests))
    if len(order) < 2:
        raise ValueError(f"data.path holds {len(order)} different text; expected at least 2")
    out = set(order[: min(max(1, round(share * len(order))), len(order) - 1)])
    parts: tuple[list[T], list[T]] = ([], [])
    for digest, item in zip(digests, items, strict=True):
        parts[digest in out].append(item)
    return parts
