"""Recall suites: what they hide, at the lengths asked for, and that finding it is what counts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from data_cases import TEXT
from decoder_cases import make_model, tnl_config
from eval_cases import byte_model
from torch import Tensor

from transnormer.data import ByteTokenizer, Tokenizer, train_bpe
from transnormer.eval import recall
from transnormer.eval.haystack import Haystack, needles, passkeys
from transnormer.eval.recall import SUITES, copying_rows, evaluate_recall, graded, mqar_rows
from transnormer.models.decoder import Decoder


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Two tokenizers, whose tokens are of other lengths."""
    return ByteTokenizer() if request.param == "bytes" else train_bpe([TEXT], vocab_size=400)


Make = Callable[..., list[Haystack]]
TEXTS: dict[str, Make] = {
    "passkey": passkeys,
    "needle_easy": lambda t, *rest: needles(t, "needle_easy", *rest),
    "needle_standard": lambda t, *rest: needles(t, "needle_standard", *rest),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("length", [600, 3000])
def test_texts_fill_their_length_in_tokens(tokenizer: Tokenizer, name: str, length: int) -> None:
    for text in TEXTS[name](tokenizer, length, 3, 0):
        assert length - 120 <= len(tokenizer.encode(text.prompt)) <= length


@pytest.mark.parametrize("name", TEXTS)
def test_needles_lie_at_even_depths(name: str) -> None:
    texts = TEXTS[name](ByteTokenizer(), 4000, 5, 0)
    assert [text.depth for text in texts] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for text in texts:
        place = text.prompt.index(text.answer.strip()) / len(text.prompt)
        assert abs(place - text.depth) <= 0.1


@pytest.mark.parametrize("name", TEXTS)
def test_the_seed_decides_everything(name: str) -> None:
    make = TEXTS[name]
    assert make(ByteTokenizer(), 900, 2, 7) == make(ByteTokenizer(), 900, 2, 7)
    first, other = (make(ByteTokenizer(), 900, 2, seed)[0].answer for seed in (7, 8))
    assert first != other


def test_the_easy_form_holds_the_question_and_the_standard_one_does_not() -> None:
    easy, standard = (TEXTS[name](ByteTokenizer(), 900, 1, 0)[0] for name in list(TEXTS)[1:])
    question = easy.prompt[easy.prompt.rindex("What is") : easy.prompt.rindex("\nAnswer:")]
    assert easy.prompt.count(question) == 2
    assert f"{question} Answer:{easy.answer}." in easy.prompt
    question = standard.prompt[standard.prompt.rindex("What is") : standard.prompt.rindex("\n")]
    assert standard.prompt.count(question) == 1
    assert standard.prompt.count(standard.answer) == 1


def test_mqar_asks_for_the_value_that_followed_the_key(tokenizer: Tokenizer) -> None:
    for length in (64, 1001):
        ids, labels = mqar_rows(tokenizer, length, 3, 0, first_id=0)
        assert length - 2 <= ids.shape[1] <= length
        for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
            pairs = dict(zip(row[1:17:2], row[2:18:2], strict=True))
            asked = {place: label for place, label in enumerate(wanted) if label >= 0}
            assert len(asked) == 8
            assert all(pairs[row[place]] == label for place, label in asked.items())
            assert min(asked) >= length - 400


def test_copying_asks_for_what_stood_there_before(tokenizer: Tokenizer) -> None:
    ids, labels = copying_rows(tokenizer, 100, 2, 0, first_id=0)
    assert ids.shape == (2, 100)
    assert torch.equal(ids[:, 1:50], ids[:, 51:100])
    assert torch.equal(labels[:, 51:], ids[:, 2:51])
    assert bool((labels[:, :51] < 0).all())


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (" 1234567.", 1.0),
        ("The number is 1234567", 2.0**-1.5),
        ("12345678", 0.0),
        ("", 0.0),
    ],
)
def test_an_answer_scores_less_the_later_it_comes(answer: str, score: float) -> None:
    assert graded(answer, "1234567") == pytest.approx(score)


class Oracle:
    """Stands where the model is asked, and knows every answer, or gives another one."""

    def __init__(self, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.right = right
        monkeypatch.setattr(recall, "score_labels", self.labels)
        monkeypatch.setattr(recall, "score_continuations", self.continuations)
        monkeypatch.setattr(recall, "generate_texts", self.texts)

    def labels(self, model: Decoder, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Hits everywhere or, where something is asked, nowhere."""
        return ids, torch.full(ids.shape, self.right) | (labels < 0)

    def continuations(self, model: Decoder, requests: list[Any], rows: int) -> list[Any]:
        """As many likelihoods."""
        from transnormer.eval.likelihood import Likelihood

        return [Likelihood(0.0, self.right) for _ in requests]

    def texts(self, model: Decoder, tokenizer: Tokenizer, prompts: list[str], **_: Any) -> Any:
        """The first number of a text, or another one."""
        import re

        found = [re.findall(r"\d{7}", prompt)[0] for prompt in prompts]
        return [f" {text}" if self.right else " 1" for text in found]


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("name", SUITES)
def test_who_knows_scores_one_and_who_does_not_none(
    name: str, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    Oracle(right, monkeypatch)
    result = evaluate_recall(*byte_model(), name, lengths=(512, 1024), samples=3)
    assert {figure.value for figure in result.figures.values()} == {float(right)}
    assert list(result.parts) == ["512", "1024"]


@pytest.mark.parametrize("name", SUITES)
def test_a_model_is_scored_the_same_way_in_any_batch(name: str) -> None:
    model, tokenizer = byte_model()
    results = [
        evaluate_recall(model, tokenizer, name, lengths=(400,), samples=3, rows=rows)
        for rows in (1, 3)
    ]
    assert results[0] == results[1]
    assert results[0].items == 3


def test_lengths_weigh_as_much_as_they_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def texts(model: Decoder, tokenizer: Tokenizer, prompts: list[str], **_: Any) -> list[str]:
        long = len(prompts[0]) > 600
        return TEXTS_OF[long]

    TEXTS_OF = {True: ["nothing"] * 2, False: []}
    short = needles(ByteTokenizer(), "needle_easy", 511, 2, 0)
    TEXTS_OF[False] = [text.answer for text in short]
    monkeypatch.setattr(recall, "generate_texts", texts)
    result = evaluate_recall(*byte_model(), "needle_easy", lengths=(512, 1024), samples=2)
    assert result.figures["score"].value == 0.5
    assert result.figures["weighted_score"].value == pytest.approx(1.0 / 3.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": ()}, r"lengths is \[\]"),
        ({"lengths": (63,)}, "expected numbers of at least 64"),
        ({"samples": 0}, "samples is 0"),
        ({"lengths": (100,)}, "length is 99; expected at least"),
    ],
)
def test_what_cannot_be_made_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_recall(*byte_model(), "passkey", **options)


def test_an_unknown_suite_is_refused() -> None:
    with pytest.raises(ValueError, match="the suite is 'haystack'; expected one of mqar"):
        evaluate_recall(*byte_model(), "haystack")


def test_a_bidirectional_model_is_refused() -> None:
    model = make_model(tnl_config(vocab_size=ByteTokenizer().vocab_size, causal=False))
    with pytest.raises(ValueError, match=r"config\.causal is False"):
        evaluate_recall(model, ByteTokenizer(), "mqar")
