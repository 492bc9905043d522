"""StreamDecoder: text as it arrives, never half a code point."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from transnormer.data import ByteTokenizer, StreamDecoder, Tokenizer

FAST = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FAST
@given(text=st.text(max_size=30))
def test_the_pieces_of_a_document_are_its_text(tokenizer: Tokenizer, text: str) -> None:
    stream = StreamDecoder(tokenizer, from_start=True)
    assert "".join([*map(stream.push, tokenizer.encode(text)), stream.flush()]) == text


@FAST
@given(data=st.data())
def test_any_ids_stream_as_their_bytes_decode(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    stream = StreamDecoder(tokenizer)
    together = "".join([*map(stream.push, ids), stream.flush()])
    raw = b"".join(tokenizer.token_bytes(i) for i in ids)
    assert together == raw.decode("utf-8", errors="replace")


def test_a_code_point_shows_when_its_last_byte_is_there() -> None:
    stream = StreamDecoder(ByteTokenizer())
    assert [stream.push(i) for i in "a的b".encode()] == ["a", "", "", "的", "b"]


def test_bytes_that_cannot_be_a_code_point_show_at_once() -> None:
    stream = StreamDecoder(ByteTokenizer())
    assert [stream.push(i) for i in (0xE7, 0x61)] == ["", "\ufffda"]


def test_flush_tells_of_an_unfinished_code_point() -> None:
    stream = StreamDecoder(ByteTokenizer())
    assert stream.push(0xE7) == ""
    assert stream.flush() == "\ufffd"


def test_a_continued_text_keeps_its_leading_space(all_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = all_tokenizers["llama-json"]
    ids = tokenizer.encode("the")
    assert tokenizer.decode(ids) == "the"
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.push, ids)) == " the"


def test_an_id_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="token id is 259; expected 0 to 258"):
        StreamDecoder(ByteTokenizer()).push(259)
