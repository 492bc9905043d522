"""The loader: windows, boundaries, and an order that one integer resumes."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from data_cases import every_window, numbered

from transnormer.data import (
    Batch,
    ByteTokenizer,
    Document,
    Loader,
    Tokenizer,
    TokenSource,
    label_bytes,
    token_lengths,
    write_shards,
)

START = ByteTokenizer.bos_id


def make_source(directory: Path, lengths: list[int]) -> TokenSource:
    """Shards of byte documents of these lengths."""
    write_shards(numbered(lengths), ByteTokenizer(), directory)
    return TokenSource(directory)


def same(one: Batch, other: Batch) -> bool:
    """Whether two batches are equal bit for bit."""
    return all(
        (a is None and b is None) or torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


def labels_of(batches: list[Batch]) -> list[int]:
    """All labels that count, in order."""
    flat = torch.cat([batch.labels.reshape(-1) for batch in batches])
    return flat[flat != -100].tolist()


def test_tensors_have_the_promised_shapes(source: TokenSource) -> None:
    batch = Loader([(source, 1.0)], seq=8, batch=3, seed=0).batch(0)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.input_ids.shape == batch.labels.shape == (3, 8)
    assert batch.cu_seqlens is None
    packed = Loader([(source, 1.0)], seq=8, batch=3, seed=0, packing="documents").batch(0)
    assert packed.input_ids.shape == packed.labels.shape == (1, 24)
    assert packed.cu_seqlens is not None
    assert packed.cu_seqlens.dtype == torch.int32


def test_each_label_is_the_token_after_its_input(source: TokenSource) -> None:
    stream = source.tokens(0, len(source))
    before = np.concatenate([[START], stream[:-1]])
    before[source.document_ends[:-1]] = START
    batches = every_window(source, seq=8)
    inputs = torch.cat([batch.input_ids for batch in batches]).numpy()
    labels = torch.cat([batch.labels for batch in batches]).numpy()
    for window in range(7):
        place = slice(window * 8, window * 8 + 8)
        assert inputs[window].tolist() == before[place].tolist()
        assert labels[window].tolist() == stream[place].tolist()
    # 60 tokens are 7 windows and 4 tokens more: the last one starts at 52.
    assert inputs[7].tolist() == before[52:].tolist()
    assert labels[7].tolist() == [-100] * 4 + stream[56:].tolist()


@pytest.mark.parametrize("seq", [1, 7, 8, 60])
@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_every_token_is_a_label_once_an_epoch(seq: int, packing: str, source: TokenSource) -> None:
    stream = source.tokens(0, len(source)).tolist()
    batches = every_window(source, seq=seq, packing=packing)
    assert labels_of(batches) == stream
    loader = Loader([(source, 1.0)], seq=seq, batch=1, seed=3, packing=packing)
    for epoch in range(2):
        steps = range(epoch * loader.windows[0], (epoch + 1) * loader.windows[0])
        assert Counter(labels_of([loader.batch(step) for step in steps])) == Counter(stream)


def test_every_epoch_visits_each_window_once_in_another_order(source: TokenSource) -> None:
    loader = Loader([(source, 1.0)], seq=4, batch=1, seed=0)
    orders = [[loader.locate(epoch * 15 + n)[2] for n in range(15)] for epoch in range(3)]
    assert all(sorted(order) == list(range(15)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_cu_seqlens_agree_with_the_ends_of_documents(source: TokenSource) -> None:
    loader = Loader([(source, 1.0)], seq=16, batch=2, seed=0, packing="documents")
    for batch in map(loader.batch, range(4)):
        assert batch.cu_seqlens is not None
        bounds = batch.cu_seqlens.tolist()
        row = batch.input_ids[0].tolist()
        rows = range(0, len(row), 16)
        begins = {place for place, token in enumerate(row) if token == START}
        # A piece begins where a document's first token is the label, and where a window begins.
        assert bounds == sorted(begins | set(rows) | {len(row)})


def test_a_window_that_ends_with_a_document_has_no_empty_piece(tmp_path: Path) -> None:
    source = make_source(tmp_path / "s", [7, 7, 7, 7])
    batch = Loader([(source, 1.0)], seq=8, batch=4, seed=0, packing="documents").batch(0)
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 8, 16, 24, 32]


def test_the_start_token_precedes_every_document_and_nothing_else(source: TokenSource) -> None:
    inputs = torch.cat([batch.input_ids[0] for batch in every_window(source, seq=1)])
    begins = torch.from_numpy(np.concatenate([[0], source.document_ends[:-1]]))
    assert torch.equal(torch.nonzero(inputs == START)[:, 0], begins)


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_any_step_can_be_resumed_bit_for_bit(packing: str, source: TokenSource) -> None:
    def build() -> Loader:
        return Loader([(source, 1.0)], seq=8, batch=3, seed=5, packing=packing)

    first = [build().batch(step) for step in range(9)]
    again = build()
    for step in (8, 2, 5, 0, 7):
        assert same(again.batch(step), first[step])


def test_the_seed_changes_the_order(source: TokenSource) -> None:
    orders = {
        tuple(Loader([(source, 1.0)], seq=4, batch=1, seed=seed).locate(n)[2] for n in range(15))
        for seed in (0, 1, 2, -1)
    }
    assert len(orders) == 4


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_ranks_share_the_rows_of_the_one_order(world: int, source: TokenSource) -> None:
    loader = Loader([(source, 1.0)], seq=8, batch=6, seed=1)
    ranks = [loader.for_rank(rank, world) for rank in range(world)]
    for step in range(3):
        whole = loader.batch(step)
        for rank, part in enumerate(ranks):
            assert torch.equal(part.batch(step).input_ids, whole.input_ids[rank::world])
            assert torch.equal(part.batch(step).labels, whole.labels[rank::world])


def test_smaller_batches_keep_the_order_of_samples(source: TokenSource) -> None:
    whole = Loader([(source, 1.0)], seq=8, batch=4, seed=1)
    micro = Loader([(source, 1.0)], seq=8, batch=2, seed=1)
    for step in range(4):
        parts = torch.cat([micro.batch(2 * step + half).input_ids for half in (0, 1)])
        assert torch.equal(parts, whole.batch(step).input_ids)


def test_a_mixture_follows_its_weights_and_each_source_its_epochs(tmp_path: Path) -> None:
    a = make_source(tmp_path / "a", [99, 99])
    b = make_source(tmp_path / "b", [39])
    loader = Loader([(a, 0.7), (b, 0.3)], seq=10, batch=5, seed=0)
    located = [loader.locate(sample) for sample in range(1000)]
    assert Counter(source for source, _, _ in located) == {0: 700, 1: 300}
    for number, windows in ((0, 20), (1, 4)):
        own = [(epoch, window) for source, epoch, window in located if source == number]
        assert own[0][0] == 0
        assert len(set(own)) == len(own)
        full = Counter(epoch for epoch, _ in own)
        assert all(full[epoch] == windows for epoch in range(len(full) - 1))


@pytest.mark.parametrize("seq", [1, 5, 8])
def test_label_bytes_are_the_bytes_of_the_text(
    seq: int, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    texts = ["the text", " and", "线性", "the model reads the text"]
    documents = [Document(str(place), text) for place, text in enumerate(texts)]
    write_shards(documents, tokenizer, tmp_path / "out")
    source = TokenSource(tmp_path / "out")
    lengths = token_lengths(tokenizer)
    counted = [label_bytes(batch, lengths, tokenizer) for batch in every_window(source, seq=seq)]
    assert sum(counted) == sum(len(text.encode()) for text in texts)


def test_ignored_labels_have_no_bytes() -> None:
    labels = torch.tensor([[97, -100, ByteTokenizer.eos_id]])
    batch = Batch(torch.tensor([[START, START, 97]]), labels, None)
    assert label_bytes(batch, token_lengths(ByteTokenizer()), ByteTokenizer()) == 1
