"""Streamed text: whole code points, and nothing of a stop string."""

from collections.abc import Iterator

import pytest
import torch
from decoder_cases import make_model, tnl_config
from torch import Tensor

from transnormer.data import ByteTokenizer
from transnormer.infer.engine import Engine
from transnormer.infer.generate import generate
from transnormer.infer.text import StopText, TextStream, begin_id


class Spoken:
    """A stand-in for a generation that says a text in bytes."""

    def __init__(self, text: str, reason: str = "length") -> None:
        self.tokens = list(text.encode())
        self.finish_reasons: list[str | None] = [None]
        self.taken = 0
        self.limit = 0
        self._reason = reason

    def draw_below(self, limit: int) -> None:
        self.limit = limit

    def __iter__(self) -> Iterator[Tensor]:
        for token in self.tokens:
            self.taken += 1
            if self.taken == len(self.tokens):
                self.finish_reasons = [self._reason]
            yield torch.tensor([token])


def stream(text: str, *stop: str) -> tuple[list[str], TextStream, Spoken]:
    """The pieces of a text, and what made them."""
    spoken = Spoken(text)
    streamed = TextStream(spoken, ByteTokenizer(), stop=stop)
    return list(streamed), streamed, spoken


TEXT = "naïve 中文 🙂 text"


def test_pieces_are_whole_code_points() -> None:
    pieces, streamed, _ = stream(TEXT)
    assert pieces == list(TEXT)
    assert streamed.finish_reason == "length"


def test_half_a_code_point_at_the_end_is_shown_as_such() -> None:
    spoken = Spoken("a🙂")
    spoken.tokens.pop()
    assert "".join(TextStream(spoken, ByteTokenizer())) == "a\ufffd"


@pytest.mark.parametrize("stop", ["text", "t", "中文 ", "🙂", "naïve", "xt"])
def test_the_text_ends_before_a_stop_string(stop: str) -> None:
    pieces, streamed, spoken = stream(TEXT, "never", stop)
    assert "".join(pieces) == TEXT[: TEXT.index(stop)]
    assert streamed.finish_reason == "stop"
    assert spoken.taken == len(TEXT[: TEXT.index(stop) + len(stop)].encode())


def test_the_first_of_several_stops_counts() -> None:
    assert "".join(stream("one two three", "three", "two")[0]) == "one "
    assert "".join(stream("one two three", "wo", "two")[0]) == "one "


def test_a_broken_off_stop_string_is_text() -> None:
    assert "".join(stream("aab aabb aa", "aabbc", "aaa")[0]) == "aab aabb aa"


def test_nothing_is_held_back_without_need() -> None:
    pieces, _, _ = stream("xaab", "aac")
    assert pieces == ["x", "aab"]


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="stop holds an empty string"):
        stream("text", "")


def test_a_text_begins_with_the_models_own_token() -> None:
    assert begin_id(make_model(tnl_config(bos_token_id=7)), ByteTokenizer()) == 7
    assert begin_id(make_model(), ByteTokenizer()) == ByteTokenizer().bos_id


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_ids_that_the_tokenizer_has_are_drawn(temperature: float) -> None:
    tokenizer = ByteTokenizer()
    model = make_model(tnl_config(vocab_size=3 * tokenizer.vocab_size))
    generation = generate(
        model, torch.tensor([[1, 2]]), max_new_tokens=50, temperature=temperature, seed=1
    )
    text = "".join(TextStream(generation, tokenizer))
    assert len(generation.token_ids[0]) == 50
    assert text == tokenizer.decode(generation.token_ids[0])


def test_a_stop_string_ends_a_request_of_the_engine() -> None:
    model = make_model(tnl_config(vocab_size=257))
    tokenizer = ByteTokenizer()
    engine = Engine(model, draw_below=tokenizer.vocab_size)
    free = engine.submit([1, 2], max_new_tokens=60, seed=1)
    whole = StopText(tokenizer)
    text = "".join(whole.push(token) for token in free.result()) + whole.finish()
    stop = text[20:23]
    until = StopText(tokenizer, [stop])
    request = engine.submit([1, 2], max_new_tokens=60, seed=1, until=until)
    request.result()
    assert request.finish_reason == "stop"
    assert len(request.token_ids) < 60
    assert "".join(until.pieces) + until.finish() == text[: text.index(stop)]
    assert until.push(65) == ""
