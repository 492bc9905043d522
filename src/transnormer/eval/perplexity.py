"""Likelihood of whole documents: the state is carried from the first token to the last.

There is no window and no stride: every token is predicted from everything before it, the first
one from a begin-of-text token, so that every byte of the text is scored exactly once.
"""

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from transnormer.data.tokenizers import Tokenizer
from transnormer.infer.text import begin_id
from transnormer.models.decoder import Decoder
from transnormer.models.state import DecoderState

# Logits held at once; the tokens of a chunk follow from it and from the vocabulary.
_LOGITS = 2**24
_LONGEST_CHUNK = 2048


NO_NUMBER = (
    "a log-likelihood is nan; expected a number; the weights hold NaN or infinity, or their dtype is "
    "too narrow: take float32"
)


class Score(NamedTuple):
    """Sum of the negative log-likelihoods of a document's tokens, and their number."""

    nats: float
    tokens: int


class TextScore(NamedTuple):
    """How well a model predicts texts; begin-of-text tokens are no tokens of the text."""

    tokens: int
    bytes: int
    nats_per_token: float
    bits_per_byte: float


def score_tokens(
    model: Decoder,
    documents: Sequence[Sequence[int]],
    *,
    first_id: int,
    rows: int = 8,
    chunk: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Score]:
    """Score documents of token ids, several at a time, each from an empty state.

    Log-likelihoods are computed in float32 (float64 for a float64 model), summed in float64.

    Args:
        model: a causal decoder; it runs in eval mode and is left in the mode it was in.
        documents: token ids of each document.
        first_id: the token before the first of each document.
        rows: documents scored side by side.
        chunk: tokens of each read at a time; the result does not depend on it. None fits it to the
            vocabulary, so that memory is bounded.
        progress: called with the number of tokens just scored.

    Returns:
        a score for each document, in their order.

    Raises:
        ValueError: a document without tokens, an id beyond the vocabulary, a model that is not
            causal.
    """
    if not model.config.causal:
        raise ValueError("config.causal is False; expected True: only a causal model scores text")
    for index, ids in enumerate(documents):
        if not len(ids):
            raise ValueError(f"documents[{index}] is empty; expected at least one token")
        wrong = max(ids) if min(ids) >= 0 else min(ids)
        if not 0 <= wrong < model.config.vocab_size:
            raise ValueError(
                f"documents[{index}] holds the id {wrong}; expected 0 <= id < "
                f"{model.config.vocab_size}, the vocabulary of the model; was it made by another "
                "tokenizer?"
            )
    if chunk is None:
        chunk = max(1, min(_LONGEST_CHUNK, _LOGITS // (rows * model.config.vocab_size)))
    # Documents of similar length share a batch: the shorter ones leave it when they end.
    order = sorted(range(len(documents)), key=lambda index: -len(documents[index]))
    training = model.training
    model.eval()
    try:
        found = [
            _score_group(model, [documents[index] for index in group], first_id, chunk, progress)
            for group in _groups(order, rows)
        ]
    finally:
        model.train(training)
    # Read once, at the end: a GPU has its next batches in line while it works.
    nats = dict(zip(order, torch.cat(found).tolist() if found else [], strict=True))
    return [Score(nats[index], len(ids)) for index, ids in enumerate(documents)]


def score_texts(
    model: Decoder,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    rows: int = 8,
    progress: Callable[[int], None] | None = None,
) -> TextScore:
    """Score texts, each a document of its own, ``rows`` at a time, and sum up.

    Raises:
        ValueError: no text that has a byte, a tokenizer with ids beyond the model's vocabulary.
    """
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError("the text is empty; expected at least one byte to score")
    scores = score_tokens(
        model,
        tokenizer.encode_batch(texts),
        first_id=begin_id(model, tokenizer),
        rows=rows,
        progress=progress,
    )
    return text_score(scores, sum(len(text.encode()) for text in texts))


def checked(scores: list[Score]) -> list[Score]:
    """The scores; raises ValueError for one that is no number, which only a broken model gives."""
    if any(math.isnan(score.nats) for score in scores):
        raise ValueError(NO_NUMBER)
    return scores


def text_score(scores: Sequence[Score], num_bytes: int) -> TextScore:
    """Sum up the scores of documents that hold num_bytes bytes of UTF-8 text."""
    nats, tokens = sum(s.nats for s in scores), sum(s.tokens for s in scores)
    return TextScore(tokens, num_bytes, nats / tokens, nats / math.log(2.0) / num_bytes)


def _groups(order: list[int], rows: int) -> list[list[int]]:
    return [order[start : start + rows] for start in range(0, len(order), rows)]


@torch.no_grad()
def _score_group(
    model: Decoder,
    documents: list[Sequence[int]],
    first_id: int,
    chunk: int,
    progress: Callable[[int], None] | None,
) -> Tensor:
    """Nats of each document, float64 [rows] on the model's device; documents come longest first."""
    device = next(model.parameters()).device
    lengths = torch.tensor([len(ids) for ids in documents])
    longest = int(lengths[0])
    padded = torch.full((len(documents), longest + 1), first_id)
    flat = np.fromiter(chain.from_iterable(documents), dtype=np.int64, count=int(lengths.sum()))
    padded[:, 1:][torch.arange(longest) < lengths[:, None]] = torch.from_numpy(flat)
    ids, ends = _sent(padded, device), _sent(lengths[:, None], device)
    places = torch.arange(longest, device=device)
    nats = torch.zeros(len(documents), dtype=torch.float64, device=device)
    state: DecoderState | None = None
    for start in range(0, longest, chunk):
        stop = min(start + chunk, longest)
        active = int((lengths > start).sum())
        if state is not None and active < len(state.positions):
            state = state.select(range(active))
        inputs, labels = ids[:active, start:stop], ids[:active, start + 1 : stop + 1]
        # A row leaves the batch after the chunk in which its document ends: pads are read by states
        # that nobody reads again, so no mask is needed. By a call of the model: one that is shared
        # out over processes is gathered by it.
        logits, state = model(inputs, state=state)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        beyond = places[start:stop] >= ends[:active]
        nats[:active] += losses.view(labels.shape).double().masked_fill(beyond, 0.0).sum(1)
        if progress is not None:
            progress(int((lengths.clamp(max=stop) - start).clamp(min=0).sum()))
    return nats


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; to a GPU one that the host does not wait for."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
