"""Text to batches: tokenizers, documents, shards, and a loader that resumes from one integer."""

from transnormer.data.classification import (
    Fields,
    LabelledBatch,
    LabelledLoader,
    LabelledSource,
)
from transnormer.data.corpus import Corpus
from transnormer.data.document import Document
from transnormer.data.documents import read_documents
from transnormer.data.embedded import embedded_documents, embedded_hash
from transnormer.data.loader import Batch, Loader, label_bytes
from transnormer.data.masking import Masking
from transnormer.data.mqar import mqar_examples
from transnormer.data.prepare import (
    TokenizedCorpus,
    bpe_size,
    make_tokenizer,
    open_tokenized,
    tokenize_corpus,
    train_tokenizer,
)
from transnormer.data.shards import Manifest, TokenSource, write_shards
from transnormer.data.tokenizers import (
    ByteTokenizer,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
    start_id,
    token_lengths,
    train_bpe,
)

__all__ = [
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "Document",
    "Fields",
    "LabelledBatch",
    "LabelledLoader",
    "LabelledSource",
    "Loader",
    "Manifest",
    "Masking",
    "StreamDecoder",
    "TokenSource",
    "TokenizedCorpus",
    "Tokenizer",
    "bpe_size",
    "embedded_documents",
    "embedded_hash",
    "label_bytes",
    "load_tokenizer",
    "make_tokenizer",
    "mqar_examples",
    "open_tokenized",
    "read_documents",
    "start_id",
    "token_lengths",
    "tokenize_corpus",
    "train_bpe",
    "train_tokenizer",
    "write_shards",
]
