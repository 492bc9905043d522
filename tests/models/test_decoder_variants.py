"""Every published variant is a switch: it builds, learns, decodes, and sees no later token."""

import pytest
import torch
from decoder_cases import (
    DIM,
    HEADS,
    VOCAB,
    assert_logits_agree,
    make_ids,
    make_model,
    tnl_config,
    variant_config,
)
from tolerances import SPLIT_CPU

from transnormer.models.decoder import BlockConfig, DecoderConfig
from transnormer.nn.channel_mixers import FfnConfig
from transnormer.nn.norms import NormConfig
from transnormer.nn.token_mixers import LightningConfig

LOW_RANK = {"gate": "low_rank", "gate_activation": "sigmoid"}
FFN_BLOCKS = tuple(
    BlockConfig(token_mixer=LightningConfig(heads=HEADS), channel_mixer=FfnConfig(hidden_dim=64))
    for _ in range(2)
)
# The rows of the papers' ablation tables, and the variants that other public code bases train.
VARIANTS: dict[str, DecoderConfig] = {
    "released": tnl_config(),
    "position-learned": variant_config({"decay": "none"}, lrpe="none", max_positions=256),
    "position-decay-only": variant_config(lrpe="none"),
    "position-lrpe-only": variant_config({"decay": "none"}, lrpe="all"),
    "position-lrpe-everywhere": variant_config(lrpe="all"),
    "lrpe-per-head": variant_config({"lrpe_init": "head"}),
    "no-temperature": variant_config({"decay_temperature": False}),
    "decay-as-printed": variant_config({"decay": "paper"}),
    "decay-geometric": variant_config({"decay": "geometric"}),
    "no-gate": variant_config({"gate": "none"}),
    "gate-low-rank": variant_config(LOW_RANK),
    "gate-before-norm": variant_config(LOW_RANK | {"gate_position": "before_norm"}),
    "gate-silu": variant_config({"gate_activation": "silu"}),
    "activation-none": variant_config({"qk_activation": "none"}),
    "activation-1+elu": variant_config({"qk_activation": "1+elu"}),
    "activation-elu": variant_config({"qk_activation": "elu"}),
    "activation-relu": variant_config({"qk_activation": "relu"}),
    "activation-of-v": variant_config({"v_activation": "silu"}),
    "glu-silu": variant_config(glu={"activation": "silu"}),
    "norm-rms": variant_config({"norm": NormConfig(kind="rms")}, norm=NormConfig(kind="rms")),
    "norm-layer": variant_config({"norm": NormConfig(kind="layer")}, norm=NormConfig(kind="layer")),
    "norm-of-heads": variant_config({"norm": NormConfig(groups=HEADS)}),
    "norm-eps-outside": variant_config(norm=NormConfig(eps=1e-8, eps_outside=True)),
    "bias": variant_config({"bias": True}, glu={"bias": True}),
    "ffn": tnl_config(blocks=FFN_BLOCKS),
    "untied-unscaled": tnl_config(tie_embeddings=False, embedding_scale=False),
    "wide-heads": variant_config({"hidden_dim": 2 * DIM}),
}


@pytest.fixture(params=VARIANTS, ids=str)
def config(request: pytest.FixtureRequest) -> DecoderConfig:
    return VARIANTS[request.param]


def test_one_step_lowers_the_loss_and_reaches_every_parameter(config: DecoderConfig) -> None:
    model = make_model(config.model_copy(update={"init_std": 0.05})).train()
    ids = make_ids(4, 70)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = model.loss(ids[:, :-1], ids[:, 1:])
    before.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
        assert bool((parameter.grad != 0).any()), name
    optimizer.step()
    assert model.loss(ids[:, :-1], ids[:, 1:]).item() < before.item()


def test_prefill_and_steps_agree(config: DecoderConfig) -> None:
    model = make_model(config)
    ids = make_ids(2, 80)
    out = model(ids[:, :65])
    logits, state = [out.logits], out.state
    for t in range(65, 80):
        out = model(ids[:, t : t + 1], state=state)
        logits.append(out.logits)
        state = out.state
    assert_logits_agree(torch.cat(logits, 1), model(ids).logits, SPLIT_CPU)


def test_no_later_token_is_seen(config: DecoderConfig) -> None:
    model = make_model(config)
    ids = make_ids(1, 80)
    changed = ids.clone()
    changed[0, 66] = (changed[0, 66] + 1) % VOCAB
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :66], after[:, :66])
    assert not torch.equal(before[:, 66], after[:, 66])


def test_configuration_survives_json(config: DecoderConfig) -> None:
    assert DecoderConfig.model_validate_json(config.model_dump_json()) == config


def test_variants_differ_from_the_released_model() -> None:
    released = VARIANTS["released"].model_dump_json()
    same = [n for n, c in VARIANTS.items() if n != "released" and c.model_dump_json() == released]
    assert same == []


def test_dropout_acts_in_training_only() -> None:
    model = make_model(tnl_config(dropout=0.5))
    ids = make_ids(1, 20)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"gate": "half"}, "gate"),
        ({"decay": "linear"}, "decay"),
        ({"heads": 0}, "heads"),
        ({"heads": "2"}, "heads"),
        ({"head": 2}, "head"),
        ({"qk_activation": "swish"}, "qk_activation"),
    ],
)
def test_wrong_switch_is_refused(change: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        LightningConfig(**({"heads": 2} | change))
