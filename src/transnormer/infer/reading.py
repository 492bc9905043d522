"""Reading tokens into a state: one call, or a stream of any length in bounded memory."""

from collections.abc import Iterable

import torch
from torch import Tensor

from transnormer.models.decoder import Decoder, DecoderOutput
from transnormer.models.state import DecoderState


@torch.no_grad()
def evaluate(model: Decoder, input_ids: Tensor, **options: object) -> DecoderOutput:
    """``model(input_ids, **options)`` in eval mode, without gradients; the mode is left as it was.

    Args:
        model: a decoder.
        input_ids: [batch, seq].
        options: of ``Decoder.forward``.
    """
    if not model.training:
        return model(input_ids, **options)
    model.eval()
    try:
        return model(input_ids, **options)
    finally:
        model.train()


def advance(
    model: Decoder,
    input_ids: Tensor,
    state: DecoderState | None,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    every: bool = False,
) -> tuple[Tensor, DecoderState]:
    """Logits after the last token of each row or packed sequence, [rows, vocab_size], and the state.

    Args:
        model: a causal decoder; runs in eval mode.
        input_ids: [batch, seq], or [1, seq] with cu_seqlens.
        state: what came before; not modified.
        cu_seqlens: bounds of packed sequences.
        mask: False tokens leave no trace.
        every: logits after every token of the only row instead, [seq, vocab_size].
    """
    kept = None if every else 1
    output = evaluate(
        model, input_ids, state=state, cu_seqlens=cu_seqlens, mask=mask, logits_to_keep=kept
    )
    assert output.state is not None
    if every:
        return output.logits[0], output.state
    logits = output.logits[0] if cu_seqlens is not None else output.logits[:, -1]
    return logits, output.state


def read(
    model: Decoder, pieces: Iterable[Tensor], state: DecoderState | None = None
) -> tuple[Tensor, DecoderState]:
    """Read a text of any length, piece by piece: a stream that never ends needs bounded memory.

    Only the state is kept from piece to piece; its size is constant for models that are recurrent
    throughout, and positions are int64, so both the memory and the positions of the millionth
    token are those of the first. A model with softmax layers keeps their keys and values.

    Args:
        model: a causal decoder; runs in eval mode.
        pieces: ids [batch, seq] of the rows' next tokens, at least one piece; any lengths. They are
            taken one at a time and moved to the model's device.
        state: what came before; not modified. None is the start.

    Returns:
        the logits after the last token, [batch, vocab_size], and the state there.

    Raises:
        ValueError: no piece, or what ``Decoder.forward`` refuses.
    """
    device = next(model.parameters()).device
    logits: Tensor | None = None
    for piece in pieces:
        logits, state = advance(model, piece.to(device), state)
    if logits is None or state is None:
        raise ValueError("pieces is empty; expected at least one piece of tokens")
    return logits, state
