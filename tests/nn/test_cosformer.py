"""cosFormer against its formula, and what a fixed maximum promises."""

import math

import oracles_additive
import pytest
import torch
from tolerances import assert_close

from transnormer.nn.token_mixers import CosformerConfig

DIM = 16


def build(*, causal: bool = True, dtype: torch.dtype = torch.float64, **changes: object):
    fields = {"heads": 2, "max_positions": 100, **changes}
    return CosformerConfig(**fields).build(DIM, 0, 1, causal=causal).to(dtype)


def run(mixer, x: torch.Tensor, start: int = 0, **arguments: object):
    positions = torch.arange(start, start + x.shape[1]).expand(x.shape[:2])
    return mixer(x, positions=positions, **arguments)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("out_proj", [True, False], ids=["out", "no-out"])
def test_mixer_matches_the_formula(causal: bool, out_proj: bool) -> None:
    mixer = build(causal=causal, out_proj=out_proj)
    x = torch.randn(2, 70, DIM, dtype=torch.float64)
    y, state = run(mixer, x)
    q, k, v = (z.unflatten(-1, (2, -1)) for z in mixer.qkv_proj(x).chunk(3, -1))
    exact = mixer.out_proj(oracles_additive.cosformer(q, k, v, 100, causal=causal).flatten(2))
    assert_close(y, exact)
    assert (state is None) == (not causal)


def test_state_holds_numerator_and_denominator_in_one_tensor() -> None:
    mixer = build(dtype=torch.bfloat16)
    _, state = run(mixer, torch.randn(3, 5, DIM).bfloat16())
    assert state.shape == mixer.empty_state(3).shape == (3, 2, 16, 12)
    assert state.dtype == torch.float32


def test_weights_do_not_depend_on_what_follows() -> None:
    mixer = build()
    x = torch.randn(1, 90, DIM, dtype=torch.float64)
    assert_close(run(mixer, x)[0][:, :30], run(mixer, x[:, :30])[0].detach())


def test_another_maximum_gives_other_weights() -> None:
    x = torch.randn(1, 60, DIM, dtype=torch.float64)
    near, far = build(max_positions=60), build(max_positions=10_000)
    far.load_state_dict(near.state_dict())
    assert not torch.allclose(run(near, x)[0], run(far, x)[0], rtol=1e-3)


def test_distances_alone_count() -> None:
    mixer = build()
    x = torch.randn(1, 20, DIM, dtype=torch.float64)
    assert_close(run(mixer, x, start=80)[0], run(mixer, x)[0].detach())


def test_tokens_without_weight_give_zero_and_finite_gradients() -> None:
    mixer = build(out_proj=False)
    with torch.no_grad():
        mixer.qkv_proj.weight.zero_()
        mixer.qkv_proj.bias.fill_(-1.0)
    x = torch.randn(1, 9, DIM, dtype=torch.float64)
    y, _ = run(mixer, x)
    assert y.eq(0).all()
    y.sum().backward()
    assert mixer.qkv_proj.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_features_and_results_but_no_sums(dtype: torch.dtype) -> None:
    seq = 100
    half = build(dtype=dtype, out_proj=False)
    x = torch.randn(1, seq, DIM).to(dtype)
    q, k, v = (z.unflatten(-1, (2, -1)) for z in half.qkv_proj(x).chunk(3, -1))
    angles = torch.arange(seq).double()[:, None, None] * math.pi / 200

    def features(z: torch.Tensor) -> torch.Tensor:
        turned = torch.cat([z.relu() * angles.float().cos(), z.relu() * angles.float().sin()], -1)
        return turned.to(dtype).double()

    weights = torch.einsum("bihd,bjhd->bhij", features(q), features(k)).tril()
    sums = torch.einsum("bhij,bjhd->bihd", weights, v.double()).to(dtype).double()
    masses = weights.sum(-1).mT[..., None].to(dtype).double()
    exact = (sums / masses.clamp(min=1e-6)).flatten(2)
    y, _ = run(half, x)
    assert_close(y, exact)
    # All but those that float32 leaves at the middle between two numbers.
    assert (y == exact.to(dtype)).double().mean() > 0.98


def test_positions_end_before_the_maximum() -> None:
    mixer = build()
    x = torch.randn(1, 2, DIM, dtype=torch.float64)
    run(mixer, x, start=98)
    with pytest.raises(ValueError, match=r"positions reach 100; expected less than.*100"):
        run(mixer, x, start=99)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"heads is 3.*divisor of 16"):
        build(heads=3)
