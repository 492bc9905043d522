"""tiktoken rank files: a line of base64 token and rank each, as TNL3-15B's vocabulary comes."""

import base64
import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from transnormer.data.tokenizers.base import TableTokenizer
from transnormer.files import write_atomic

FILE_NAME = "tokenizer.tiktoken"
_END = "<|endoftext|>"
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_SUFFIX}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_SUFFIX}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
# A rank file holds neither the pattern that cuts words nor the special tokens: published facts,
# by the file's stem.
_KNOWN: dict[str, tuple[str, dict[str, int]]] = {
    "gpt2": (_GPT2, {_END: 50256}),
    "r50k_base": (_GPT2, {_END: 50256}),
    "p50k_base": (_GPT2, {_END: 50256}),
    "cl100k_base": (
        _CL100K,
        {_END: 100257, **dict(zip(_FIM, range(100258, 100261))), "<|endofprompt|>": 100276},
    ),
    "o200k_base": (_O200K, {_END: 199999, "<|endofprompt|>": 200018}),
    "qwen": (
        _CL100K.replace(r"\p{N}{1,3}", r"\p{N}"),
        {_END: 151643, "<|im_start|>": 151644, "<|im_end|>": 151645},
    ),
}


class TiktokenTokenizer(TableTokenizer):
    """A byte-pair vocabulary given by ranks, a pattern and special tokens.

    eos is <|endoftext|> where the special tokens have it; ids between and after the ranks that no
    token has are unused. Special tokens are not recognised in text.
    """

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        pattern: str,
        special_tokens: Mapping[str, int],
        *,
        name: str = FILE_NAME,
    ) -> None:
        """Build the encoding; RuntimeError without the tiktoken package."""
        try:
            module = importlib.import_module("tiktoken")
        except ModuleNotFoundError as error:
            raise RuntimeError(
                f"{name} needs tiktoken; run: pip install 'transnormer[tokenizers]'"
            ) from error
        missing = [value for value in range(256) if bytes([value]) not in ranks]
        if missing:
            raise ValueError(
                f"{name} has no rank for {len(missing)} single bytes (first {missing[0]:#04x}); "
                "expected all 256; the file may be cut"
            )
        shared = set(ranks.values()) & set(special_tokens.values())
        if shared or len(set(ranks.values())) < len(ranks) or min(ranks.values()) < 0:
            raise ValueError(f"{name} gives one id to two tokens; expected different ids")
        self._ranks, self._pattern = dict(ranks), pattern
        self._specials = dict(special_tokens)
        try:
            self._encoding = module.Encoding(
                name, pat_str=pattern, mergeable_ranks=self._ranks, special_tokens=self._specials
            )
        except ValueError as error:
            raise ValueError(f"{name} has the pattern {pattern!r}, which fails: {error}") from error
        table = [b""] * (max([*ranks.values(), *special_tokens.values()]) + 1)
        for token, rank in ranks.items():
            table[rank] = token
        super().__init__(table, self._hash(), name)
        self.eos_id = self._specials.get(_END, self._specials.get("</s>"))
        self.bos_id = self._specials.get("<s>", self.eos_id)
        self.pad_id = self._specials.get("<pad>")
        self.special_tokens = self._specials

    def _rank_lines(self) -> bytes:
        ordered = sorted(self._ranks.items(), key=lambda item: item[1])
        return b"".join(base64.b64encode(t) + b" %d\n" % rank for t, rank in ordered)

    def _description(self) -> bytes:
        content = {"pattern": self._pattern, "special_tokens": self._specials}
        return json.dumps(content, sort_keys=True, indent=2).encode()

    def _hash(self) -> str:
        return hashlib.sha256(self._description() + b"\n" + self._rank_lines()).hexdigest()

    def _cut(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encoding.encode_ordinary(text) for text in texts]

    def _write(self, directory: Path) -> None:
        """Write tokenizer.tiktoken and tokenizer.tiktoken.json (pattern and special tokens)."""
        write_atomic(directory / f"{FILE_NAME}.json", self._description())
        write_atomic(directory / FILE_NAME, self._rank_lines())

    @classmethod
    def from_file(cls, path: Path) -> "TiktokenTokenizer":
        """Read NAME.tiktoken, with its pattern and special tokens from NAME.tiktoken.json.

        Without that second file NAME must be a published one: gpt2, r50k_base, p50k_base,
        cl100k_base, o200k_base, qwen.
        """
        path = Path(path)
        ranks = _read_ranks(path)
        beside = path.with_name(f"{path.name}.json")
        if beside.is_file():
            pattern, specials = _read_description(beside)
        elif path.stem in _KNOWN:
            pattern, specials = _KNOWN[path.stem]
        else:
            raise ValueError(
                f"{path} does not say how words are cut; expected one of {', '.join(_KNOWN)} as "
                f"its name, or {beside.name} beside it with pattern and special_tokens"
            )
        return cls(ranks, pattern, specials, name=str(path))


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(
                f"{path}:{number} is {line[:40]!r}; expected a base64 token and its rank"
            ) from None
    if not ranks:
        raise ValueError(f"{path} is empty; expected a base64 token and its rank on each line")
    return ranks


def _read_description(path: Path) -> tuple[str, dict[str, int]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return str(data["pattern"]), {str(k): int(v) for k, v in data["special_tokens"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not readable ({error}); expected a table with pattern and special_tokens"
        ) from None
