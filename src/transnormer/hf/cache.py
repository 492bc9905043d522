"""The state of a decoder as a cache of transformers, with roll-back of the last tokens."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from transnormer.models.state import DecoderState
from transnormer.nn.state import tensors_of

# So many of the last tokens can be rolled back where roll-back is on.
ROLL_BACK_TOKENS = 128
# Tokens that are read again as part of the next call; more of them have a call of their own.
_READ_AGAIN = 32


class Read(NamedTuple):
    """One call of the model: where it started, and what it read.

    Attributes:
        start: tokens before it, pads included.
        state: before it.
        input_ids: [batch, seq]; None where embeddings were given.
        mask: bool [batch, seq] or None.
        positions: int64 [batch, seq] or None.
    """

    start: int
    state: DecoderState | None
    input_ids: Tensor | None
    mask: Tensor | None
    positions: Tensor | None

    def end(self, length: int) -> int:
        """Tokens after it, given the tokens of the whole cache."""
        return length if self.input_ids is None else self.start + self.input_ids.shape[1]

    def cut(self, count: int) -> "Read":
        """The same up to ``count`` of its tokens."""
        assert self.input_ids is not None
        return self._replace(
            input_ids=self.input_ids[:, :count],
            mask=None if self.mask is None else self.mask[:, :count],
            positions=None if self.positions is None else self.positions[:, :count],
        )


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    """Parts along seq; None where one is."""
    found = [x for x in parts if x is not None]
    return torch.cat(found, 1) if len(found) == len(parts) else None


class DecoderCache(Cache):
    """What a decoder carries from token to token, for ``past_key_values``.

    Recurrent states have one size whatever was read, in float32 (float64 for a float64 model), so
    the cache does not grow where no layer is softmax attention. Roll-back (``crop``, which assisted
    decoding needs) does not undo a state: the cache keeps the state before each of the last calls,
    and the tokens that stay of the call that is cut are read again with the next ones.

    Attributes:
        state: the state of the model; None before the first token.
        pending: tokens that the next call reads before its own; None where there are none.
    """

    def __init__(self, state: DecoderState | None = None, *, length: int | None = None) -> None:
        """Begin with a state, or with none.

        Args:
            state: what was read before; its first row tells how much where length is None.
            length: tokens that the state has read, pads included.
        """
        super().__init__(layers=[])
        if length is None:
            length = 0 if state is None else int(state.positions.max())
        self.state = state
        self.pending: Read | None = None
        self._length = length
        self._reads: list[Read] | None = None

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.layers)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(tokens={self.get_seq_length()}, rows={self.batch_size})"

    def replace(self, state: DecoderState, read: Read | None, count: int) -> None:
        """Take the state after a call that read ``count`` tokens.

        Args:
            state: after the call.
            read: what it read; needed where roll-back is on.
            count: its tokens, those that were pending not counted.
        """
        self.state, self.pending = state, None
        self._length += count
        if self._reads is not None and read is not None:
            self._reads.append(read)
            self._forget(self._length - ROLL_BACK_TOKENS)

    def _forget(self, length: int) -> None:
        """Drop the calls that ended at ``length`` or before: nothing is cut there any more."""
        assert self._reads is not None
        self._reads = [read for read in self._reads if read.end(self._length) > length]

    @property
    def records(self) -> bool:
        """Whether roll-back is on."""
        return self._reads is not None

    def joined(self, read: Read) -> Read | None:
        """The pending tokens and the next ones as one call; None where they need two, or one."""
        first = self.pending
        if first is None or first.input_ids is None or read.input_ids is None:
            return None
        uneven = (first.positions is None) != (read.positions is None)
        if uneven or first.input_ids.shape[1] > _READ_AGAIN:
            return None
        masks: list[Tensor | None] = [first.mask, read.mask]
        if any(mask is not None for mask in masks):
            masks = [
                torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
                for mask, ids in zip(masks, (first.input_ids, read.input_ids))
            ]
        return Read(
            first.start,
            first.state,
            _cat([first.input_ids, read.input_ids]),
            _cat(masks),
            _cat([first.positions, read.positions]),
        )

    def settled(self, state: DecoderState) -> None:
        """Take the state after the pending tokens, which were read on their own."""
        self.state, self.pending = state, None

    def activate_past_recording(self) -> None:
        """Turn roll-back on: from now on the state before each of the last calls is kept."""
        if self._reads is None:
            self._reads = []

    @property
    def is_croppable(self) -> bool:
        """Whether roll-back is on."""
        return self.records

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens.

        Args:
            tokens_to_remove: minus their number, as in transformers 5; a positive number is the
                length that stays.

        Raises:
            RuntimeError: roll-back is off, or the tokens were read too long ago.
        """
        # Assisted decoding passes a tensor.
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove > 0:
            length = min(tokens_to_remove, self._length)
        else:
            length = self._length + tokens_to_remove
        if length == self._length:
            if self._reads is not None:
                self._forget(length)
            return
        if self._reads is None:
            raise RuntimeError(
                f"crop takes back {self._length - length} tokens; expected roll-back to be on, "
                "since a recurrent state holds no single tokens; call activate_past_recording() "
                "before they are read"
            )
        for read in reversed(self._reads):
            inside = read.start < length and read.input_ids is not None
            if read.start == length or (inside and length < read.end(self._length)):
                break
        else:
            raise RuntimeError(
                f"crop goes back to token {length} of {self._length}; expected one of the last "
                f"{ROLL_BACK_TOKENS}, read while roll-back was on, as token ids"
            )
        self._reads = [other for other in self._reads if other.start < read.start]
        self.state = read.state
        self.pending = read.cut(length - read.start) if length > read.start else None
        self._length = length
        # What is before a cut is accepted.
        self._forget(length)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that were read, pads included."""
        return self._length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the keys of a mask over past and new tokens."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no limit."""
        return -1

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Whether anything was read."""
        return self.get_seq_length() > 0

    @property
    def batch_size(self) -> int:
        """Rows of the state; -1 before the first token."""
        return -1 if self.state is None else self.state.positions.shape[0]

    @property
    def is_initialized(self) -> bool:
        """Whether there is a state."""
        return self.state is not None

    @property
    def is_compileable(self) -> bool:
        """False: each call makes new tensors; ``StaticDecoderCache`` keeps its own."""
        return False

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.pending, self._length = None, None, 0
        if self._reads is not None:
            self._reads = []

    def _select(self, rows: Tensor) -> None:
        if self.pending is not None:
            raise RuntimeError(
                "the cache was cropped and its tokens are still to be read; expected a call of the "
                "model before rows are selected"
            )
        if self.state is not None:
            self._take(self.state.select(rows.to(self.state.positions.device)))
        if self._reads is not None:
            self._reads = []

    def _take(self, state: DecoderState) -> None:
        self.state = state

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of ``beam_idx``; a row may come more than once."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times, next to each other."""
        if self.state is not None:
            rows = torch.arange(self.batch_size, device=self.state.positions.device)
            self._select(rows.repeat_interleave(repeats))

    def _refuse(self, name: str) -> Any:
        raise NotImplementedError(
            f"{name} is of caches of keys and values; expected none of a DecoderCache, which the "
            "model updates as a whole"
        )

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the model replaces the whole state."""
        return self._refuse("update")

    def early_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the shapes follow from the model; see ``StaticDecoderCache``."""
        self._refuse("early_initialization")


class StaticDecoderCache(DecoderCache):
    """A cache whose tensors stay where they are, for compiled decoding and CUDA graphs."""

    def __init__(self, state: DecoderState) -> None:
        """Hold a state before the first token.

        Args:
            state: ``Decoder.empty_state(rows)``; it is changed in place from now on.

        Raises:
            NotImplementedError: a layer whose state grows with what was read.
        """
        for index, layer in enumerate(state.layers):
            if any(x.numel() == 0 for x in tensors_of(layer)):
                raise NotImplementedError(
                    f"the state of layer {index} grows with the text; expected one size for a "
                    "static cache; use cache_implementation=None"
                )
        super().__init__(state, length=0)
        # Every row begins alike, and not with zeros in every mixer.
        self._first = state.select([0])
        # A number on the device: a Python one would be a constant of each compiled graph.
        self._count = torch.zeros((), dtype=torch.int64, device=state.positions.device)
        for x in self._tensors():
            torch._dynamo.mark_static_address(x)

    def _tensors(self) -> list[Tensor]:
        assert self.state is not None
        layers = [x for layer in self.state.layers for x in tensors_of(layer)]
        return [*layers, self.state.positions, self._count]

    def replace(self, state: DecoderState, read: Read | None, count: int) -> None:
        """Copy the state after a call of ``count`` tokens into this cache's tensors."""
        self._take(state)
        self._count += count

    def _take(self, state: DecoderState) -> None:
        new = [x for layer in state.layers for x in tensors_of(layer)]
        for own, x in zip(self._tensors(), [*new, state.positions]):
            own.copy_(x)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that were read, pads included; waits for the device."""
        return int(self._count)

    @property
    def is_compileable(self) -> bool:
        """True: shapes and addresses never change."""
        return True

    def activate_past_recording(self) -> None:
        """Refused: roll-back keeps old states, and a static cache has one."""
        self._refuse("roll-back of a static cache")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused: the number of rows is fixed."""
        self._refuse("batch_repeat_interleave of a static cache")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refused: the number of rows is fixed."""
        self._refuse("batch_select_indices of a static cache")

    def reset(self) -> None:
        """Forget everything, in place."""
        self._take(self._first.select([0] * self.batch_size))
        self._count.zero_()
