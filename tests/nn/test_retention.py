"""Retention: its three forms agree, and with torchscale's normalised one after the norm."""

import oracles_recurrent as oracles
import pytest
import torch
from oracles import srms_norm
from tolerances import LRPE_OFFSET, RETNET_NORMALISED, STATE, assert_close

from transnormer.nn.token_mixers import RetentionConfig

DIM, HEADS, VALUE_WIDTH, SEQ = 32, 4, 48, 130
GAMMA = oracles.retnet_gamma(HEADS)


def build(dtype: torch.dtype = torch.float64, *, causal: bool = True, **changes: object):
    config = RetentionConfig(**({"heads": HEADS, "value_width": VALUE_WIDTH} | changes))
    return config.build(DIM, 0, 2, causal=causal).to(dtype)


def run(mixer, x: torch.Tensor, state: torch.Tensor | None = None, start: int = 0):
    positions = torch.arange(start, start + x.shape[1]).expand(x.shape[:2])
    return mixer(x, positions=positions, state=state)


def make(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, SEQ, DIM, dtype=torch.float64)


@pytest.mark.parametrize("form", ["parallel", "chunk", "recurrent"])
@pytest.mark.parametrize("start", [0, 70], ids=["fresh", "continued"])
def test_each_form_of_the_paper_gives_the_same(form: str, start: int) -> None:
    mixer, x = build(), make()
    weights = mixer.state_dict()
    q, k, v = oracles.retention_inputs(x, weights, HEADS)
    o = oracles.parallel_retention(q, k, v, GAMMA)
    state = torch.zeros(2, HEADS, DIM // HEADS, VALUE_WIDTH // HEADS).double()
    _, before = oracles.recurrent_retention(q[:, :70], k[:, :70], v[:, :70], GAMMA, state)
    if start:
        q, k, v, o, state = q[:, start:], k[:, start:], v[:, start:], o[:, start:], before
    if form == "chunk":
        o, after = oracles.chunk_retention(q, k, v, GAMMA, state, size=16)
    elif form == "recurrent":
        o, after = oracles.recurrent_retention(q, k, v, GAMMA, state)
    y, actual_after = run(mixer, x[:, start:], state if start else None, start)
    assert_close(y, oracles.retention_output(x[:, start:], o, weights, 1e-6))
    if form != "parallel":
        assert_close(actual_after, after)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_torchscale_normalised_form_is_the_same_after_the_norm(dtype: torch.dtype) -> None:
    eps = 0.0 if dtype == torch.float64 else 1e-6
    mixer, x = build(norm_eps=eps), make()
    with torch.no_grad():
        # At the first weights of so small a model the outputs are as small as eps.
        for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj):
            projection.weight.mul_(6.0)
    weights = mixer.state_dict()
    q, k, v = oracles.retention_inputs(x, weights, HEADS)
    o = oracles.torchscale_retention(*(y.to(dtype) for y in (q, k, v)), GAMMA)
    exact = oracles.retention_output(x, o, weights, eps)
    y, _ = run(mixer.to(dtype), x.to(dtype))
    assert_close(y, exact, limit=RETNET_NORMALISED[dtype])
    plain = oracles.parallel_retention(q, k, v, GAMMA)
    assert not torch.allclose(o.double(), plain, rtol=0.1), "nothing was normalised"


def test_decay_of_the_experiments() -> None:
    mixer, x = build(decay="linspace"), make()
    weights = mixer.state_dict()
    q, k, v = oracles.retention_inputs(x, weights, HEADS)
    o = oracles.parallel_retention(q, k, v, oracles.retnet_gamma_of_experiments(HEADS))
    assert_close(run(mixer, x)[0], oracles.retention_output(x, o, weights, 1e-6))


def test_two_directions_count_the_token_itself_once() -> None:
    mixer, x = build(causal=False), make()
    weights = mixer.state_dict()
    q, k, v = oracles.retention_inputs(x, weights, HEADS)
    index = torch.arange(SEQ)
    decays = GAMMA[:, None, None] ** (index[:, None] - index).abs()
    scores = torch.einsum("bnhk,bmhk->bhnm", q, k) * decays
    o = torch.einsum("bhnm,bmhv->bnhv", scores, v)
    y, state = run(mixer, x)
    assert state is None
    assert_close(y, oracles.retention_output(x, o, weights, 1e-6))


def test_sizes_of_a_head_may_be_chosen() -> None:
    mixer = build(key_dim=6, value_width=20)
    assert mixer.q_proj.weight.shape == (HEADS * 6, DIM)
    _, state = run(mixer, make(1))
    assert state.shape == mixer.empty_state(1).shape == (1, HEADS, 6, 5)
    assert build(value_width=None).v_proj.weight.shape == (2 * DIM, DIM)


def test_far_positions_give_the_scores_of_near_ones() -> None:
    mixer, x = build(torch.float32), make().float()
    assert_close(run(mixer, x, start=4_000_000)[0], run(mixer, x)[0].double(), limit=LRPE_OFFSET)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_casts_do_not_round_the_decays(dtype: torch.dtype) -> None:
    assert_close(build(dtype).decay(dtype), GAMMA.log())
    assert_close(build(dtype).double().decay(torch.float64), GAMMA.log())


def test_state_is_float32_under_bfloat16_weights() -> None:
    y, state = run(build(torch.bfloat16), make().bfloat16())
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32


def test_weights_start_as_torchscale_s() -> None:
    torch.manual_seed(0)
    mixer = RetentionConfig(heads=4).build(256, 0, 1, causal=True)
    for name, gain in (("q", 2**-2.5), ("k", 2**-2.5), ("v", 2**-2.5), ("gate", 2**-2.5)):
        weight = getattr(mixer, f"{name}_proj").weight
        bound = gain * (6 / sum(weight.shape)) ** 0.5
        assert bound * 0.999 < weight.abs().max() <= bound
    weight = mixer.out_proj.weight
    assert weight.abs().max() <= 0.5 * (6 / sum(weight.shape)) ** 0.5
    assert_close(weight.std(), torch.tensor(0.5 * (2 / sum(weight.shape)) ** 0.5), limit=0.01)


def test_each_head_is_normed_by_itself() -> None:
    mixer, x = build(norm_eps=1e-3), make()
    weights = mixer.state_dict()
    o = oracles.parallel_retention(*oracles.retention_inputs(x, weights, HEADS), GAMMA)
    assert_close(mixer.norm(o), srms_norm(o, 1e-3), limit=STATE[torch.float64])
    assert_close(run(mixer, x)[0], oracles.retention_output(x, o, weights, 1e-3))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"heads": 5}, r"heads is 5.*key_dim"),
        ({"value_width": 50}, r"value_width is 50"),
        ({"key_dim": 5}, r"head_dim is 5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build(**changes)
