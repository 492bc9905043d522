"""LightNet beside flash-linear-attention: its layer's weights, its naive recurrence, its count.

Its layer itself runs on a GPU alone; what it computes is its naive gated recurrence between
projections, as put together here.
"""

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close

from transnormer.models import zoo
from transnormer.models.decoder import Decoder
from transnormer.nn.norms import NormConfig
from transnormer.nn.token_mixers import LightNetConfig

REASON = "flash-linear-attention is not installed; run: pip install 'transnormer[bench]'"
DIM, HEADS, RANK = 32, 2, 5
# Names of their parameters -> ours.
NAMES = {
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "g_proj.0": "gate_down_proj",
    "g_proj.1": "gate_up_proj",
    "g_norm": "norm",
    "o_proj": "out_proj",
}


def test_layer_agrees_with_the_naive_recurrence() -> None:
    naive = pytest.importorskip("fla.ops.gla.naive", reason=REASON)
    layers = pytest.importorskip("fla.layers.lightnet", reason=REASON)
    theirs = layers.LightNetAttention(
        hidden_size=DIM, expand_ratio=DIM // HEADS, gate_low_rank_dim=RANK
    )
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    ours = LightNetConfig(
        heads=HEADS,
        lrpe=False,
        gate_rank=RANK,
        gate_activation="silu",
        norm=NormConfig(kind="rms", eps=theirs.g_norm.eps),
    ).build(DIM, 0, 1, causal=True)
    ours.load_state_dict(
        {f"{ours_}.weight": theirs.state_dict()[f"{name}.weight"] for name, ours_ in NAMES.items()}
    )
    x = torch.randn(2, 70, DIM)
    q, k, v = (
        proj(x).unflatten(-1, (HEADS, -1)) for proj in (ours.q_proj, ours.k_proj, ours.v_proj)
    )
    z = k.logcumsumexp(1)
    gate = F.pad(z[:, :-1] - z[:, 1:], (0, 0, 0, 0, 1, 0))
    o, memory = naive.naive_recurrent_gla(
        F.silu(q), (k - z).exp(), v, gate, output_final_state=True
    )
    o = F.rms_norm(o.flatten(2), (DIM,), theirs.g_norm.weight, theirs.g_norm.eps)
    exact = theirs.o_proj(o * F.silu(theirs.g_proj(x)))
    y, state = ours(x, positions=torch.arange(70).expand(2, -1))
    # They scale queries by key_dim^-1/2, which the norm takes back but for its eps.
    assert_close(y, exact.detach(), limit=1e-4)
    assert_close(state.memory, memory.detach(), limit=1e-5)
    assert_close(state.log_mass, z[:, -1].detach(), limit=1e-6)


def test_default_model_has_their_count() -> None:
    models = pytest.importorskip("fla.models.lightnet", reason=REASON)
    with torch.device("meta"):
        theirs = models.LightNetForCausalLM(models.LightNetConfig())
        ours = Decoder(zoo.lightnet("1.4b"))
    assert ours.num_parameters() == sum(p.numel() for p in theirs.parameters())
