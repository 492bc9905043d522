"""The signature of flash-linear-attention's simple GLA computes the recurrence."""

import oracles
import pytest
import torch
from tolerances import GRADIENT, LOG_DECAY_GRADIENT, STATE, assert_close
from torch import Tensor

from transnormer.compat.fla import chunk_simple_gla
from transnormer.ops.decay import tnl_log_decay

BATCH, SEQ, HEADS, KEY_DIM, VALUE_DIM = 2, 100, 3, 16, 20
GAMMA = tnl_log_decay(HEADS, 0, 24)


def make_inputs(batch: int = BATCH, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v in [batch, seq, heads, dim]."""
    dims = (KEY_DIM, KEY_DIM, VALUE_DIM)
    return [torch.randn(batch, SEQ, HEADS, dim).to(dtype) for dim in dims]


def make_gates(batch: int = BATCH) -> Tensor:
    return -torch.rand(batch, SEQ, HEADS).square()


def test_scale_defaults_to_that_of_softmax_attention() -> None:
    q, k, v = make_inputs()
    o, state = chunk_simple_gla(q, k, v, g_gamma=GAMMA)
    assert state is None
    exact, _ = oracles.linear_attention(q, k, v, GAMMA, scale=KEY_DIM**-0.5)
    assert_close(o, exact, name="o")


def test_scale_is_taken_as_given() -> None:
    q, k, v = make_inputs()
    o, _ = chunk_simple_gla(q, k, v, g_gamma=GAMMA, scale=0.5)
    assert_close(o, oracles.linear_attention(q, k, v, GAMMA, scale=0.5)[0], name="o")


@pytest.mark.parametrize("decay", ["none", "constant", "gates"])
def test_decays_and_states_follow_the_recurrence(decay: str) -> None:
    q, k, v = make_inputs()
    g = make_gates() if decay == "gates" else None
    g_gamma = GAMMA if decay == "constant" else None
    before = torch.randn(BATCH, HEADS, KEY_DIM, VALUE_DIM)
    o, state = chunk_simple_gla(
        q, k, v, g, g_gamma, 1.0, initial_state=before, output_final_state=True
    )
    exact_o, exact_state = oracles.linear_attention(
        q, k, v, g if g_gamma is None else g_gamma, initial_state=before
    )
    assert_close(o, exact_o, name="o")
    assert_close(state, exact_state, limit=STATE[torch.float32], name="final_state")


def test_packed_sequences_stay_apart() -> None:
    q, k, v = make_inputs(batch=1)
    bounds = torch.tensor([0, 1, 1, 64, SEQ])
    o, state = chunk_simple_gla(
        q, k, v, g_gamma=GAMMA, scale=1.0, output_final_state=True, cu_seqlens=bounds
    )
    exact_o, exact_state = oracles.linear_attention(q, k, v, GAMMA, cu_seqlens=bounds)
    assert_close(o, exact_o, name="o")
    assert_close(state, exact_state, limit=STATE[torch.float32], name="final_state")


def test_a_state_of_half_precision_is_read_in_float32() -> None:
    q, k, v = make_inputs(dtype=torch.bfloat16)
    before = torch.randn(BATCH, HEADS, KEY_DIM, VALUE_DIM, dtype=torch.bfloat16)
    o, state = chunk_simple_gla(
        q, k, v, g_gamma=GAMMA, scale=1.0, initial_state=before, output_final_state=True
    )
    exact_o, exact_state = oracles.linear_attention(q, k, v, GAMMA, initial_state=before)
    assert o.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert_close(o, exact_o, name="o")
    assert_close(state, exact_state, limit=STATE[torch.bfloat16], name="final_state")


@pytest.mark.parametrize("decay", ["g", "g_gamma"])
def test_gradients_reach_all_inputs(decay: str) -> None:
    values = make_inputs()
    values.append(make_gates() if decay == "g" else GAMMA)
    values.append(torch.randn(BATCH, HEADS, KEY_DIM, VALUE_DIM))
    leaves = [x.clone().requires_grad_() for x in values]
    doubles = [x.double().requires_grad_() for x in values]
    o, state = chunk_simple_gla(
        *leaves[:3],
        scale=1.0,
        initial_state=leaves[4],
        output_final_state=True,
        **{decay: leaves[3]},
    )
    exact_o, exact_state = oracles.linear_attention(*doubles[:4], initial_state=doubles[4])
    weights = [torch.randn_like(x) for x in (o, state)]
    actual = torch.autograd.grad((o, state), leaves, weights)
    wanted = torch.autograd.grad((exact_o, exact_state), doubles, [w.double() for w in weights])
    for name, x, y in zip(("q", "k", "v", decay, "initial_state"), actual, wanted, strict=True):
        limits = LOG_DECAY_GRADIENT if name == decay else GRADIENT
        assert_close(x, y, limit=limits[torch.float32], name=f"gradient of {name}")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"g": make_gates()}, ValueError, "g and g_gamma are both given; expected at most one"),
        ({"g_gamma": -GAMMA}, ValueError, "g_gamma holds 0.25.*; expected values <= 0"),
        ({"g_gamma": torch.zeros(2)}, ValueError, r"g_gamma has shape \[2\]; expected \[3\]"),
        ({"g_gamma": None, "g": -make_gates()}, ValueError, "g holds"),
        ({"g_gamma": torch.zeros(3, dtype=torch.int64)}, TypeError, "g_gamma is torch.int64"),
        ({"g_gamma": GAMMA.to("meta")}, ValueError, "^g_gamma is on meta; expected cpu"),
        ({"g_gamma": None, "g": make_gates().to("meta")}, ValueError, "^g is on meta; expected"),
        ({"scale": "1"}, TypeError, "scale is '1'; expected a number"),
        ({"cu_seqlens": False}, TypeError, "cu_seqlens is bool; expected a tensor or None"),
    ],
)
def test_mistakes_are_named(change: dict, error: type[Exception], message: str) -> None:
    arguments = dict(zip("qkv", make_inputs())) | {"g_gamma": GAMMA} | change
    with pytest.raises(error, match=message):
        chunk_simple_gla(**arguments)


def test_autocast_gives_its_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        o, state = chunk_simple_gla(*make_inputs(), g_gamma=GAMMA, output_final_state=True)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
