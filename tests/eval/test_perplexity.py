"""Scores: every token of every document once, whatever the chunks and the batch."""

import math

import pytest
import torch
import torch.nn.functional as F
from decoder_cases import VOCAB, make_ids, make_model, tnl_config
from tolerances import EPS
from torch import Tensor

from transnormer.data import ByteTokenizer
from transnormer.eval.perplexity import score_texts, score_tokens
from transnormer.models.decoder import Decoder

# Sums of float32 log-likelihoods, rounded in another order.
LIMIT = 16 * EPS[torch.float32]


@pytest.fixture(scope="module")
def model() -> Decoder:
    """A small model."""
    return make_model()


def documents() -> list[list[int]]:
    """Documents of several lengths, not in their order."""
    return [make_ids(1, length, seed=length)[0].tolist() for length in (7, 1, 30, 12, 30)]


def exact(model: Decoder, ids: list[int], first_id: int) -> float:
    """Nats of a document by one full forward, in float64."""
    inputs = torch.tensor([[first_id, *ids[:-1]]])
    logits = model(inputs).logits[0].double()
    return F.cross_entropy(logits, torch.tensor(ids), reduction="sum").item()


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_scores_are_those_of_one_full_forward(model: Decoder, rows: int, chunk: int) -> None:
    scores = score_tokens(model, documents(), first_id=3, rows=rows, chunk=chunk)
    for ids, score in zip(documents(), scores, strict=True):
        assert score.tokens == len(ids)
        assert math.isclose(score.nats, exact(model, ids, 3), rel_tol=LIMIT)


def test_the_state_is_carried_through_the_document(model: Decoder) -> None:
    ids = make_ids(1, 40)[0].tolist()
    whole = score_tokens(model, [ids], first_id=0, chunk=8)[0].nats
    apart = score_tokens(model, [ids[i : i + 8] for i in range(0, 40, 8)], first_id=0)
    assert abs(sum(score.nats for score in apart) - whole) > 0.1


def test_a_document_does_not_see_the_one_before(model: Decoder) -> None:
    alone = score_tokens(model, [documents()[0]], first_id=0)[0].nats
    among = score_tokens(model, documents(), first_id=0, rows=2)[0].nats
    assert math.isclose(alone, among, rel_tol=LIMIT)


def test_progress_counts_every_token(model: Decoder) -> None:
    seen: list[int] = []
    score_tokens(model, documents(), first_id=0, rows=2, chunk=4, progress=seen.append)
    assert sum(seen) == 80


def test_a_chunk_of_all_rows_is_one_call_of_the_model(model: Decoder) -> None:
    shapes: list[tuple[int, ...]] = []

    def watch(module: Decoder, arguments: tuple[Tensor, ...]) -> None:
        shapes.append(tuple(arguments[0].shape))

    with model.register_forward_pre_hook(watch):
        score_tokens(model, documents(), first_id=0, rows=8, chunk=20)
        score_tokens(model, [[1, 2, 3]] * 16, first_id=0, rows=16)
    assert shapes == [(5, 20), (2, 10), (16, 3)]


def test_the_mode_comes_back(model: Decoder) -> None:
    dropping = make_model(tnl_config(dropout=0.5)).train()
    score = score_tokens(dropping, [[1, 2, 3]], first_id=0)[0]
    assert dropping.training
    assert score == score_tokens(model, [[1, 2, 3]], first_id=0)[0]


def test_every_byte_of_a_text_is_scored() -> None:
    tokenizer = ByteTokenizer()
    model = make_model(tnl_config(vocab_size=tokenizer.vocab_size, bos_token_id=257))
    texts = ["naïve", "", "中文!"]
    score = score_texts(model, tokenizer, texts)
    assert score.bytes == score.tokens == 6 + 7
    nats = sum(exact(model, list(text.encode()), 257) for text in texts if text)
    assert math.isclose(score.nats_per_token, nats / 13, rel_tol=LIMIT)
    assert math.isclose(score.bits_per_byte, nats / 13 / math.log(2), rel_tol=LIMIT)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1], []], r"documents\[1\] is empty"),
        ([[1, VOCAB]], rf"documents\[0\] holds the id {VOCAB}; expected 0 <= id < {VOCAB}"),
        ([[1, -2]], r"documents\[0\] holds the id -2"),
    ],
)
def test_bad_documents_are_refused(model: Decoder, ids: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_tokens(model, ids, first_id=0)


def test_an_empty_text_is_refused(model: Decoder) -> None:
    with pytest.raises(ValueError, match="the text is empty"):
        score_texts(model, ByteTokenizer(), [""])


def test_a_bidirectional_model_does_not_score() -> None:
    with pytest.raises(ValueError, match=r"config\.causal is False"):
        score_tokens(make_model(tnl_config(causal=False)), [[1]], first_id=0)
