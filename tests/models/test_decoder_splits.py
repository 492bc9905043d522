"""Training, prefill and decoding are one computation: they agree at every split."""

import pytest
import torch
from decoder_cases import assert_logits_agree, make_ids, make_model, tnl_config, variant_config
from tolerances import SPLIT_CPU, assert_close
from torch import Tensor

from transnormer.models.decoder import Decoder
from transnormer.models.state import DecoderState

SEQ = 140


def run_in_parts(
    model: Decoder, ids: Tensor, lengths: list[int], state: DecoderState | None = None
) -> tuple[Tensor, DecoderState]:
    """Logits and state of ids given in parts of these lengths."""
    outputs = []
    for part in ids.split(lengths, 1):
        out = model(part, state=state)
        outputs.append(out.logits)
        state = out.state
    return torch.cat(outputs, 1), state


@pytest.fixture(scope="module")
def model() -> Decoder:
    return make_model()


@pytest.mark.parametrize("split", [1, 63, 64, 65, 100, 139])
def test_prefill_then_steps_equals_the_whole(model: Decoder, split: int) -> None:
    ids = make_ids(2, SEQ)
    whole = model(ids)
    logits, state = run_in_parts(model, ids, [split, *[1] * (SEQ - split)])
    assert_logits_agree(logits, whole.logits, SPLIT_CPU)
    for actual, exact in zip(state.layers, whole.state.layers):
        assert_close(actual, exact, limit=SPLIT_CPU)
    assert torch.equal(state.positions, whole.state.positions)


@pytest.mark.parametrize("size", [1, 7, 63, 64, 65])
def test_prefill_in_chunks_equals_the_whole(model: Decoder, size: int) -> None:
    ids = make_ids(2, SEQ)
    lengths = [size] * (SEQ // size) + ([SEQ % size] if SEQ % size else [])
    logits, _ = run_in_parts(model, ids, lengths)
    assert_logits_agree(logits, model(ids).logits, SPLIT_CPU)


@pytest.mark.parametrize("lrpe", ["all", "none"])
def test_every_layer_may_have_lrpe_or_none(lrpe: str) -> None:
    model = make_model(variant_config(lrpe=lrpe))
    ids = make_ids(1, SEQ)
    logits, _ = run_in_parts(model, ids, [65, *[1] * 30, SEQ - 95])
    assert_logits_agree(logits, model(ids).logits, SPLIT_CPU)


def test_a_thousand_steps_do_not_drift(model: Decoder) -> None:
    # The slowest heads forget 4e-8 of their state a token, less than float32 resolves near 1.
    ids = make_ids(1, 1000)
    with torch.inference_mode():
        logits, _ = run_in_parts(model, ids, [1] * 1000)
        assert_logits_agree(logits, model(ids).logits, SPLIT_CPU)


def test_two_prompts_in_a_row_are_as_with_a_fresh_model(model: Decoder) -> None:
    first, second = make_ids(1, 50, seed=3), make_ids(1, 60, seed=4)
    run_in_parts(model, first, [40, *[1] * 10])
    logits, state = run_in_parts(model, second, [50, *[1] * 10])
    fresh_logits, fresh_state = run_in_parts(make_model(), second, [50, *[1] * 10])
    assert torch.equal(logits, fresh_logits)
    assert torch.equal(state.positions, fresh_state.positions)


def test_the_given_state_is_never_modified(model: Decoder) -> None:
    state = model(make_ids(2, 30)).state
    before = state.clone()
    model(make_ids(2, 1, seed=5), state=state)
    model(make_ids(2, 70, seed=6), state=state)
    assert all(torch.equal(x, y) for x, y in zip(state.layers, before.layers))
    assert torch.equal(state.positions, before.positions)


def test_gradients_flow_through_the_state() -> None:
    ids = make_ids(1, 80)
    whole, parts = make_model(dtype=torch.float64), make_model(dtype=torch.float64)
    whole(ids).logits[:, 40:].square().sum().backward()
    state = parts(ids[:, :40]).state
    parts(ids[:, 40:], state=state).logits.square().sum().backward()
    for (name, x), y in zip(parts.named_parameters(), whole.parameters()):
        assert_close(x.grad, y.grad, limit=1e-10, name=name)


def test_training_mode_gives_the_same_numbers(model: Decoder) -> None:
    ids = make_ids(1, 70)
    exact = model(ids).logits
    try:
        assert torch.equal(model.train()(ids).logits, exact)
    finally:
        model.eval()


def test_explicit_positions_win_over_the_state(model: Decoder) -> None:
    ids = make_ids(1, 20)
    state = model(ids[:, :10]).state
    by_state = model(ids[:, 10:], state=state)
    by_hand = model(ids[:, 10:], state=state, positions=torch.arange(10, 20))
    elsewhere = model(ids[:, 10:], state=state, positions=torch.arange(50, 60))
    assert torch.equal(by_state.logits, by_hand.logits)
    assert not torch.equal(by_state.logits, elsewhere.logits)
    assert elsewhere.state.positions.tolist() == [60]


def test_state_has_constant_size(model: Decoder) -> None:
    short, long = model(make_ids(1, 1)).state, model(make_ids(1, 500)).state
    assert [x.shape for x in short.layers] == [x.shape for x in long.layers]
    assert short.layers[0].shape == (1, 2, 32, 16)
    assert short.layers[1].shape == (1, 2, 16, 16)


def test_learned_positions_continue_from_the_state_and_end() -> None:
    model = make_model(variant_config({"decay": "none"}, lrpe="none", max_positions=100))
    ids = make_ids(1, 100)
    logits, state = run_in_parts(model, ids, [60, *[1] * 40])
    assert_logits_agree(logits, model(ids).logits, SPLIT_CPU)
    with pytest.raises(ValueError, match="max_positions"):
        model(ids[:, :1], state=state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_state_dtype_follows_the_contract(dtype: torch.dtype) -> None:
    state = make_model(tnl_config(), dtype)(make_ids(1, 5)).state
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {layer.dtype for layer in state.layers} == {wanted}
