"""LightNet against the cumulative softmax in closed form, causal and whole."""

import math

import oracles_additive
import pytest
import torch
from tolerances import GRADIENT_FLOAT64, assert_close

from transnormer.nn.norms import NormConfig
from transnormer.nn.token_mixers import LightNetConfig

DIM, HEADS = 12, 2
PLAIN = {"lrpe": False, "gate": "none"}


def build(*, causal: bool = True, dtype: torch.dtype = torch.float64, **changes: object):
    mixer = LightNetConfig(**{"heads": HEADS, **changes}).build(DIM, 0, 1, causal=causal)
    for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj):
        torch.nn.init.normal_(proj.weight, std=0.8)
    return mixer.to(dtype)


def run(mixer, x: torch.Tensor, **arguments: object):
    return mixer(x, positions=torch.arange(x.shape[1]).expand(x.shape[:2]), **arguments)


def projected(mixer, x: torch.Tensor) -> list[torch.Tensor]:
    q, k, v = (proj(x) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    return [y.unflatten(-1, (HEADS, -1)) for y in (torch.nn.functional.silu(q), k, v)]


def closed_form(mixer, x: torch.Tensor) -> torch.Tensor:
    angles = None
    if mixer.lrpe is not None:
        angles = torch.arange(x.shape[1])[:, None, None] * mixer.lrpe.theta[:, 0]
    o = oracles_additive.lightnet(*projected(mixer, x), angles, mixer.config.initial_mass)
    o = mixer.norm(o.flatten(2))
    if mixer.config.gate == "low_rank":
        o = o * mixer.gate_up_proj(mixer.gate_down_proj(x)).sigmoid()
    return mixer.out_proj(o)


@pytest.mark.parametrize(
    "changes",
    [{}, PLAIN, {"key_dim": 5}, {"initial_mass": 1.0}, {"initial_mass": 0.3, **PLAIN}],
    ids=["default", "plain", "key-dim", "mass-1", "mass-0.3"],
)
@pytest.mark.parametrize("seq", [1, 2, 40])
def test_recurrence_is_the_softmax_over_the_tokens_so_far(
    seq: int, changes: dict[str, object]
) -> None:
    mixer = build(**changes)
    x = torch.randn(2, seq, DIM, dtype=torch.float64)
    y, state = run(mixer, x)
    assert_close(y, closed_form(mixer, x).detach())
    for mine, empty in zip(state, mixer.empty_state(2), strict=True):
        assert mine.shape == empty.shape


def test_gradients_are_those_of_the_closed_form() -> None:
    mixer = build()
    x = torch.randn(1, 40, DIM, dtype=torch.float64, requires_grad=True)
    leaves = (x, *mixer.parameters())
    wanted = torch.autograd.grad(closed_form(mixer, x).square().sum(), leaves)
    actual = torch.autograd.grad(run(mixer, x)[0].square().sum(), leaves)
    for mine, exact in zip(actual, wanted, strict=True):
        assert_close(mine, exact, limit=GRADIENT_FLOAT64)


def test_last_causal_state_is_the_bidirectional_memory() -> None:
    mixer = build(**PLAIN)
    x = torch.randn(2, 90, DIM, dtype=torch.float64)
    _, state = run(mixer, x)
    _, k, v = projected(mixer, x)
    assert_close(state.memory, torch.einsum("bshk,bshv->bhkv", k.softmax(1), v).detach())
    assert_close(state.log_mass, k.logsumexp(1).detach())


@pytest.mark.parametrize("initial_mass", [0.0, 2.0])
@pytest.mark.parametrize("lrpe", [True, False], ids=["lrpe", "plain"])
def test_bidirectional_form_is_one_softmax(lrpe: bool, initial_mass: float) -> None:
    mixer = build(causal=False, gate="none", lrpe=lrpe, initial_mass=initial_mass)
    x = torch.randn(2, 30, DIM, dtype=torch.float64)
    y, state = run(mixer, x)
    assert state is None
    q, k, v = projected(mixer, x)
    k = k.exp() / (initial_mass + k.exp().sum(1, keepdim=True))
    if lrpe:
        angles = torch.arange(30)[:, None, None] * mixer.lrpe.theta[:, 0]
        q, k = (torch.cat([z * angles.cos(), z * angles.sin()], -1) for z in (q, k))
    o = torch.einsum("bthk,bshk,bshv->bthv", q, k, v)
    assert_close(y, mixer.out_proj(mixer.norm(o.flatten(2))).detach())


def test_order_does_not_count_without_position_encoding() -> None:
    mixer = build(causal=False, lrpe=False)
    x, order = torch.randn(1, 30, DIM, dtype=torch.float64), torch.randperm(30)
    assert_close(run(mixer, x[:, order])[0], run(mixer, x)[0][:, order].detach())
    positioned = build(causal=False)
    assert not torch.allclose(run(positioned, x[:, order])[0], run(positioned, x)[0][:, order])


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("packed", [False, True], ids=["row", "packed"])
def test_a_sequence_of_pads_alone_gives_no_nan(causal: bool, packed: bool) -> None:
    mixer = build(causal=causal)
    x = torch.randn(1, 20, DIM, dtype=torch.float64)
    mask = torch.zeros(1, 20, dtype=torch.bool)
    bounds = torch.tensor([0, 7, 20]) if packed else None
    if packed:
        mask[:, 7:] = True
    y, state = run(mixer, x, mask=mask, cu_seqlens=bounds)
    y.square().sum().backward()
    assert y.isfinite().all()
    for name, p in mixer.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name
    if causal:
        assert state.log_mass[0].eq(-math.inf).all()
        assert state.memory[0].eq(0).all()
    if packed:
        alone, _ = run(mixer, x[:, 7:])
        # Positions differ by 7, which LRPE does not see.
        assert_close(y[:, 7:], alone.detach())


def test_no_tokens_have_no_outputs() -> None:
    mixer = LightNetConfig(heads=2).build(8, 0, 1, causal=False)
    x = torch.zeros(2, 0, 8)
    assert mixer(x, positions=torch.zeros(2, 0, dtype=torch.int64))[0].shape == x.shape


def test_keys_of_any_size_have_finite_gradients() -> None:
    mixer = build(dtype=torch.float32)
    torch.nn.init.normal_(mixer.k_proj.weight, std=300.0)
    x = torch.randn(2, 70, DIM, requires_grad=True)
    y, _ = run(mixer, x)
    y.square().sum().backward()
    assert y.isfinite().all()
    for leaf in (x, *mixer.parameters()):
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("extents", [(4, 5), (2, 3, 4)], ids=str)
def test_axes_reach_the_position_encoding(extents: tuple[int, ...]) -> None:
    seq = math.prod(extents) + 2
    mixer = build(causal=False, gate="none", lrpe_axes=len(extents), condition_tokens=2)
    x = torch.randn(1, seq, DIM, dtype=torch.float64)
    y, _ = run(mixer, x, shape=extents)
    q, k, v = projected(mixer, x)
    q, k = mixer.lrpe((q, k.softmax(1)), torch.zeros(1, seq, dtype=torch.int64), extents)
    o = torch.einsum("bthk,bshk,bshv->bthv", q, k, v)
    assert_close(y, mixer.out_proj(mixer.norm(o.flatten(2))).detach())


def test_a_grid_is_given_whole() -> None:
    mixer = build(lrpe_axes=2)
    x = torch.randn(1, 6, DIM, dtype=torch.float64)
    run(mixer, x, shape=(2, 3))
    with pytest.raises(ValueError, match=r"shape is \(2, 3\).*whole"):
        run(mixer, x, shape=(2, 3), state=mixer.empty_state(1, dtype=torch.float64))
    with pytest.raises(ValueError, match="shape is None; expected 2 extents"):
        run(mixer, x)


def test_gate_before_the_norm_and_its_activation() -> None:
    after = build(gate_activation="silu", gate_rank=3)
    before = build(gate_activation="silu", gate_rank=3, gate_position="before_norm")
    before.load_state_dict(after.state_dict())
    assert after.gate_down_proj.weight.shape == (3, DIM)
    x = torch.randn(1, 10, DIM, dtype=torch.float64)
    gate = torch.nn.functional.silu(after.gate_up_proj(after.gate_down_proj(x)))
    angles = torch.arange(10)[:, None, None] * after.lrpe.theta[:, 0]
    o = oracles_additive.lightnet(*projected(after, x), angles).flatten(2)
    assert_close(run(after, x)[0], after.out_proj(after.norm(o) * gate).detach())
    assert_close(run(before, x)[0], after.out_proj(after.norm(o * gate)).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_neither_mass_nor_decays(dtype: torch.dtype) -> None:
    # Over 600 tokens decays come to 0.998, where bfloat16 has steps of 0.004.
    mixer = build(dtype=dtype, norm=NormConfig(), **PLAIN)
    x = torch.randn(1, 600, DIM).to(dtype)
    _, k, v = (y.double() for y in projected(mixer, x))
    _, state = run(mixer, x)
    assert state.memory.dtype == state.log_mass.dtype == torch.float32
    assert_close(state.log_mass, k.logsumexp(1).detach(), limit=1e-6)
    exact = torch.einsum("bshk,bshv->bhkv", k.softmax(1), v).detach()
    # Keys are rounded once each.
    assert_close(state.memory, exact, limit=2 * torch.finfo(dtype).eps)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"heads is 5.*divisor of 12"):
        LightNetConfig(heads=5).build(DIM, 0, 1, causal=True)
