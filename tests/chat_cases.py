"""A conversation, a foreign template, and a tokenizer of each kind that has special tokens."""

from collections.abc import Callable
from typing import Any

from data_cases import TEXT, sentencepiece_model

from transnormer.data.tokenizers import (
    BpeTokenizer,
    ByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    train_bpe,
)

SPEECH = [
    {"role": "system", "content": "be  kind."},
    {"role": "user", "content": "the model reads?"},
    {"role": "assistant", "content": "what the text is, 12345"},
    {"role": "user", "content": "线性注意力\n\nand more"},
    {"role": "assistant", "content": "ok"},
]
# As many published models have it, with line ends between the turns.
MARKED = """{{ bos_token }}{% for m in messages %}
{{ '<|' + m['role'] + '|>\n' + m['content'] | trim + eos_token }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
RESERVED = ("<reserved_102>", "<reserved_103>")


def bpe() -> BpeTokenizer:
    return train_bpe([TEXT], vocab_size=400)


def pieces(**options: Any) -> SentencePieceTokenizer:
    """A vocabulary with reserved tokens, as the released one."""
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    return SentencePieceTokenizer(
        sentencepiece_model(user_defined_symbols=list(RESERVED), **(plain | options))
    )


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": ByteTokenizer,
    "bpe": bpe,
    "pieces": lambda: pieces(add_dummy_prefix=False),
    "pieces-prefix": pieces,
}
