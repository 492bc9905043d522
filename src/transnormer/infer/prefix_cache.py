"""Snapshots of states at the ends of blocks of a prompt, so that a common beginning is read once."""

import hashlib
from collections import OrderedDict

import torch
from torch import Tensor

from transnormer.models.state import DecoderState
from transnormer.nn.state import state_bytes


def snapshot_bytes(state: DecoderState) -> int:
    """Bytes of a state."""
    return sum(map(state_bytes, state.layers)) + state.positions.nbytes


class PrefixCache:
    """States after whole blocks of tokens, found again by the tokens that led to them.

    A block's key is a hash of the key before it and of its tokens, so equal keys mean equal
    beginnings. A key is known only as long as its snapshot is stored: there is no hit without a
    state. The snapshots used least recently leave first; with room beside it (``spill_bytes``)
    they go to the CPU's memory, and come back when they are found again.

    A snapshot of a recurrent model has a constant size; one of a model with softmax layers holds
    the keys and values of its whole prefix.

    Engines that share a cache are stepped by one thread.

    Args:
        max_bytes: of the snapshots on the model's device.
        spill_bytes: of the snapshots in the CPU's memory; 0 keeps none there.
        block_tokens: tokens from one snapshot to the next.

    Raises:
        ValueError: a size out of range.
    """

    def __init__(self, max_bytes: int, *, spill_bytes: int = 0, block_tokens: int = 1024) -> None:
        for name, value, least in (
            ("max_bytes", max_bytes, 0),
            ("spill_bytes", spill_bytes, 0),
            ("block_tokens", block_tokens, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; expected at least {least}")
        self.max_bytes, self.spill_bytes = max_bytes, spill_bytes
        self.block_tokens = block_tokens
        # From the least to the most recently used.
        self._near: OrderedDict[bytes, DecoderState] = OrderedDict()
        # Beside each snapshot the device that it came from.
        self._far: OrderedDict[bytes, tuple[DecoderState, torch.device]] = OrderedDict()
        self.nbytes = self.spilled_bytes = 0

    def __len__(self) -> int:
        return len(self._near) + len(self._far)

    def __contains__(self, key: bytes) -> bool:
        return key in self._near or key in self._far

    def keys(self, ids: Tensor, root: str) -> list[bytes]:
        """The keys of the whole blocks of a prompt, int64 [tokens] on the CPU.

        Args:
            ids: the prompt.
            root: what else the states follow from: the fingerprint of the model.
        """
        key, found = hashlib.sha256(root.encode()).digest(), []
        whole = len(ids) // self.block_tokens * self.block_tokens
        for block in ids[:whole].split(self.block_tokens) if whole else ():
            key = hashlib.sha256(key + block.contiguous().numpy().tobytes()).digest()
            found.append(key)
        return found

    def longest(self, keys: list[bytes]) -> tuple[int, DecoderState | None]:
        """The most blocks of a prompt that a snapshot is stored for, and that snapshot.

        Args:
            keys: of the prompt's blocks, in order.

        Returns:
            number of blocks and the state after them, or 0 and None. The state is not to be
            modified.
        """
        for count in range(len(keys), 0, -1):
            key = keys[count - 1]
            if key in self._near:
                self._near.move_to_end(key)
                return count, self._near[key]
            if key in self._far:
                state, device = self._far.pop(key)
                self.spilled_bytes -= snapshot_bytes(state)
                state = state.to(device)
                self.put(key, state)
                return count, state
        return 0, None

    def put(self, key: bytes, state: DecoderState) -> None:
        """Store a snapshot; others leave as the bounds demand, and it is not kept if too large."""
        if key in self._near:
            self._near.move_to_end(key)
            return
        if key in self._far:
            self.spilled_bytes -= snapshot_bytes(self._far.pop(key)[0])
        size = snapshot_bytes(state)
        if size > self.max_bytes:
            self._spill(key, state)
            return
        while self.nbytes + size > self.max_bytes:
            oldest, old = self._near.popitem(last=False)
            self.nbytes -= snapshot_bytes(old)
            self._spill(oldest, old)
        self._near[key] = state
        self.nbytes += size

    def clear(self) -> None:
        """Forget every snapshot."""
        self._near.clear()
        self._far.clear()
        self.nbytes = self.spilled_bytes = 0

    def _spill(self, key: bytes, state: DecoderState) -> None:
        size = snapshot_bytes(state)
        if size > self.spill_bytes:
            return
        while self.spilled_bytes + size > self.spill_bytes:
            _, (old, _) = self._far.popitem(last=False)
            self.spilled_bytes -= snapshot_bytes(old)
        self._far[key] = state.to("cpu"), state.positions.device
        self.spilled_bytes += size
