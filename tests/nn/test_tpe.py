"""The Toeplitz position encoding against a dense Toeplitz matrix a channel."""

import math

import oracles_additive
import pytest
import torch
from tolerances import GRADIENT_FLOAT64, assert_close

from transnormer.nn.token_mixers import TpeConfig, tpe

DIM = 6


def build(*, causal: bool = True, dtype: torch.dtype = torch.float64, **changes: object):
    mixer = TpeConfig(**{"exponents": 3, **changes}).build(DIM, 0, 1, causal=causal).to(dtype)
    with torch.no_grad():
        mixer.decay.log_rate.add_(0.3 * torch.randn_like(mixer.decay.log_rate))
    return mixer


def run(mixer, x: torch.Tensor, **arguments: object):
    return mixer(x, positions=torch.arange(x.shape[1]).expand(x.shape[:2]), **arguments)


def dense(mixer, x: torch.Tensor, axis: int = 0) -> torch.Tensor:
    decays = mixer.decay(torch.float64)[axis].exp()
    return oracles_additive.toeplitz(x, mixing(mixer, axis), decays, causal=mixer.causal)


def mixing(mixer, axis: int = 0) -> torch.Tensor:
    return mixer.mixing[axis].double()


@pytest.mark.parametrize("seq", [1, 2, 16, 17, 64, 65, 150])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_every_length_matches_the_dense_matrix(causal: bool, seq: int) -> None:
    mixer = build(causal=causal)
    x = torch.randn(2, seq, DIM, dtype=torch.float64)
    y, state = run(mixer, x)
    assert_close(y, dense(mixer, x).detach())
    assert (state is None) == (not causal)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_channels_in_several_heads_change_nothing(
    packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer, bounds = build(), torch.tensor([0, 70, 150]) if packed else None
    x = torch.randn(1, 150, DIM, dtype=torch.float64, requires_grad=True)
    leaves, results = (x, *mixer.parameters()), []
    for width in (DIM, 2):
        monkeypatch.setattr(tpe, "_head_width", lambda _, width=width: width)
        y, state = run(mixer, x, cu_seqlens=bounds)
        total = y.square().sum() + state.square().sum()
        results.append((y, state, *torch.autograd.grad(total, leaves)))
    for once, split in zip(*results, strict=True):
        assert_close(split, once.detach())


@pytest.mark.parametrize(("channels", "width"), [(6, 6), (768, 384), (1024, 512), (1030, 206)])
def test_heads_are_as_wide_as_kernels_take(channels: int, width: int) -> None:
    assert tpe._head_width(channels) == width


def test_state_is_the_sum_of_decayed_tokens() -> None:
    mixer = build()
    x = torch.randn(2, 70, DIM, dtype=torch.float64)
    _, state = run(mixer, x)
    powers = mixer.decay(torch.float64)[0][:, None] * torch.arange(69, -1, -1)
    assert_close(state, torch.einsum("et,btc->bec", powers.exp(), x).detach())
    assert state.shape == mixer.empty_state(2).shape


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("packed", [False, True])
def test_no_tokens_keep_the_state(packed: bool, causal: bool) -> None:
    mixer = build(causal=causal)
    x, state = torch.zeros(1, 0, DIM, dtype=torch.float64), torch.randn(1, 3, DIM).double()
    bounds = torch.tensor([0, 0]) if packed else None
    y, after = run(mixer, x, state=state, cu_seqlens=bounds)
    assert y.shape == x.shape
    assert after is None if not causal else torch.equal(after, state)


def test_gradients_match_those_of_the_dense_matrix() -> None:
    mixer = build()
    x = torch.randn(1, 70, DIM, dtype=torch.float64, requires_grad=True)
    leaves = (x, mixer.mixing, mixer.decay.log_rate)
    wanted = torch.autograd.grad(dense(mixer, x).square().sum(), leaves)
    actual = torch.autograd.grad(run(mixer, x)[0].square().sum(), leaves)
    for mine, exact in zip(actual, wanted, strict=True):
        assert_close(mine, exact, limit=GRADIENT_FLOAT64)


@pytest.mark.parametrize("extents", [(5, 7), (3, 4, 5), (1, 30)], ids=str)
def test_axes_are_summed(extents: tuple[int, ...]) -> None:
    mixer = build(causal=False, axes=len(extents))
    x = torch.randn(2, math.prod(extents), DIM, dtype=torch.float64)
    y, state = run(mixer, x, shape=extents)
    grid, exact = x.unflatten(1, extents), 0
    for axis in range(len(extents)):
        lines = grid.movedim(1 + axis, -2)
        part = dense(mixer, lines.flatten(0, -3), axis).view(lines.shape)
        exact = exact + part.movedim(-2, 1 + axis)
    assert_close(y, exact.flatten(1, -2).detach())
    assert state is None


def test_a_masked_place_of_a_grid_adds_nothing_and_stays() -> None:
    mixer = build(causal=False, axes=2)
    x = torch.randn(1, 12, DIM, dtype=torch.float64)
    mask = torch.arange(12)[None] != 5
    y, _ = run(mixer, x, shape=(3, 4), mask=mask)
    exact, _ = run(mixer, x * mask[..., None], shape=(3, 4))
    assert_close(y, exact.detach())


def test_one_axis_takes_its_extent() -> None:
    mixer = build(causal=False)
    x = torch.randn(1, 12, DIM, dtype=torch.float64)
    assert_close(run(mixer, x, shape=(12,))[0], run(mixer, x)[0].detach())


def test_first_values_keep_the_variance_and_span_the_half_lives() -> None:
    mixer = TpeConfig(exponents=128).build(64, 0, 1, causal=True)
    half_lives = math.log(0.5) / mixer.decay(torch.float64)[0]
    assert half_lives[0].item() == pytest.approx(1.0)
    assert half_lives[-1].item() == pytest.approx(1024.0)
    x = torch.randn(2, 3000, 64)
    y, _ = run(mixer, x)
    assert 0.7 < y[:, 2000:].std() < 1.3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_neither_decays_nor_sums(dtype: torch.dtype) -> None:
    mixer = build(dtype=dtype, exponents=8)
    assert mixer.decay.log_rate.dtype == torch.float32
    x = torch.randn(1, 300, DIM).to(dtype)
    y, state = run(mixer, x)
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    assert_close(y, dense(mixer, x.double()).detach())


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"axes is 2.*causal=False"):
        build(axes=2)
    mixer, x = build(causal=False, axes=2), torch.randn(1, 12, DIM, dtype=torch.float64)
    with pytest.raises(ValueError, match="shape is None; expected 2 extents"):
        run(mixer, x)
    with pytest.raises(ValueError, match=r"shape is \(3, 5\), 15 tokens; expected the 12"):
        run(mixer, x, shape=(3, 5))
    with pytest.raises(ValueError, match="cu_seqlens is given"):
        run(mixer, x, shape=(3, 4), cu_seqlens=torch.tensor([0, 12]))
    with pytest.raises(ValueError, match="shape"):
        run(build(), x, shape=(3, 4))
