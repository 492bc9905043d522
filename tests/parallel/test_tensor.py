"""Layers of every kind on several ranks compute what one process computes, or say why they do not."""

from typing import Any

import pytest
import torch
from nn.mixer_cases import CASES, DIM, MixerCase, twice
from parallel_cases import train
from ranks import Ranks
from tensor_cases import loss_and_norm
from tolerances import LAYOUT_FLOAT64, assert_close
from torch import Tensor

from transnormer.models.decoder import BlockConfig, Decoder, DecoderConfig
from transnormer.nn.channel_mixers import FfnConfig
from transnormer.nn.norms import NormConfig
from transnormer.nn.token_mixers import (
    EosConfig,
    GauConfig,
    Hgrn1Config,
    LightNetConfig,
    Lightning,
    LightningConfig,
    SoftmaxConfig,
    TokenMixerConfig,
)
from transnormer.optim import OptimizerConfig
from transnormer.parallel.mesh import Axes
from transnormer.parallel.tensor import apply_tensor_parallel
from transnormer.parallel.tensor_layers import Fused
from transnormer.parallel.tensor_rules import why_not_on_ranks

# Clips every step.
ADAMW = OptimizerConfig(lr=1e-2, clip=0.05)
# One form a kind and norm; the others are slow.
SHOWN = {
    "cosformer", "diag_attention-relu", "eos", "eos-additive", "eos-constants", "gau", "gau-quad",
    "hgrn1", "hgrn2", "lightnet", "lightning-low-rank-gate", "retention", "softmax", "tpe",
}  # fmt: skip
# Of the two blocks of a model both are alike.
COMPILED = {"lightning-no-positions"}
# Of the contract's configurations those with one head, which is not cut.
REFUSED = {"cosformer-no-out-proj"}
# Both, and what 22 tokens leave over among 4 ranks.
LAYOUTS = (Axes(dp_shard=2, tp=2), Axes(sp=2, tp=2), Axes(tp=4))


def compare(found: dict[str, Any], exact: dict[str, Any]) -> None:
    for name in ("loss", "norm"):
        assert_close(found[name], exact[name], limit=LAYOUT_FLOAT64, name=name)
    for group in ("model", "optimizer"):
        for name, expected in exact[group].items():
            assert_close(found[group][name], expected, limit=LAYOUT_FLOAT64, name=f"{group} {name}")


def model_of(mixer: TokenMixerConfig, **changes: Any) -> DecoderConfig:
    return DecoderConfig(vocab_size=29, model_dim=DIM, blocks=twice(mixer), **changes)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=() if case.name in SHOWN else pytest.mark.slow)
        for case in CASES
        if case.name not in REFUSED
    ],
)
def test_every_mixer_trains_on_ranks_as_in_one_process(ranks: Ranks, case: MixerCase) -> None:
    config = case.config()
    exact = train(None, config, Axes(), None, range(2), ADAMW)
    # The stream is cut in half of them.
    cut = len(case.name) % 2 == 0
    args = (config, LAYOUTS[0], None, range(2), ADAMW, 1, "cpu", cut)
    compare(ranks.run(4, train, *args)[0], exact)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("axes", LAYOUTS, ids=["dp2-tp2", "sp2-tp2", "tp4"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_mixer_trains_in_every_layout_that_takes_it(
    ranks: Ranks, case: MixerCase, axes: Axes, cut: bool
) -> None:
    model = case.model()
    if any(why_not_on_ranks(model, i, axes.tp) for i in range(len(model.blocks))):
        pytest.skip("its heads are no multiple of the ranks")
    if axes.sp > 1 and case.name == "gau-quad":
        pytest.skip("sequences in parts are refused")
    exact = train(None, case.config(), Axes(), None, range(2), ADAMW)
    args = (case.config(), axes, None, range(2), ADAMW, 1, "cpu", cut)
    compare(ranks.run(4, train, *args)[0], exact)


@pytest.mark.parametrize("name", ["gau", "hgrn1"])
def test_checkpoints_of_fused_projections_do_not_depend_on_the_layout(
    ranks: Ranks, name: str
) -> None:
    config = next(case for case in CASES if case.name == name).config()
    exact, start = train(None, config, Axes(), None, range(3), ADAMW), None
    for axes, step in ((Axes(tp=4), 0), (Axes(dp_shard=2, tp=2), 1)):
        start = ranks.run(4, train, config, axes, start, range(step, step + 1), ADAMW)[0]
    found = train(None, config, Axes(), start, range(2, 3), ADAMW)
    for group in ("model", "optimizer"):
        for key, expected in exact[group].items():
            assert_close(found[group][key], expected, limit=LAYOUT_FLOAT64, name=key)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_cut_stream_holds_a_part_of_the_tokens_on_each_rank(
    ranks: Ranks, checkpointing: str
) -> None:
    mixer = LightningConfig(heads=4, bias=True, gate="low_rank", norm=NormConfig(kind="rms"))
    blocks = (BlockConfig(
        norm=NormConfig(kind="layer"), token_mixer=mixer,
        channel_mixer=FfnConfig(hidden_dim=8, bias=True),
    ),) * 2  # fmt: skip
    config = DecoderConfig(vocab_size=29, model_dim=DIM, blocks=blocks)
    exact = loss_and_norm(None, config)
    for cut, tokens in ((True, 6), (False, 22)):
        for found in ranks.run(4, loss_and_norm, config, checkpointing, "", cut):
            assert set(found["tokens"]) == {tokens}
            # A graph that a module kept would keep all of its block's activations.
            assert not found["kept"]
            for name in ("loss", "norm"):
                assert_close(found[name], exact[name], limit=LAYOUT_FLOAT64, name=name)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=() if case.name in COMPILED else pytest.mark.slow)
        for case in CASES
        if case.name not in REFUSED
    ],
)
def test_a_compiled_block_on_ranks_is_one_graph(ranks: Ranks, case: MixerCase) -> None:
    config, cut = case.config(), len(case.name) % 2 == 1
    model = case.model()
    if any(why_not_on_ranks(model, i, 4) for i in range(len(model.blocks))):
        pytest.skip("its heads are no multiple of the ranks")
    exact = loss_and_norm(None, config)
    # Without breaks, or it raises.
    for found in ranks.run(4, loss_and_norm, config, "full", "aot_eager", cut):
        for key in ("loss", "norm"):
            assert_close(found[key], exact[key], limit=LAYOUT_FLOAT64, name=key)
        if case.name in COMPILED:
            # Both blocks have the same.
            assert found["graphs"] == 1
        assert not found["kept"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_alone_on_ranks_are_shared_no_further(ranks: Ranks, dtype: torch.dtype) -> None:
    config = model_of(LightningConfig(heads=4, norm=NormConfig(kind="rms")))
    for found in ranks.run(4, loss_and_norm, config, "none", "", False, dtype):
        assert not found["shared_further"]
        assert found["dtypes"] == {str(dtype)}
        # Whole rows, on which fast products depend.
        assert found["strides"][DIM] == {(22 * DIM, DIM, 1)}


def test_all_mixers_but_single_heads_can_be_cut_in_two() -> None:
    refused = set()
    for case in CASES:
        model = case.model()
        if any(why_not_on_ranks(model, i, 2) for i in range(len(model.blocks))):
            refused.add(case.name)
    assert refused == REFUSED


@pytest.mark.parametrize(
    ("mixer", "ranks_wanted", "reason"),
    [
        (LightningConfig(heads=2), 4, "token_mixer.heads is 2, no multiple of 4"),
        (SoftmaxConfig(heads=8, kv_heads=2), 4, "token_mixer.kv_heads is 2, no multiple of 4"),
        (GauConfig(key_dim=6, hidden_dim=48), 4, "token_mixer.key_dim is 6, no multiple of 4"),
        (Hgrn1Config(), 5, "token_mixer.model_dim is 32, no multiple of 5"),
        (EosConfig(), 3, "token_mixer.model_dim is 32, no multiple of 3"),
        (
            LightNetConfig(heads=4, norm=NormConfig(groups=2)),
            4,
            "token_mixer.norm.groups is 2, no multiple of 4",
        ),
        (LightningConfig(heads=16), 16, "channel_mixer.hidden_dim is 24, no multiple of 16"),
    ],
)
def test_what_cannot_be_cut_says_why(
    mixer: TokenMixerConfig, ranks_wanted: int, reason: str
) -> None:
    assert why_not_on_ranks(Decoder(model_of(mixer)), 0, ranks_wanted) == reason


def test_a_mixer_without_a_rule_is_refused() -> None:
    class Another(Lightning):
        pass

    model = Decoder(model_of(LightningConfig(heads=2)))
    model.blocks[1].token_mixer.__class__ = Another
    expected = "token_mixer is a Another, for which no rule says how it is cut"
    assert why_not_on_ranks(model, 1, 2) == expected
    assert why_not_on_ranks(model, 0, 2) is None


def test_dropout_beside_a_cut_stream_is_refused(ranks: Ranks) -> None:
    config = model_of(LightningConfig(heads=4), dropout=0.1)
    with pytest.raises(AssertionError, match="dropout is 0.1; expected 0"):
        ranks.run(4, loss_and_norm, config, "none", "", True)
    with pytest.raises(TypeError, match="expected a Decoder"):
        apply_tensor_parallel(torch.nn.Linear(2, 2), None)  # pyrefly: ignore[bad-argument-type]


def test_fused_parts_lie_rank_by_rank_and_come_back() -> None:
    fused = Fused((4, 4, 2), 2)
    x = torch.arange(10)
    assert fused.by_rank(x).tolist() == [0, 1, 4, 5, 8, 2, 3, 6, 7, 9]
    assert torch.equal(fused.by_part(fused.by_rank(x)), x)
    columns: Tensor = torch.arange(20).view(2, 10)
    along = fused._replace(dim=1)
    assert torch.equal(along.by_rank(columns)[1], fused.by_rank(x) + 10)
    assert torch.equal(along.by_part(along.by_rank(columns)), columns)
    assert along.by_part(torch.tensor(3)) == 3
