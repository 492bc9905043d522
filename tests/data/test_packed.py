"""Rows of several conversations: all of them once, none across a border."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from transnormer.data.chat_template import Encoded
from transnormer.data.packed import (
    ConversationSource,
    PackedLoader,
    TooLong,
    Written,
    pack,
    write_conversations,
)
from transnormer.data.split import split_by_key

SEQ, PAD = 16, 999


def conversation(number: int, length: int, prompt: int) -> Encoded:
    """Ids that say whose they are; the first ones are no answer."""
    return Encoded([number * 100 + i for i in range(length)], [i >= prompt for i in range(length)])


def source(tmp_path: Path, *given: Encoded, too_long: TooLong = "error") -> ConversationSource:
    """Written and opened again."""
    named = ((f"file:{number}", one) for number, one in enumerate(given, start=1))
    write_conversations(named, tmp_path, seq=SEQ, too_long=too_long)
    return ConversationSource(tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_every_item_is_in_one_row_and_no_row_is_overfull(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.randint(1, 50) for _ in range(500)]
    rows = pack(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(500))
    assert max(sum(lengths[index] for index in row) for row in rows) <= 64
    fewest = -(-sum(lengths) // 64)
    assert len(rows) <= 11 / 9 * fewest + 4
    assert rows == pack(list(lengths), 64)


@pytest.mark.parametrize("length", [0, 65])
def test_an_item_that_fits_no_row_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=rf"lengths\[1\] is {length}; expected 1 to 64"):
        pack([3, length], 64)


def test_a_row_holds_conversations_with_borders_and_pads(tmp_path: Path) -> None:
    given = [conversation(1, 8, 3), conversation(2, 6, 2), conversation(3, 17, 16)]
    loader = PackedLoader(source(tmp_path, *given), seq=SEQ, batch=2, seed=0, pad=PAD)
    assert loader.rows == [[2], [0, 1]]
    batch = loader.collate([0, 1])
    assert batch.cu_seqlens.tolist() == [0, 16, 23, 28, 32]
    assert batch.input_ids.shape == batch.labels.shape == (1, 32)
    one, two, three = (ids for ids, _ in given)
    assert batch.input_ids[0].tolist() == [*three[:-1], *one[:-1], *two[:-1], *[PAD] * 4]
    labels = [*[-100] * 15, three[16], *[-100] * 2, *one[3:], -100, *two[2:], *[-100] * 4]
    assert batch.labels[0].tolist() == labels
    assert int(batch.tokens) == 28


def test_each_epoch_has_every_row_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    given = [conversation(number, 12, 4) for number in range(1, 8)]
    loader = PackedLoader(source(tmp_path, *given), seq=SEQ, batch=7, seed=3, pad=PAD)
    epochs = [[loader.locate(sample)[1] for sample in range(7 * e, 7 * e + 7)] for e in range(3)]
    assert all(sorted(order) == list(range(7)) for order in epochs)
    assert epochs[0] != epochs[1]
    again = PackedLoader(loader.source, seq=SEQ, batch=7, seed=3, pad=PAD)
    assert torch.equal(loader.batch(2).input_ids, again.batch(2).input_ids)
    assert sum(batch.input_ids.shape[1] for batch in loader.once()) == 7 * SEQ


def test_ranks_share_the_rows_of_one_batch(tmp_path: Path) -> None:
    given = [conversation(number, 12, 4) for number in range(1, 8)]
    loader = PackedLoader(source(tmp_path, *given), seq=SEQ, batch=4, seed=3, pad=PAD)
    whole = loader.batch(1).input_ids.view(4, SEQ)
    for rank in range(2):
        part = loader.for_rank(rank, 2).batch(1).input_ids.view(2, SEQ)
        assert torch.equal(part, whole[rank::2])


def test_longer_conversations_are_cut_left_out_or_refused(tmp_path: Path) -> None:
    given = [
        ("file:1", conversation(1, 17, 3)),
        ("file:2", conversation(2, 30, 3)),
        ("file:3", conversation(3, 30, 20)),
    ]
    made = write_conversations(given, tmp_path, seq=SEQ, too_long="cut")
    # Of the last one nothing would be left to learn.
    assert made == Written(conversations=2, tokens=34, answer_tokens=28, cut=1, dropped=1)
    assert ConversationSource(tmp_path).lengths().tolist() == [16, 16]
    made = write_conversations(given, tmp_path, seq=SEQ, too_long="drop")
    assert made == Written(conversations=1, tokens=17, answer_tokens=14, cut=0, dropped=2)
    with pytest.raises(ValueError, match=r"file:2 has 30 tokens; expected at most 17, data.seq"):
        write_conversations(given, tmp_path, seq=SEQ, too_long="error")
    with pytest.raises(ValueError, match=r"all 1 conversations have more than data.seq = 16"):
        write_conversations(given[2:], tmp_path, seq=SEQ, too_long="cut")


def test_files_that_do_not_agree_are_refused(tmp_path: Path) -> None:
    source(tmp_path, conversation(1, 8, 3))
    np.save(tmp_path / "answers.npy", np.ones(7, dtype=bool))
    with pytest.raises(ValueError, match="8 tokens, 7 flags and ends at 8; expected one number"):
        ConversationSource(tmp_path)
    (tmp_path / "answers.npy").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"answers.npy cannot be read"):
        ConversationSource(tmp_path)


def test_lines_of_one_group_are_on_one_side() -> None:
    groups = [f"g{number % 10}" for number in range(100)]
    train, heldout = split_by_key(list(range(100)), groups, 0.2, 0)
    assert len(heldout) == 20
    assert {groups[i] for i in train}.isdisjoint(groups[i] for i in heldout)
    assert split_by_key(list(range(100)), groups, 0.2, 1)[1] != heldout
