"""DiagAttention against its formula, and the blocks that it makes."""

import oracles_transnormer as oracles
import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from transnormer.nn.norms import NormConfig
from transnormer.nn.token_mixers import DiagAttentionConfig

DIM, HEADS, BLOCK = 24, 2, 5


def build(causal: bool = True, **changes: object):
    fields = {"heads": HEADS, "block_size": BLOCK} | changes
    mixer = DiagAttentionConfig(**fields).build(DIM, 0, 2, causal=causal).double()
    with torch.no_grad():
        for x in mixer.parameters():
            x.copy_(0.3 * torch.randn(x.shape))
    return mixer


def run(mixer, x: Tensor, state=None, mask: Tensor | None = None, **inputs: Tensor):
    positions = torch.arange(x.shape[1]).expand(x.shape[:2])
    return mixer(x, **({"positions": positions} | inputs), state=state, mask=mask)


def exact(mixer, x: Tensor, *, causal: bool) -> Tensor:
    """The layer by the formula, row by row."""
    q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in mixer.qkv_proj(x).chunk(3, -1))
    config, lrpe = mixer.config, mixer.lrpe
    rows = []
    for row in range(x.shape[0]):
        parts = q[row], k[row], v[row]
        o = oracles.diag_attention(
            *parts, BLOCK, config.weights, lrpe.theta, lrpe.reflection, causal=causal
        )
        rows.append(oracles.outer_srms(o) if config.norm else o)
    return mixer.out_proj(torch.stack(rows))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both"])
@pytest.mark.parametrize("variant", ["t1", "t2"])
@pytest.mark.parametrize("seq", [1, 5, 13])
def test_variants_match_the_formula(variant: str, causal: bool, seq: int) -> None:
    norm = NormConfig(eps=1e-8, eps_outside=True)
    fields = {"weights": "relu", "norm": norm} if variant == "t1" else {}
    mixer = build(causal, **fields)
    x = torch.randn(2, seq, DIM, dtype=torch.float64)
    with torch.no_grad():
        assert_close(run(mixer, x)[0], exact(mixer, x, causal=causal))


def test_without_lrpe_positions_mean_nothing() -> None:
    mixer = build(lrpe=False)
    x = torch.randn(1, 9, DIM, dtype=torch.float64)
    positions = torch.randint(100, (1, 9))
    assert torch.equal(run(mixer, x)[0], run(mixer, x, positions=positions)[0])
    assert mixer.lrpe is None


def test_blocks_count_tokens_and_not_positions() -> None:
    mixer = build()
    x = torch.randn(1, 12, DIM, dtype=torch.float64)
    # LRPE is relative: positions of another origin change neither weights nor blocks.
    shifted = run(mixer, x, positions=torch.arange(3, 15)[None])[0]
    assert_close(shifted, run(mixer, x)[0])


def test_a_token_sees_its_own_block_alone() -> None:
    mixer = build(causal=False)
    x = torch.randn(1, 12, DIM, dtype=torch.float64)
    changed = x.clone()
    changed[:, 7] += 1.0
    same = (run(mixer, x)[0] == run(mixer, changed)[0]).all(-1)[0]
    assert same.tolist() == [not 5 <= t < 10 for t in range(12)]


def test_the_state_has_constant_size_and_is_empty_after_a_full_block() -> None:
    mixer = build()
    sizes = set()
    for seq in (1, 4, 5, 10, 13):
        state = run(mixer, torch.randn(2, seq, DIM, dtype=torch.float64))[1]
        sizes.add(tuple(x.shape for x in state))
        assert state.valid.sum(1).tolist() == [seq % BLOCK] * 2
        assert bool((state.keys[~state.valid] == 0).all())
    assert sizes == {tuple(x.shape for x in mixer.empty_state(2))}


def test_pads_inside_the_last_block_have_no_weight() -> None:
    # Softmax over a block that zeros fill up gives each of them a weight.
    mixer = build(causal=False)
    x = torch.randn(1, 7, DIM, dtype=torch.float64)
    mask = torch.arange(10)[None] < 7
    padded = torch.cat([x, torch.full((1, 3, DIM), 1e3, dtype=torch.float64)], 1)
    with torch.no_grad():
        assert_close(run(mixer, padded, mask=mask)[0][:, :7], exact(mixer, x, causal=False))


@pytest.mark.parametrize("weights", ["softmax", "relu"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both"])
def test_a_row_of_pads_alone_has_finite_values_and_gradients(weights: str, causal: bool) -> None:
    norm = NormConfig(eps=1e-8, eps_outside=True)
    mixer = build(causal, weights=weights, norm=norm)
    x = torch.randn(2, 7, DIM, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True], [False]]).expand(2, 7)
    y, _ = run(mixer, x, mask=mask)
    y.square().sum().backward()
    assert bool(torch.isfinite(y).all())
    assert bool(torch.isfinite(x.grad).all())


def test_relu_weights_that_are_all_zero_have_finite_gradients() -> None:
    # The first token of a block may weigh itself 0 in all heads: the norm then divides 0 by eps.
    mixer = build(weights="relu", norm=NormConfig(eps=1e-8, eps_outside=True))
    with torch.no_grad():
        mixer.qkv_proj.weight[DIM : 2 * DIM] = -mixer.qkv_proj.weight[:DIM]
        mixer.qkv_proj.bias.zero_()
    x = torch.randn(1, 6, DIM, dtype=torch.float64, requires_grad=True)
    y, _ = run(mixer, x)
    assert bool((y[:, 0] == mixer.out_proj.bias).all())
    y.sum().backward()
    assert bool(torch.isfinite(x.grad).all())


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"heads is 5.*divisor of 24"):
        build(heads=5)
