"""Log-likelihoods of continuations: exact, whatever shares a call, and each context read once."""

import random

import pytest
import torch
from decoder_cases import VOCAB, make_model, tnl_config
from tolerances import LOGLIKELIHOOD
from torch import Tensor

from transnormer.eval import likelihood
from transnormer.eval.likelihood import evaluating, score_continuations, score_labels
from transnormer.models import zoo
from transnormer.models.decoder import Decoder

Request = tuple[list[int], list[int]]


@pytest.fixture(scope="module")
def model() -> Decoder:
    """A small model."""
    return make_model()


def drawn(rng: random.Random, count: int) -> list[int]:
    """Random ids."""
    return [rng.randrange(VOCAB) for _ in range(count)]


def questions() -> list[Request]:
    """Four answers to each of nine questions, some behind the same examples, in any order."""
    rng = random.Random(1)
    examples = drawn(rng, 50)
    requests = []
    for index in range(9):
        context = (examples if index % 3 else []) + drawn(rng, rng.randrange(1, 20))
        requests += [(context, drawn(rng, rng.randrange(1, 7))) for _ in range(4)]
    rng.shuffle(requests)
    return requests


def exact(model: Decoder, request: Request) -> tuple[float, bool]:
    """By one forward pass over the whole, summed in float64."""
    context, continuation = request
    ids = torch.tensor([context + continuation[:-1]])
    logits = model(ids).logits[0, len(context) - 1 :].double()
    labels = torch.tensor(continuation)
    score = logits.log_softmax(-1).gather(1, labels[:, None]).sum().item()
    return score, bool((logits.argmax(-1) == labels).all())


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 64])
def test_likelihoods_are_those_of_whole_passes(model: Decoder, rows: int) -> None:
    requests = questions()
    for request, score in zip(
        requests, score_continuations(model, requests, rows=rows), strict=True
    ):
        assert abs(score.logprob - exact(model, request)[0]) <= LOGLIKELIHOOD


@pytest.mark.parametrize("name", ["softmax", "hybrid"])
def test_states_that_grow_are_forked_too(name: str) -> None:
    blocks = zoo.llama_custom(
        vocab_size=VOCAB, model_dim=32, num_layers=2, heads=2, glu_dim=48
    ).blocks
    if name == "hybrid":
        blocks = (tnl_config().blocks[0], blocks[0])
    model = make_model(tnl_config(blocks=blocks))
    requests = questions()
    for request, score in zip(requests, score_continuations(model, requests), strict=True):
        assert abs(score.logprob - exact(model, request)[0]) <= LOGLIKELIHOOD


def test_greedy_says_whether_every_token_is_the_likeliest(model: Decoder) -> None:
    context, tokens = [3, 1, 4], []
    for _ in range(3):
        tokens.append(int(model(torch.tensor([context + tokens])).logits[0, -1].argmax()))
    other = [(token + 1) % VOCAB for token in tokens]
    # Wrong at first, and then what is the likeliest after that.
    astray = [other[0], int(model(torch.tensor([[*context, other[0]]])).logits[0, -1].argmax())]
    requests = [
        (context, tokens),
        (context, [*tokens[:2], other[2]]),
        (context, astray),
        (context, tokens[:1]),
    ]
    found = [score.greedy for score in score_continuations(model, requests)]
    assert found == [True, False, False, True]


@pytest.fixture
def tokens_read(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each call of the model."""
    counts: list[int] = []
    hidden = Decoder.hidden

    def counting(self: Decoder, input_ids: Tensor, *args: object, **options: object) -> object:
        counts.append(input_ids.numel())
        return hidden(self, input_ids, *args, **options)

    monkeypatch.setattr(Decoder, "hidden", counting)
    return counts


def test_a_context_is_read_once_for_all_its_continuations(
    model: Decoder, tokens_read: list[int]
) -> None:
    rng = random.Random(2)
    context = drawn(rng, 100)
    requests = [(context, drawn(rng, 5)) for _ in range(4)]
    score_continuations(model, requests)
    assert sum(tokens_read) == 100 + 4 * 4


def test_answers_of_one_token_cost_nothing_beyond_their_context(
    model: Decoder, tokens_read: list[int]
) -> None:
    score_continuations(model, [(list(range(40)), [letter]) for letter in range(4)])
    assert tokens_read == [40]


@pytest.mark.parametrize("rows", [1, 4])
def test_what_contexts_begin_with_is_read_once(
    model: Decoder, tokens_read: list[int], rows: int
) -> None:
    rng = random.Random(3)
    examples = drawn(rng, 200)
    requests = [([*examples, first, *drawn(rng, 9)], [1]) for first in range(12)]
    score_continuations(model, requests, rows=rows)
    assert sum(tokens_read) == 200 + 12 * 10


def test_contexts_longer_than_a_call_are_read_in_pieces(
    model: Decoder, tokens_read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = questions()
    whole = [exact(model, request) for request in requests]
    monkeypatch.setattr(likelihood, "_TOKENS", 16)
    tokens_read.clear()
    scores = score_continuations(model, requests)
    assert max(tokens_read) <= 16
    for score, (logprob, greedy) in zip(scores, whole, strict=True):
        assert abs(score.logprob - logprob) <= LOGLIKELIHOOD
        assert score.greedy == greedy


def test_a_continuation_longer_than_a_call_is_scored_in_pieces(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(4)
    request = (drawn(rng, 3), drawn(rng, 50))
    monkeypatch.setattr(likelihood, "_TOKENS", 16)
    monkeypatch.setattr(likelihood, "_LOGITS", 7 * VOCAB)
    score = score_continuations(model, [request])[0]
    assert abs(score.logprob - exact(model, request)[0]) <= LOGLIKELIHOOD


def test_labels_are_scored_where_they_stand(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "_TOKENS", 10)
    ids = torch.randint(VOCAB, (2, 23))
    labels = torch.full((2, 23), -100)
    labels[0, 4], labels[0, 22], labels[1, 9] = 7, 8, 9
    with evaluating(model):
        logprobs, hits = score_labels(model, ids, labels)
        wanted = model(ids).logits.double().log_softmax(-1)
    for row, place in ((0, 4), (0, 22), (1, 9)):
        truth = wanted[row, place, labels[row, place]].item()
        assert abs(logprobs[row, place].item() - truth) <= LOGLIKELIHOOD
        assert bool(hits[row, place]) == (wanted[row, place].argmax() == labels[row, place])
    assert bool((logprobs[labels < 0] == 0).all())
    assert bool(hits[labels < 0].all())


def test_the_mode_comes_back() -> None:
    dropping = make_model(tnl_config(dropout=0.5)).train()
    first, second = (score_continuations(dropping, [([1, 2], [3, 4])]) for _ in range(2))
    assert dropping.training
    assert first == second


def test_progress_counts_requests(model: Decoder) -> None:
    seen: list[int] = []
    score_continuations(model, questions(), rows=2, progress=seen.append)
    assert sum(seen) == 36


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (([], [1]), r"requests\[0\]\.context is empty"),
        (([1], []), r"requests\[0\]\.continuation is empty"),
        (([1], [VOCAB]), rf"requests\[0\]\.continuation holds the id {VOCAB}"),
    ],
)
def test_bad_requests_are_refused(model: Decoder, request_: Request, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_continuations(model, [request_])


def test_a_bidirectional_model_does_not_score() -> None:
    with pytest.raises(ValueError, match=r"config\.causal is False"):
        score_continuations(make_model(tnl_config(causal=False)), [([1], [1])])


def test_rows_below_one_are_refused(model: Decoder) -> None:
    with pytest.raises(ValueError, match="rows is 0"):
        score_continuations(model, [([1], [1])], rows=0)
