"""NormAttention: Lightning with TransNormer's switches against the formula."""

import oracles_transnormer as oracles
import pytest
import torch
from tolerances import assert_close

from transnormer.models.zoo.transnormer import norm_attention
from transnormer.nn.rotary import Rotary

DIM, HEADS = 24, 2


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both"])
@pytest.mark.parametrize(("variant", "phi"), [("t1", "elu"), ("t2", "1+elu")])
def test_variants_match_the_formula(variant: str, phi: str, causal: bool) -> None:
    mixer = norm_attention(variant, HEADS).build(DIM, 1, 2, causal=causal).double()
    with torch.no_grad():
        for x in mixer.parameters():
            x.copy_(0.3 * torch.randn(x.shape))
        x = torch.randn(2, 11, DIM, dtype=torch.float64)
        y, state = mixer(x, positions=torch.arange(11).expand(2, -1))
        q, k, v = (z.unflatten(-1, (HEADS, -1)) for z in mixer.qkvu_proj(x).chunk(3, -1))
        lrpe = mixer.lrpe
        o = [
            oracles.norm_attention(
                q[row], k[row], v[row], phi, lrpe.theta, lrpe.reflection, causal=causal
            )
            for row in range(2)
        ]
        assert_close(y, mixer.out_proj(torch.stack(o)))
    # The rotary form of LRPE leaves the key dim as it is.
    assert state is None or state.shape == (2, HEADS, DIM // HEADS, DIM // HEADS)


def test_heads_share_one_learned_theta() -> None:
    mixer = norm_attention("t2", HEADS).build(DIM, 0, 2, causal=True)
    assert isinstance(mixer.lrpe, Rotary)
    assert mixer.lrpe.theta.shape == (DIM // HEADS // 2,)
    assert mixer.lrpe.theta.requires_grad
