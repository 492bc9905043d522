"""Rows of different lengths: pads leave no trace, packed documents do not meet."""

import pytest
import torch
from decoder_cases import VOCAB, assert_logits_agree, make_ids, make_model, tnl_config
from tolerances import SPLIT_CPU, assert_close
from torch import Tensor

from transnormer.models import zoo
from transnormer.models.decoder import Decoder

LENGTHS = [5, 70, 1, 33]


@pytest.fixture(scope="module")
def model() -> Decoder:
    return make_model()


def pad(rows: list[Tensor], side: str, value: int = 0) -> tuple[Tensor, Tensor]:
    """Rows as one batch with pads on a side, and the mask of real tokens."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), value)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        part = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, part], mask[i, part] = row, True
    return ids, mask


def rows_of(lengths: list[int]) -> list[Tensor]:
    return [make_ids(1, n, seed=10 + i)[0] for i, n in enumerate(lengths)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_prompts_are_as_if_alone(model: Decoder, side: str) -> None:
    rows = rows_of(LENGTHS)
    ids, mask = pad(rows, side)
    out = model(ids, mask=mask)
    for i, row in enumerate(rows):
        alone = model(row[None])
        assert_logits_agree(out.logits[i][mask[i]][None], alone.logits, SPLIT_CPU)
        for actual, exact in zip(out.state.layers, alone.state.layers):
            assert_close(actual[i : i + 1], exact, limit=SPLIT_CPU)
    assert out.state.positions.tolist() == LENGTHS


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_a_pad_is_does_not_matter(model: Decoder, side: str) -> None:
    rows = rows_of(LENGTHS)
    (ids, mask), (others, _) = pad(rows, side, 0), pad(rows, side, VOCAB - 1)
    out, other = model(ids, mask=mask), model(others, mask=mask)
    assert torch.equal(out.logits[mask], other.logits[mask])
    assert all(torch.equal(x, y) for x, y in zip(out.state.layers, other.state.layers))


@pytest.mark.parametrize("pads", [1, 64, 200])
def test_more_left_pads_change_nothing(model: Decoder, pads: int) -> None:
    row = make_ids(1, 40)
    ids = torch.cat([torch.zeros(1, pads, dtype=torch.long), row], 1)
    mask = torch.arange(pads + 40)[None] >= pads
    out, alone = model(ids, mask=mask), model(row)
    assert_logits_agree(out.logits[:, pads:], alone.logits, SPLIT_CPU)
    assert out.state.positions.tolist() == [40]


def test_pads_in_the_middle_leave_no_trace(model: Decoder) -> None:
    row = make_ids(1, 50)
    ids = torch.cat([row[:, :20], torch.zeros(1, 9, dtype=torch.long), row[:, 20:]], 1)
    mask = torch.ones(1, 59, dtype=torch.bool)
    mask[:, 20:29] = False
    out, alone = model(ids, mask=mask), model(row)
    assert_logits_agree(out.logits[mask][None], alone.logits, SPLIT_CPU)
    assert out.state.positions.tolist() == [50]


def test_a_row_of_pads_alone_keeps_its_state(model: Decoder) -> None:
    state = model(make_ids(2, 10)).state
    mask = torch.tensor([[True, True, True], [False, False, False]])
    after = model(make_ids(2, 3), state=state, mask=mask).state
    assert all(torch.equal(x[1], y[1]) for x, y in zip(after.layers, state.layers))
    assert after.positions.tolist() == [13, 10]


def test_masked_single_steps_keep_the_state(model: Decoder) -> None:
    state = model(make_ids(2, 10)).state
    mask = torch.tensor([[True], [False]])
    step = make_ids(2, 1)
    after, plain = model(step, state=state, mask=mask).state, model(step, state=state).state
    assert all(torch.equal(x[1], y[1]) for x, y in zip(after.layers, state.layers))
    for actual, exact in zip(after.layers, plain.layers):
        assert_close(actual[:1], exact[:1])
    assert after.positions.tolist() == [11, 10]


def test_ragged_rows_decode_as_if_alone(model: Decoder) -> None:
    rows = rows_of(LENGTHS)
    ids, mask = pad(rows, "left")
    state = model(ids, mask=mask).state
    following = make_ids(len(rows), 12, seed=99)
    for t in range(12):
        out = model(following[:, t : t + 1], state=state)
        state = out.state
    for i, row in enumerate(rows):
        alone = model(torch.cat([row, following[i]])[None])
        assert_logits_agree(out.logits[i : i + 1], alone.logits[:, -1:], SPLIT_CPU)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_packed_documents_are_as_if_alone(model: Decoder, index_dtype: torch.dtype) -> None:
    rows = rows_of(LENGTHS)
    bounds = torch.tensor([0, 5, 75, 75, 76, 109], dtype=index_dtype)
    out = model(torch.cat(rows)[None], cu_seqlens=bounds)
    alone = [model(row[None]) for row in rows]
    assert_logits_agree(out.logits, torch.cat([a.logits for a in alone], 1), SPLIT_CPU)
    assert out.state.positions.tolist() == [5, 70, 0, 1, 33]
    for i, layer in enumerate(out.state.layers):
        assert bool((layer[2] == 0).all())
        for row, single in zip((0, 1, 3, 4), alone):
            assert_close(layer[row : row + 1], single.state.layers[i], limit=SPLIT_CPU)


def test_packed_documents_continue_from_their_states(model: Decoder) -> None:
    rows = rows_of([30, 50, 20])
    heads, tails = [10, 0, 19], [20, 50, 1]
    bounds = torch.tensor([0, 10, 10, 29])
    first = torch.cat([row[:n] for row, n in zip(rows, heads)])[None]
    state = model(first, cu_seqlens=bounds).state
    second = torch.cat([row[n:] for row, n in zip(rows, heads)])[None]
    out = model(second, cu_seqlens=torch.tensor([0, 20, 70, 71]), state=state)
    exact = torch.cat([model(r[None]).logits[:, -n:] for r, n in zip(rows, tails)], 1)
    assert_logits_agree(out.logits, exact, SPLIT_CPU)
    assert out.state.positions.tolist() == [30, 50, 20]


def test_packed_logits_to_keep_are_each_documents_last(model: Decoder) -> None:
    rows = rows_of(LENGTHS)
    bounds = torch.tensor([0, 5, 75, 76, 109])
    packed = torch.cat(rows)[None]
    whole = model(packed, cu_seqlens=bounds).logits
    kept = model(packed, cu_seqlens=bounds, logits_to_keep=2).logits
    assert_close(kept, whole[:, [3, 4, 73, 74, 75, 107, 108]])


def test_packed_loss_is_the_sum_of_the_documents(model: Decoder) -> None:
    rows = rows_of([30, 50])
    labels = [torch.cat([row[1:], torch.tensor([-100])]) for row in rows]
    packed = model.loss(
        torch.cat(rows)[None],
        torch.cat(labels)[None],
        reduction="sum",
        cu_seqlens=torch.tensor([0, 30, 80]),
    )
    alone = sum(
        model.loss(row[None], label[None], reduction="sum") for row, label in zip(rows, labels)
    )
    assert_close(packed, alone.double())


def test_masked_tokens_of_packed_sequences_leave_no_trace(model: Decoder) -> None:
    ids, bounds = make_ids(1, 40), torch.tensor([0, 0, 15, 40, 40])
    mask = torch.arange(40).remainder(3).ne(1)[None]
    first = model(ids, cu_seqlens=bounds, mask=mask)
    both = model(ids, cu_seqlens=bounds, mask=mask, state=first.state)
    for row, (start, stop) in enumerate([(0, 15), (15, 40)], start=1):
        kept = ids[:, start:stop][:, mask[0, start:stop]]
        alone = model(kept)
        again = model(kept, state=alone.state)
        here = slice(start, stop)
        assert_close(first.logits[:, here][:, mask[0, here]], alone.logits)
        assert_close(both.logits[:, here][:, mask[0, here]], again.logits)
        assert int(both.state.positions[row]) == 2 * kept.shape[1]
    assert both.state.positions[[0, 3]].tolist() == [0, 0]


def test_pads_run_whatever_implementation_the_mixers_name() -> None:
    model = make_model(zoo.ablation(tnl_config(), "lightning1"))
    ids, mask = make_ids(1, 20), torch.ones(1, 20, dtype=torch.bool)
    mask[0, :6] = False
    assert_close(model(ids, mask=mask).logits[:, 6:], model(ids[:, 6:]).logits)
