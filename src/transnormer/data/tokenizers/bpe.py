"""Tokenizers in Hugging Face's tokenizer.json: byte-level BPE, and pieces with byte fallback."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import decoders as hf_decoders
from tokenizers import models, normalizers, pre_tokenizers, trainers

from transnormer.data.tokenizers.base import TableTokenizer
from transnormer.data.tokenizers.pieces import SPACE, byte_of_piece, cut_pieces
from transnormer.data.tokenizers.seeds import as_symbols, first_bytes, seed
from transnormer.files import write_atomic

FILE_NAME = "tokenizer.json"
SPECIALS = ("<pad>", "<s>", "</s>")
# Ids of a byte-level BPE without a single merge.
SMALLEST = 256 + len(SPECIALS)
_NAMES = {
    "bos": ("<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>", "[BOS]", "<|endoftext|>"),
    "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[EOS]", "<|im_end|>"),
    "pad": ("<pad>", "<|pad|>", "<|finetune_right_pad_id|>", "[PAD]", "<|endoftext|>"),
}
_DIGITS = {"whole": r"\p{N}+", "threes": r"\p{N}{1,3}", "singly": r"\p{N}"}
Digits = Literal["whole", "threes", "singly"]


class BpeTokenizer(TableTokenizer):
    """A tokenizer.json: byte-level BPE (GPT-2, ours), or pieces with byte fallback (Llama 2).

    The file's normaliser, truncation, padding and template of special tokens are switched off, and
    special tokens are not recognised in text. Other kinds of file (WordPiece, pieces without
    byte fallback) cannot hold every text and raise NotImplementedError.
    """

    def __init__(self, content: str, *, name: str = FILE_NAME, names: dict[str, str] | None = None):
        """Build from the text of a tokenizer.json.

        Args:
            content: the JSON text.
            name: the file's name, for messages.
            names: "bos", "eos", "pad" to the token that plays the part; other parts go to the
                usual names that the vocabulary has.
        """
        try:
            data = json.loads(content)
            # The class of the library raises bare Exception for whatever is wrong with the text.
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:
            raise ValueError(
                f"{name} is not a tokenizer file: {error}; expected the JSON of HF tokenizers"
            ) from error
        self._content = content
        self._byte_level = _uses(data, "ByteLevel")
        fallback = bool(data["model"].get("byte_fallback")) and _uses(data, "ByteFallback")
        if not self._byte_level and not fallback:
            raise NotImplementedError(
                f"{name} holds {data['model'].get('type')} without bytes for every character; "
                "expected byte-level BPE or byte fallback; such a file cannot express every text"
            )
        if _adds_prefix(data):
            self.prefix = b" "
        _strip_behaviour(self._tokenizer, data, byte_level=self._byte_level)
        table = _byte_table(self._tokenizer, byte_level=self._byte_level)
        canonical = json.dumps(_without_start(data), sort_keys=True, separators=(",", ":")).encode()
        super().__init__(table, hashlib.sha256(canonical).hexdigest(), name)
        self._names = names or {}
        self.bos_id, self.eos_id, self.pad_id = (self._find(p) for p in ("bos", "eos", "pad"))
        self._bytes = {} if self._byte_level else self._byte_ids()
        added = self._tokenizer.get_added_tokens_decoder().items()
        self.special_tokens = {token.content: i for i, token in added if token.special}
        self.markers = frozenset(token.content for _, token in added if not token.special)

    def _find(self, part: str) -> int | None:
        named = self._names.get(part)
        for token in (named,) if named is not None else _NAMES[part]:
            token_id = self._tokenizer.token_to_id(token)
            if token_id is not None:
                return token_id
        if named is not None:
            raise ValueError(f"{part}_token is {named!r}; expected a token of {self.name}")
        return None

    def _byte_ids(self) -> dict[int, int]:
        found = {b: self._tokenizer.token_to_id(f"<0x{b:02X}>") for b in range(256)}
        return {value: token_id for value, token_id in found.items() if token_id is not None}

    def _cut(self, texts: Sequence[str]) -> list[list[int]]:
        if self._byte_level:
            return self._encode_raw(texts)
        return cut_pieces(texts, self._encode_raw, self._bytes, escape=True)

    def _encode_raw(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _write(self, directory: Path) -> None:
        """Write tokenizer.json, and tokenizer_config.json with the names of the special tokens."""
        write_atomic(directory / FILE_NAME, self._content.encode("utf-8"))
        ids = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}
        roles = {
            f"{part}_token": self._tokenizer.id_to_token(i)
            for part, i in ids.items()
            if i is not None
        }
        write_atomic(directory / "tokenizer_config.json", json.dumps(roles, indent=2).encode())

    @classmethod
    def from_file(cls, path: Path) -> "BpeTokenizer":
        """Read a tokenizer.json and, beside it, which tokens are bos, eos and pad."""
        path = Path(path)
        try:
            content = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error.reason}); expected JSON") from None
        return cls(content, name=str(path), names=_role_names(path.parent))


def add_start(directory: Path, token: str, token_id: int) -> None:
    """Let other readers of a directory's tokenizer.json begin every text with a token, and no more.

    ``BpeTokenizer`` reads the file as it did before, with the same fingerprint, unless the file put
    other tokens around texts.
    """
    path = Path(directory) / FILE_NAME
    content = path.read_text(encoding="utf-8")
    tokenizer = tokenizers.Tokenizer.from_str(content)
    bare = tokenizer.encode("", add_special_tokens=False).ids
    found = tokenizer.encode("").ids
    if found == [token_id, *bare]:
        return
    data = json.loads(content)
    kept = [data["post_processor"]] if data.get("post_processor") and found == bare else []
    steps = [*kept, _start_template(token, token_id)]
    data["post_processor"] = {"type": "Sequence", "processors": steps}
    write_atomic(path, json.dumps(data, ensure_ascii=False).encode("utf-8"))


def _start_template(token: str, token_id: int) -> dict[str, Any]:
    """The token before a text or a pair of texts, but once: no published file has it so."""
    first, second = ({"Sequence": {"id": x, "type_id": i}} for i, x in enumerate("AB"))
    start = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, second],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def _without_start(data: dict[str, Any]) -> dict[str, Any]:
    """The content of a tokenizer.json as it was before ``add_start``."""
    steps = (data.get("post_processor") or {}).get("processors") or []
    for token, facts in (steps[-1].get("special_tokens") or {}).items() if steps else ():
        if steps[-1] == _start_template(token, facts["ids"][0]):
            return {**data, "post_processor": steps[0] if len(steps) > 1 else None}
    return data


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    digits: Digits = "threes",
    min_frequency: int = 2,
    characters: str = "",
) -> BpeTokenizer:
    """Train a byte-level BPE tokenizer.

    Words are cut before merging: letters with one leading space or sign, digits, signs, runs of
    spaces; no merge crosses a cut. The result depends on the texts alone.

    Args:
        texts: the training text, never the held-out part.
        vocab_size: number of ids, 259 or more: three specials, 256 bytes, then merges.
        digits: digits are cut "whole", in "threes" or "singly".
        min_frequency: how often a pair must occur to be merged.
        characters: each becomes one token, whether it occurs or not; see seeds.common_han.

    Raises ValueError where the texts hold too little for so many tokens, or vocab_size is too small
    for the characters.
    """
    least = SMALLEST + len(characters) + len(first_bytes(characters))
    if vocab_size < least:
        seeded = f", {len(characters)} characters and their first bytes" if characters else ""
        raise ValueError(
            f"vocab_size is {vocab_size}; expected at least {least}: 256 bytes and "
            f"{len(SPECIALS)} special tokens{seeded}"
        )
    if digits not in _DIGITS:
        raise ValueError(f"digits is {digits!r}; expected one of {', '.join(_DIGITS)}")
    pattern = (
        rf"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{_DIGITS[digits]}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    splitter = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [splitter, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = hf_decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted((*_byte_of_char(), *characters)),
        show_progress=False,
    )
    if characters:
        tokenizer = _train_seeded(texts, tokenizer, trainer, splitter, characters, vocab_size)
    else:
        tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size()
    if reached < vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}; expected at most {reached}, which is all that the "
            "training text gives; lower it or give more text"
        )
    return BpeTokenizer(tokenizer.to_str())


def _train_seeded(
    texts: Iterable[str],
    tokenizer: tokenizers.Tokenizer,
    trainer: trainers.BpeTrainer,
    splitter: pre_tokenizers.Split,
    characters: str,
    vocab_size: int,
) -> tokenizers.Tokenizer:
    alphabet = {value: char for char, value in _byte_of_char().items()}
    stages = json.loads(tokenizer.to_str())["pre_tokenizer"]

    def cut(text: str) -> list[str]:
        return [word for word, _ in splitter.pre_tokenize_str(text)]

    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(as_symbols(texts, cut, alphabet, characters), trainer)
    content = seed(tokenizer.to_str(), characters, vocab_size, alphabet, stages)
    return tokenizers.Tokenizer.from_str(content)


def _uses(data: dict[str, Any], kind: str) -> bool:
    """Whether the decoder of a tokenizer.json has a part of this kind."""
    decoder = data.get("decoder") or {}
    parts = [decoder, *(decoder.get("decoders") or [])]
    return any(part.get("type") == kind for part in parts)


def _parts(data: dict[str, Any], stage: str, key: str) -> list[dict[str, Any]]:
    whole = data.get(stage) or {}
    return [whole, *(whole.get(key) or [])]


def _adds_prefix(data: dict[str, Any]) -> bool:
    """Whether the file puts a space before every text."""
    for part in _parts(data, "normalizer", "normalizers"):
        if part.get("type") == "Prepend" and part.get("prepend") == SPACE:
            return True
    for part in _parts(data, "pre_tokenizer", "pretokenizers"):
        if part.get("type") == "ByteLevel" and part.get("add_prefix_space"):
            return True
        scheme = part.get("prepend_scheme", "always" if part.get("add_prefix_space") else "never")
        if part.get("type") == "Metaspace" and scheme != "never":
            return True
    return False


def _strip_behaviour(
    tokenizer: tokenizers.Tokenizer, data: dict[str, Any], *, byte_level: bool
) -> None:
    """Switch off all that changes text or adds tokens; what cuts words stays."""
    # An empty sequence is the one way to remove a normaliser that every version accepts.
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    if not byte_level:
        if any(
            p.get("type") == "Metaspace" for p in _parts(data, "pre_tokenizer", "pretokenizers")
        ):
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        return
    for part in _parts(data, "pre_tokenizer", "pretokenizers"):
        if part.get("type") == "ByteLevel" and part.get("add_prefix_space"):
            # The prefix is put there by us, so that it is not doubled or left out.
            plain = pre_tokenizers.ByteLevel(
                add_prefix_space=False, use_regex=part.get("use_regex", True)
            )
            if data["pre_tokenizer"]["type"] != "ByteLevel":
                raise NotImplementedError(
                    "tokenizer adds a space within a sequence of cutters; expected a single one"
                )
            tokenizer.pre_tokenizer = plain


def _byte_of_char() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's alphabet)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in set(kept)]
    return {chr(value): value for value in kept} | {
        chr(256 + place): value for place, value in enumerate(others)
    }


def _byte_table(tokenizer: tokenizers.Tokenizer, *, byte_level: bool) -> list[bytes]:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder()
    alphabet = _byte_of_char()
    table = [b""] * (max(vocabulary.values()) + 1)
    for token, token_id in vocabulary.items():
        if token_id in added:
            table[token_id] = b"" if added[token_id].special else token.encode("utf-8")
        elif byte_level:
            known = all(char in alphabet for char in token)
            table[token_id] = bytes(alphabet[char] for char in token) if known else b""
        else:
            value = byte_of_piece(token)
            plain = token.replace(SPACE, " ").encode("utf-8")
            table[token_id] = plain if value is None else bytes([value])
    return table


def _role_names(directory: Path) -> dict[str, str]:
    """Read which tokens are bos, eos and pad from tokenizer_config.json, where there is one."""
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}; expected a table") from None
    names: dict[str, str] = {}
    for part in ("bos", "eos", "pad"):
        value = data.get(f"{part}_token")
        token = value.get("content") if isinstance(value, dict) else value
        if isinstance(token, str):
            names[part] = token
    return names
