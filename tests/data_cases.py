"""Texts, documents and tokenizer files that the tests of data start from."""

import io
import json
from collections.abc import Iterator

from transnormer.data import Batch, Document, Loader, TokenSource

# A few kinds of text: prose, code, digits, Chinese, signs, runs of spaces.
LINES = [
    "the model reads the text, and the text is what the model reads. ",
    "def rotate(x, angle=0.5):\n    return x * angle + 12345\n\n",
    "线性注意力的状态是固定大小的矩阵，没有窗口。",
    "a  b   c\t\td\r\nΔx ≤ 10⁻³; naïve café — “quoted” \u00a0 end\n",
]
# Made-up words, so that there is enough to merge.
WORDS = [
    "".join(("ka", "lo", "mi", "ten", "sur", "vel")[place // 6**step % 6] for step in range(4))
    for place in range(0, 1296, 7)
]
TEXT = "".join(
    line * 2 + " ".join(WORDS[place * 4 : place * 4 + 8]) + "\n"
    for place, line in enumerate(LINES * 12)
)
# What has broken tokenizers: controls, the space sign, combining marks, special names, full width.
HARD_TEXTS = {
    "empty": "",
    "space": " ",
    "leading-spaces": "   x",
    "trailing-spaces": "x   ",
    "newlines": "\r\n\n\r\t\v\f",
    "nul": "a\0b",
    "space-sign": "\u2581a \u2581\u2581 b\u2581",
    "special-names": "</s><s><pad><unk><|endoftext|><0x0A>",
    "not-normal": "e\u0301 \u00e9 ﬁ Ａ ½ \u212b",
    "emoji": "👩‍👩‍👧‍👦 \U0010ffff\ufeff\u200d",
    "chinese": "天地玄黃，宇宙洪荒。",
    "unassigned": "\u0378\ufffe\U000e0001",
}


def sentencepiece_model(**options: object) -> bytes:
    """Train a small SentencePiece model on TEXT."""
    import sentencepiece

    stream = io.BytesIO()
    arguments = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=stream,
        minloglevel=2,
        num_threads=1,
        **arguments,
    )
    return stream.getvalue()


def llama_style_json() -> str:
    """A tokenizer.json of pieces with byte fallback, normalised as Llama 2's is."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += ["\u2581", "t", "h", "e", "a", "b", "th", "the", "\u2581the", "\u2581\u2581"]
    merges = ["t h", "th e", "\u2581 the", "\u2581 \u2581"]
    return json.dumps(
        {
            "version": "1.0",
            "truncation": {
                "direction": "Right",
                "max_length": 4,
                "strategy": "LongestFirst",
                "stride": 0,
            },
            "padding": None,
            "added_tokens": [
                {
                    "id": place,
                    "content": piece,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for place, piece in enumerate(pieces[:3])
            ],
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Prepend", "prepend": "\u2581"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
                ],
            },
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": "<unk>",
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": {piece: place for place, piece in enumerate(pieces)},
                "merges": merges,
            },
        }
    )


def with_nfkc(content: str) -> str:
    """The same tokenizer.json with a normaliser that rewrites text, as Qwen's has."""
    return json.dumps(json.loads(content) | {"normalizer": {"type": "NFKC"}})


def small_ranks() -> dict[bytes, int]:
    """Ranks of a toy tiktoken vocabulary: all bytes, then a few merges."""
    merges = [b"th", b"the", b" t", b" th", b" the", "的".encode()[:2], "的".encode()]
    return {bytes([b]): b for b in range(256)} | {m: 256 + n for n, m in enumerate(merges)}


def numbered(lengths: list[int]) -> Iterator[Document]:
    """Documents of given numbers of bytes; each byte of the corpus differs from its neighbours."""
    at = 0
    for place, length in enumerate(lengths):
        text = "".join(chr(33 + (at + step) % 89) for step in range(length))
        at += length
        yield Document(f"document-{place}", text)


def every_window(source: TokenSource, *, seq: int, packing: str = "stream") -> list[Batch]:
    """One epoch of a loader, a window a batch, in the order of the text."""
    loader = Loader([(source, 1.0)], seq=seq, batch=1, seed=0, packing=packing)
    order = sorted(range(loader.windows[0]), key=lambda sample: loader.locate(sample)[2])
    return [loader.batch(sample) for sample in order]
