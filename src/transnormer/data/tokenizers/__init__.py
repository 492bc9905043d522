"""Tokenizers: bytes, byte-level BPE, SentencePiece models, tiktoken rank files."""

from pathlib import Path

from transnormer.data.tokenizers import bpe, byte, sentencepiece, tiktoken
from transnormer.data.tokenizers.base import (
    CHAT_TEMPLATE,
    TableTokenizer,
    Tokenizer,
    start_id,
    token_lengths,
)
from transnormer.data.tokenizers.bpe import BpeTokenizer, train_bpe
from transnormer.data.tokenizers.byte import ByteTokenizer
from transnormer.data.tokenizers.sentencepiece import SentencePieceTokenizer
from transnormer.data.tokenizers.stream import StreamDecoder
from transnormer.data.tokenizers.tiktoken import TiktokenTokenizer
from transnormer.files import read_json

__all__ = [
    "BpeTokenizer",
    "ByteTokenizer",
    "SentencePieceTokenizer",
    "StreamDecoder",
    "TableTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "find_tokenizer_file",
    "load_tokenizer",
    "read_template",
    "start_id",
    "token_lengths",
    "train_bpe",
]

# Where a directory holds several, the first counts: our own file, then the fast format.
_FILE_NAMES = (byte.FILE_NAME, bpe.FILE_NAME, sentencepiece.FILE_NAME, tiktoken.FILE_NAME)


def find_tokenizer_file(directory: Path) -> Path | None:
    """Return the tokenizer file of a directory, None where there is none.

    Raises ValueError where several rank files leave the choice open.
    """
    for name in _FILE_NAMES:
        if (directory / name).is_file():
            return directory / name
    ranks = sorted(directory.glob("*.tiktoken"))
    if len(ranks) > 1:
        raise ValueError(
            f"{directory} holds {len(ranks)} .tiktoken files; expected one; name the file itself"
        )
    return ranks[0] if ranks else None


def read_template(directory: Path) -> str | None:
    """Return the chat template of a directory, None where there is none.

    It is chat_template.jinja, or chat_template in tokenizer_config.json where that is one template.

    Raises ValueError for a file that is not UTF-8 or not JSON.
    """
    template, table = directory / CHAT_TEMPLATE, directory / "tokenizer_config.json"
    if template.is_file():
        try:
            return template.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{template} is not UTF-8 ({error.reason}); expected a template; convert it"
            ) from None
    found = read_json(table).get("chat_template") if table.is_file() else None
    return found if isinstance(found, str) else None


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load a tokenizer, with the chat template beside its file (chat_template.jinja).

    Args:
        source: "bytes", a directory that holds tokenizer files, or one file: tokenizer.json,
            tokenizer.model, NAME.tiktoken, byte_tokenizer.json.

    Raises FileNotFoundError for a path that does not exist or a directory without a tokenizer,
    ValueError for a file that is corrupt or of no known kind, RuntimeError where the package that
    reads the format is missing.
    """
    if source == "bytes":
        return ByteTokenizer()
    path: Path | None = Path(source)
    if not Path(source).exists():
        raise FileNotFoundError(
            f"tokenizer is {str(source)!r}; expected 'bytes', a directory or a tokenizer file that "
            "exists; check the path"
        )
    if Path(source).is_dir():
        path = find_tokenizer_file(Path(source))
        if path is None:
            raise FileNotFoundError(
                f"{source} holds no tokenizer; expected one of {', '.join(_FILE_NAMES)}"
            )
    assert path is not None
    tokenizer = _load_file(path)
    tokenizer.chat_template = read_template(path.parent)
    return tokenizer


def _load_file(path: Path) -> Tokenizer:
    if path.name == byte.FILE_NAME:
        return ByteTokenizer.from_file(path)
    if path.suffix == ".json":
        return BpeTokenizer.from_file(path)
    if path.suffix == ".model":
        return SentencePieceTokenizer.from_file(path)
    if path.suffix == ".tiktoken":
        return TiktokenTokenizer.from_file(path)
    raise ValueError(
        f"tokenizer is {str(path)!r}; expected a file that ends in .json, .model or .tiktoken"
    )
