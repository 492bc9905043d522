"""SentencePiece models (`tokenizer.model`), as found beside the released checkpoints."""

import hashlib
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transnormer.data.tokenizers.base import TableTokenizer
from transnormer.data.tokenizers.pieces import SPACE, byte_of_piece, cut_pieces
from transnormer.files import write_atomic

FILE_NAME = "tokenizer.model"
# ModelProto.trainer_spec is field 2, ModelProto.normalizer_spec field 3 (sentencepiece_model.proto).
_TRAINER, _NORMALIZER = 2, 3
_CHARSMAP, _DUMMY_PREFIX, _EXTRA_SPACES, _ESCAPE = 2, 3, 4, 5
_SUFFIX_SPACE = 24
# ModelProto.pieces is field 1; in a piece the text is field 1 and the type field 3.
_PIECE, _TEXT, _TYPE, _USER_DEFINED = 1, 1, 3, 4
# A second normalizer_spec after the first is merged into it, field by field (protocol buffers):
# no character map, no dummy prefix, no removal of spaces; spaces are still written as U+2581.
_PLAIN_FIELDS = bytes(
    [_CHARSMAP << 3 | 2, 0, _DUMMY_PREFIX << 3, 0, _EXTRA_SPACES << 3, 0, _ESCAPE << 3, 1]
)
_PLAIN = bytes([_NORMALIZER << 3 | 2, len(_PLAIN_FIELDS)]) + _PLAIN_FIELDS


class SentencePieceTokenizer(TableTokenizer):
    """A SentencePiece model, used so that every text comes back exactly.

    The model's normaliser is switched off; its dummy prefix is added here and taken off by decode.
    Text that the normaliser would not touch gets the ids that SentencePiece gives it. Other text
    (full-width letters, two spaces in a row under the default `nmt_nfkc` rule) keeps its characters
    and gets other ids than SentencePiece's. A model without byte fallback raises ValueError for
    characters that it lacks.
    """

    def __init__(self, model: bytes, *, name: str = FILE_NAME) -> None:
        """Build from the bytes of a .model file.

        Raises RuntimeError without the sentencepiece package, ValueError for bytes that are no
        model, NotImplementedError for models that put the space after a word.
        """
        try:
            module = importlib.import_module("sentencepiece")
        except ModuleNotFoundError as error:
            raise RuntimeError(
                f"{name} needs sentencepiece; run: pip install 'transnormer[tokenizers]'"
            ) from error
        self._model = model
        try:
            normalizer = _fields(_merged(model, _NORMALIZER))
            trainer = _fields(_merged(model, _TRAINER))
            self._processor = module.SentencePieceProcessor(model_proto=model + _PLAIN)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(
                f"{name} is not a SentencePiece model: {error}; expected a .model file"
            ) from error
        if trainer.get(_SUFFIX_SPACE, 0):
            raise NotImplementedError(
                f"{name} puts the space after a word; expected treat_whitespace_as_suffix=false"
            )
        if normalizer.get(_DUMMY_PREFIX, 1):
            self.prefix = b" "
        super().__init__(self._byte_table(), hashlib.sha256(model).hexdigest(), name)
        self.bos_id, self.eos_id, self.pad_id = (
            found if found >= 0 else None
            for found in (
                self._processor.bos_id(),
                self._processor.eos_id(),
                self._processor.pad_id(),
            )
        )
        processor = self._processor
        self.special_tokens = {
            processor.id_to_piece(i): i for i in range(len(processor)) if processor.is_control(i)
        }
        self.markers = frozenset(_user_defined(model))
        self._bytes = {
            value: i
            for i in range(len(processor))
            if processor.is_byte(i)
            and (value := byte_of_piece(processor.id_to_piece(i))) is not None
        }

    def _byte_table(self) -> list[bytes]:
        processor = self._processor
        table = []
        for i in range(len(processor)):
            piece = processor.id_to_piece(i)
            if processor.is_byte(i):
                table.append(bytes([byte_of_piece(piece) or 0]))
            elif processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
                table.append(b"")
            else:
                table.append(piece.replace(SPACE, " ").encode("utf-8"))
        return table

    def _cut(self, texts: Sequence[str]) -> list[list[int]]:
        return cut_pieces(texts, self._encode_raw, self._bytes, escape=False)

    def _encode_raw(self, texts: Sequence[str]) -> list[list[int]]:
        # The list form starts a thread for each core; one call a text keeps the threads away.
        return [self._processor.encode(text) for text in texts]

    def _write(self, directory: Path) -> None:
        """Write tokenizer.model, byte for byte the file that was read."""
        write_atomic(directory / FILE_NAME, self._model)

    @classmethod
    def from_file(cls, path: Path) -> "SentencePieceTokenizer":
        """Read a .model file."""
        return cls(Path(path).read_bytes(), name=str(path))


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at


def _records(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) of a protocol buffer; groups do not occur in these files."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            length, at = _varint(data, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + length > len(data):
            raise ValueError(f"truncated at byte {at}")
        yield tag >> 3, data[at : at + length]
        at += length


def _merged(data: bytes, field: int) -> bytes:
    """Return all messages of one field, joined: protocol buffers merge that way."""
    return b"".join(value for number, value in _records(data) if number == field)


def _fields(data: bytes) -> dict[int, Any]:
    return dict(_records(data))


def _user_defined(model: bytes) -> Iterator[str]:
    """Yield the pieces that are found whole in any text (the trainer's user_defined_symbols)."""
    mark = bytes([_TYPE << 3, _USER_DEFINED])
    for number, value in _records(model):
        if number == _PIECE and mark in value:
            piece = _fields(value)
            if piece.get(_TYPE) == _USER_DEFINED:
                yield piece[_TEXT].decode("utf-8")
