"""Log-likelihood of continuations: a context is read once, its state is forked for every choice.

Contexts that begin alike, such as questions behind the same examples, share the reading of that
beginning too. There is no window: a context is read whole, in pieces of bounded memory.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from transnormer.eval.perplexity import NO_NUMBER
from transnormer.infer.prompts import checked_ids
from transnormer.infer.reading import advance, read
from transnormer.models.decoder import Decoder
from transnormer.models.state import DecoderState
from transnormer.ops.cross_entropy import IGNORE_INDEX

# Tokens that one call reads; longer contexts come in pieces, shorter ones share a call.
_TOKENS = 8192
# Logits held at once.
_LOGITS = 2**24
# A shared beginning of fewer tokens is not worth a call of its own.
_SHARED = 32

Progress = Callable[[int], None]


class Likelihood(NamedTuple):
    """How likely a continuation is.

    Attributes:
        logprob: sum of the log-probabilities of its tokens, in nats.
        greedy: whether each of its tokens is the likeliest one.
    """

    logprob: float
    greedy: bool


class _Read(NamedTuple):
    """A beginning of contexts that has been read, and the state behind it, one row."""

    ids: tuple[int, ...]
    state: DecoderState


def score_continuations(
    model: Decoder,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    rows: int = 8,
    progress: Progress | None = None,
) -> list[Likelihood]:
    """Score continuations, each after its context, from an empty state.

    log p(continuation | context) = sum_t log softmax(logits_t)[continuation_t]. Softmax in float32
    (float64 for a float64 model), sums in float64. Every distinct context is read once, whatever
    the number and the order of the requests that have it.

    Args:
        model: a causal decoder; it runs in eval mode and is left in the mode it was in.
        requests: (ids of the context, ids of the continuation), neither of them empty.
        rows: states that a call works on; results depend on it by rounding alone.
        progress: called with the number of requests just scored.

    Returns:
        a likelihood for each request, in their order.

    Raises:
        ValueError: an empty context or continuation, an id beyond the vocabulary, rows below 1, a
            model that is not causal, or whose logits are no numbers.
    """
    check_causal(model)
    if rows < 1:
        raise ValueError(f"rows is {rows}; expected at least 1")
    of_context: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(requests):
        for name, ids in (("context", context), ("continuation", continuation)):
            ids = torch.as_tensor(ids, dtype=None if len(ids) else torch.int64)
            checked_ids(f"requests[{index}].{name}", ids, model.config.vocab_size)
        of_context.setdefault(tuple(context), []).append(index)
    results: list[Likelihood | None] = [None] * len(requests)
    # In this order contexts that begin alike are neighbours.
    groups = list(_groups(sorted(of_context), rows))
    with evaluating(model):
        stack: list[_Read] = []
        for group, following in zip(groups, [*groups[1:], None], strict=True):
            _enter(model, stack, group, following)
            logits, state = _read_rests(model, group, stack[-1] if stack else None)
            wanted = [(row, i) for row, ids in enumerate(group) for i in of_context[ids]]
            continuations = [(row, requests[i][1]) for row, i in wanted]
            scored = _score_forks(model, logits, state, continuations, rows)
            for (_, index), result in zip(wanted, scored, strict=True):
                results[index] = result
            if progress is not None:
                progress(len(wanted))
    return [result for result in results if result is not None]


def check_causal(model: Decoder) -> None:
    """Raise ValueError for a bidirectional model, which sees what it is to predict."""
    if not model.config.causal:
        raise ValueError("config.causal is False; expected True: only a causal model scores text")


@contextmanager
def evaluating(model: Decoder) -> Iterator[None]:
    """Eval mode without gradients; the mode is left as it was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def score_labels(
    model: Decoder, input_ids: Tensor, labels: Tensor, state: DecoderState | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of labels, and whether each is the likeliest token, in bounded memory.

    Logits exist at labelled positions alone, so a label at the end of 128k tokens costs no more
    than one at the start.

    Args:
        model: a causal decoder in eval mode (``evaluating``).
        input_ids: int64 [batch, seq].
        labels: int64 [batch, seq]; position t predicts labels[t]; -100 is not scored.
        state: what came before; not modified.

    Returns:
        log-probabilities, float64 [batch, seq], and hits, bool [batch, seq], on the CPU; 0 and True
        where nothing is scored.
    """
    device = next(model.parameters()).device
    size = max(1, _TOKENS // len(input_ids))
    parts = []
    for ids, wanted in zip(input_ids.split(size, 1), labels.split(size, 1), strict=True):
        x, state = model.hidden(ids.to(device), state)
        parts.append(_label_scores(model, x, wanted))
    logprobs, hits = zip(*parts, strict=True)
    return torch.cat(logprobs, 1), torch.cat(hits, 1)


def _label_scores(model: Decoder, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``score_labels`` of hidden states [batch, seq, model_dim]."""
    logprobs = torch.zeros(labels.shape, dtype=torch.float64)
    hits = torch.ones(labels.shape, dtype=torch.bool)
    for part in torch.nonzero(labels != IGNORE_INDEX).split(_logit_rows(model)):
        place = part.unbind(1)
        there = tuple(index.to(x.device) for index in place)
        scores = _token_scores(model.logits(x[there]), labels[place].to(x.device))
        logprobs[place], hits[place] = (score.cpu() for score in scores)
    return logprobs, hits


def _logit_rows(model: Decoder) -> int:
    """Positions whose logits are held at once."""
    return max(1, _LOGITS // model.config.vocab_size)


def _token_scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability, float64 [n], of labels [n] under logits [n, vocab_size], and hits [n]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    # The likeliest of such answers would be the first one, which looks like a figure.
    if chosen.isnan().any():
        raise ValueError(NO_NUMBER)
    return chosen.double(), logits.argmax(-1) == labels


def _groups(contexts: list[tuple[int, ...]], rows: int) -> Iterator[list[tuple[int, ...]]]:
    """Sorted contexts that are read together: at most ``rows``, or a longer one alone.

    What they do not share has at most ``_TOKENS`` tokens; what they share is read once before.
    """
    group: list[tuple[int, ...]] = []
    tokens = 0
    for ids in contexts:
        common = _shared(group[0], ids) if group else 0
        rest = tokens + len(ids) - (len(group) + 1) * common
        if group and (len(group) == rows or rest > _TOKENS):
            yield group
            group, tokens = [], 0
        group.append(ids)
        tokens += len(ids)
    if group:
        yield group


def _shared(first: Sequence[int], last: Sequence[int]) -> int:
    """Tokens that both begin with."""
    count = 0
    for a, b in zip(first, last):
        if a != b:
            break
        count += 1
    return count


def _enter(
    model: Decoder,
    stack: list[_Read],
    group: list[tuple[int, ...]],
    following: list[tuple[int, ...]] | None,
) -> None:
    """Read what a group's contexts have in common; the top of the stack is then the longest part.

    What the following group shares lies on the stack by itself, so that it is not read again.
    """
    # Sorted: what the first and the last share, all share. A token is left, to give the logits.
    most = min(_shared(group[0], group[-1]), min(map(len, group)) - 1)
    while stack and stack[-1].ids != group[0][: min(len(stack[-1].ids), most)]:
        stack.pop()
    ahead = 0 if following is None else min(most, _shared(group[0], following[0]))
    for end in (ahead, most):
        start = len(stack[-1].ids) if stack else 0
        if end - start < _SHARED or (end == most and len(group) == 1):
            continue
        ids = torch.tensor([group[0][start:end]])
        _, state = read(model, ids.split(_TOKENS, 1), stack[-1].state if stack else None)
        stack.append(_Read(group[0][:end], state))


def _read_rests(
    model: Decoder, group: list[tuple[int, ...]], begun: _Read | None
) -> tuple[Tensor, DecoderState]:
    """Logits [contexts, vocab_size] after each context, and its state."""
    start = 0 if begun is None else len(begun.ids)
    rests = [torch.tensor(ids[start:]) for ids in group]
    state = None if begun is None else begun.state
    if len(group) == 1:
        return read(model, rests[0][None].split(_TOKENS, 1), state)
    if state is not None:
        state = state.select([0] * len(group))
    device = next(model.parameters()).device
    packed, bounds = _packed(rests)
    return advance(model, packed.to(device), state, cu_seqlens=bounds.to(device))


def _packed(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences side by side, [1, tokens], and their bounds, [sequences + 1]."""
    bounds = torch.tensor([0, *map(len, sequences)]).cumsum(0)
    return torch.cat(list(sequences))[None], bounds


def _score_forks(
    model: Decoder,
    logits: Tensor,
    state: DecoderState,
    continuations: Sequence[tuple[int, Sequence[int]]],
    rows: int,
) -> list[Likelihood]:
    """Likelihoods of (row, continuation), from the state and the logits after each row's context."""
    device = logits.device
    index = torch.tensor([row for row, _ in continuations], device=device)
    firsts = torch.tensor([ids[0] for _, ids in continuations], device=device)
    first, hit = _token_scores(logits.index_select(0, index), firsts)
    logprobs, hits = first.tolist(), hit.tolist()
    longer = [i for i, (_, ids) in enumerate(continuations) if len(ids) > 1]
    for part in _fork_groups(longer, continuations, rows):
        inputs = [torch.as_tensor(continuations[i][1][:-1]) for i in part]
        labels = [torch.as_tensor(continuations[i][1][1:]) for i in part]
        forked = state.select([continuations[i][0] for i in part])
        if len(part) == 1:
            scores, right = score_labels(model, inputs[0][None], labels[0][None], forked)
        else:
            packed, bounds = _packed(inputs)
            x, _ = model.hidden(packed.to(device), forked, cu_seqlens=bounds.to(device))
            scores, right = _label_scores(model, x, torch.cat(labels)[None])
        sizes = list(map(len, labels))
        of_each = zip(part, scores[0].split(sizes), right[0].split(sizes), strict=True)
        for i, score, all_right in of_each:
            logprobs[i] += float(score.sum())
            hits[i] = hits[i] and bool(all_right.all())
    return [Likelihood(*pair) for pair in zip(logprobs, hits, strict=True)]


def _fork_groups(
    chosen: list[int], continuations: Sequence[tuple[int, Sequence[int]]], rows: int
) -> Iterator[list[int]]:
    """Continuations scored in one call: at most ``rows``, of at most ``_TOKENS``."""
    group: list[int] = []
    tokens = 0
    for i in chosen:
        size = len(continuations[i][1]) - 1
        if group and (len(group) == rows or tokens + size > _TOKENS):
            yield group
            group, tokens = [], 0
        group.append(i)
        tokens += size
    if group:
        yield group
