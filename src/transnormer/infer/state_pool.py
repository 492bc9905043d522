"""What every pool of states can do: read and write slots, and advance them by the model."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from transnormer.infer.reading import advance, evaluate
from transnormer.models.decoder import Decoder
from transnormer.models.state import DecoderState


class StatePool(ABC):
    """States of up to ``slots`` sequences of one model.

    Args:
        model: a causal decoder.
        slots: sequences that there is room for.
        compiled: the blocks are compiled; what has no fixed shape then runs as if they were not.
    """

    def __init__(self, model: Decoder, slots: int, *, compiled: bool = False) -> None:
        self.model, self.slots = model, slots
        self.device = next(model.parameters()).device
        self._empty = model.empty_state(1)
        # What ``verify`` leaves to ``keep``: ids, slots, and the states before and after.
        self._compiled = compiled
        self._verified: tuple[Tensor, list[int], DecoderState | None, DecoderState | None] | None
        self._verified = None
        # Of the last ``decode``, as ``StepOutput`` has it; None where the logits are to be asked.
        self.likeliest: Tensor | None = None

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the states held now."""

    @abstractmethod
    def read(self, slots: Sequence[int]) -> DecoderState:
        """A copy of the states of some slots, a row each."""

    @abstractmethod
    def write(self, slots: Sequence[int], state: DecoderState) -> None:
        """Set the states of some slots, each named once, from the rows of ``state``."""

    @abstractmethod
    def decode(self, ids: Tensor, slots: Sequence[int], rows: int) -> Tensor:
        """Advance slots by a token each: ids [n, 1] on the CPU; logits [n, 1, vocab_size].

        Runs as a batch of ``rows`` >= n rows, so that its shape does not depend on n. Where the pool
        ``runs_ahead``, ids may be on its device too.
        """

    @property
    def runs_ahead(self) -> bool:
        """Whether ``decode`` takes tokens that the host has not seen, and does not wait for them."""
        return False

    def reset(self, slot: int) -> None:
        """Make a slot the start of a sequence."""
        self.write([slot], self._empty)

    def prefill(
        self, pieces: Sequence[Tensor], slots: Sequence[int], *, every: bool = False
    ) -> Tensor:
        """Read the next tokens of slots in one packed call.

        Args:
            pieces: ids [tokens] for each slot, on the CPU, of any lengths.
            slots: which sequences they continue.
            every: give the logits after every token of the only piece, [tokens, vocab_size].

        Returns:
            logits after the last token of each, [n, vocab_size].
        """
        state = self.read(slots)
        packed = torch.cat(list(pieces))[None].to(self.device)
        bounds: Tensor | None = None
        if len(pieces) > 1:
            bounds = torch.tensor([0, *map(len, pieces)]).cumsum(0).to(self.device)
        with self._plain():
            logits, state = advance(self.model, packed, state, cu_seqlens=bounds, every=every)
        self.write(slots, state)
        return logits

    def _plain(self) -> AbstractContextManager[Any]:
        """Within it blocks run uncompiled: each new length would be compiled anew."""
        return torch.compiler.set_stance("force_eager") if self._compiled else nullcontext()

    def verify(self, ids: Tensor, slots: Sequence[int], rows: int) -> Tensor:
        """Logits after each of several tokens of slots, of which ``keep`` then keeps the first.

        Args:
            ids: [n, tokens] on the CPU.
            slots: n sequences.
            rows: of the batch, as ``decode``'s.

        Returns:
            logits [n, tokens, vocab_size].
        """
        before = self.read(slots)
        with self._plain():
            output = evaluate(self.model, ids.to(self.device), state=before)
        self._verified = (ids, list(slots), before, output.state)
        return output.logits

    def keep(self, counts: Sequence[int]) -> None:
        """Keep the first ``counts`` tokens of each row of the last ``verify``, and no others."""
        assert self._verified is not None
        (ids, slots, before, after), self._verified = self._verified, None
        assert after is not None
        tokens = ids.shape[1]
        if min(counts) < tokens:
            # Tokens cannot be taken out of a sum: the snapshot reads again those that stay.
            mask = torch.arange(tokens) < torch.tensor(counts)[:, None]
            with self._plain():
                _, after = advance(
                    self.model, ids.to(self.device), before, mask=mask.to(self.device)
                )
        self.write(slots, after)
