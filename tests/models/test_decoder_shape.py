"""Grids through the one decoder: what ``shape`` reaches, what it leaves alone, what is refused."""

import math

import pytest
import torch
from decoder_cases import VOCAB, make_ids, make_model
from tolerances import SPLIT_FLOAT64, assert_close
from torch import Tensor

from transnormer.models import zoo
from transnormer.models.decoder import BlockConfig, Decoder, DecoderConfig
from transnormer.nn.channel_mixers import GluConfig
from transnormer.nn.token_mixers import (
    CosformerConfig,
    DiagAttentionConfig,
    GauConfig,
    Hgrn1Config,
    Hgrn2Config,
    LightNetConfig,
    LightningConfig,
    RetentionConfig,
    SoftmaxConfig,
    TpeConfig,
)

DIM = 16
SEQUENCES = {
    "cosformer": CosformerConfig(heads=2, max_positions=64),
    "diag_attention": DiagAttentionConfig(heads=2, block_size=5),
    "gau": GauConfig(key_dim=8, hidden_dim=24),
    "hgrn1": Hgrn1Config(),
    "hgrn2": Hgrn2Config(head_dim=8),
    "lightnet": LightNetConfig(heads=2, lrpe=False),
    "lightning": LightningConfig(heads=2, lrpe=True),
    "retention": RetentionConfig(heads=2),
    "softmax": SoftmaxConfig(heads=2),
}


def model_of(*mixers, tpe_axes: int = 0, **changes: object) -> Decoder:
    glu = GluConfig(hidden_dim=24)
    blocks = [BlockConfig(token_mixer=mixer, channel_mixer=glu) for mixer in mixers]
    if tpe_axes:
        tpe = TpeConfig(exponents=2, axes=tpe_axes)
        blocks.insert(0, BlockConfig(norm=None, token_mixer=tpe, channel_mixer=None))
    fields = {"vocab_size": VOCAB, "model_dim": DIM, "init_std": 0.3, "causal": False} | changes
    return make_model(DecoderConfig(blocks=tuple(blocks), **fields), torch.float64)


def lightnet(axes: int = 2, **changes: object) -> Decoder:
    return model_of(*[LightNetConfig(heads=2, lrpe_axes=axes)] * 2, tpe_axes=axes, **changes)


def vit(variant: str = "t2", **changes: object) -> Decoder:
    config = zoo.transnormer_custom(
        variant=variant,
        vocab_size=VOCAB,
        model_dim=DIM,
        num_layers=4,
        heads=2,
        glu_dim=24,
        block_shape=(2, 3),
        causal=False,
    )
    return make_model(config.model_copy(update={"init_std": 0.3, **changes}), torch.float64)


def by_parts(model: Decoder, ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Logits by calling the parts of the model one after the other, positions without meaning."""
    config, nowhere = model.config, torch.full(ids.shape, 7)
    x = model.embedding(ids) * (math.sqrt(DIM) if config.embedding_scale else 1.0)
    for block in model.blocks:
        x = x + block.token_mixer(block.token_norm(x), positions=nowhere, shape=shape)[0]
        if block.channel_mixer is not None:
            x = x + block.channel_mixer(block.channel_norm(x))
    return model.final_norm(x) @ model.head_weight.T


@pytest.mark.parametrize(
    ("build", "shape"), [(lightnet, (3, 4)), (vit, (3, 4)), (lambda: lightnet(3), (2, 3, 2))]
)
def test_a_model_of_grids_is_its_parts(build, shape: tuple[int, ...]) -> None:
    model, ids = build(), make_ids(2, math.prod(shape))
    with torch.no_grad():
        out = model(ids, shape=shape)
        assert out.state is None
        exact = by_parts(model, ids, shape)
        assert_close(out.logits, exact)
        labels = ids.roll(1, 1)
        loss = torch.nn.functional.cross_entropy(exact.flatten(0, 1), labels.flatten())
        assert_close(model.loss(ids, labels, shape=shape), loss)
        hidden, _ = model.hidden(ids, shape=shape)
        assert_close(hidden @ model.head_weight.T, exact)
        kept = model(ids, shape=shape, logits_to_keep=2).logits
        assert torch.equal(kept, out.logits[:, -2:])


@pytest.mark.parametrize("kind", SEQUENCES)
def test_a_mixer_that_sees_a_sequence_does_not_see_the_shape(kind: str) -> None:
    model, ids = model_of(SEQUENCES[kind]), make_ids(2, 12)
    with torch.no_grad():
        exact = model(ids).logits
        for shape in ((3, 4), (1, 12), (12,)):
            assert torch.equal(model(ids, shape=shape).logits, exact)


def test_one_axis_with_its_extent_is_the_sequence() -> None:
    model, ids = lightnet(1), make_ids(2, 12)
    assert torch.equal(model(ids, shape=(12,)).logits, model(ids).logits)


@pytest.mark.parametrize("build", [lightnet, vit])
def test_extents_matter_and_are_needed(build) -> None:
    model, ids = build(), make_ids(1, 12)
    assert not torch.allclose(model(ids, shape=(3, 4)).logits, model(ids, shape=(4, 3)).logits)
    with pytest.raises(ValueError, match=r"shape is None; expected 2 extents"):
        model(ids)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_picture_that_moves_moves_the_logits(axis: int) -> None:
    # Scores know differences of coordinates alone, so that the place of a picture says nothing:
    # pads around it make a larger grid. Moved by whole blocks for DiagAttention.
    picture = make_ids(1, 4)[0].view(2, 2)
    mixers = (
        DiagAttentionConfig(heads=2, block_shape=(2, 2)),
        LightNetConfig(heads=2, lrpe_axes=2),
        LightningConfig(heads=2, lrpe=True, lrpe_form="rotary", lrpe_axes=2, decay="none"),
    )
    model = model_of(*mixers, tpe_axes=2)
    results = []
    for place in (0, 2, 4):
        row, column = (place, 0) if axis == 0 else (0, place)
        grid, mask = torch.zeros(6, 6, dtype=torch.int64), torch.zeros(6, 6, dtype=torch.bool)
        grid[row : row + 2, column : column + 2] = picture
        mask[row : row + 2, column : column + 2] = True
        ids, mask = grid.view(1, 36), mask.view(1, 36)
        results.append(model(ids, mask=mask, shape=(6, 6)).logits[mask].detach())
    alone = model(picture.view(1, 4), shape=(2, 2)).logits[0].detach()
    for moved in results:
        assert_close(moved, alone, limit=SPLIT_FLOAT64)


def test_masked_tokens_leave_no_trace() -> None:
    model = vit()
    ids, mask = make_ids(1, 20), torch.rand(1, 20) < 0.6
    others = torch.where(mask, ids, make_ids(1, 20, seed=9))
    logits = [model(x, mask=mask, shape=(4, 5)).logits[mask] for x in (ids, others)]
    assert torch.equal(*logits)


def test_learned_positions_count_along_the_row() -> None:
    model, ids = vit(max_positions=12), make_ids(1, 12)
    with torch.no_grad():
        before = model(ids, shape=(3, 4)).logits
        given = model(ids, shape=(3, 4), positions=torch.arange(12)).logits
        assert torch.equal(before, given)
        model.position_embedding.weight[11] += 1.0
        assert not torch.equal(model(ids, shape=(3, 4)).logits, before)


def test_condition_tokens_stand_in_front_of_the_grid() -> None:
    model = model_of(LightNetConfig(heads=2, lrpe_axes=2, condition_tokens=2))
    ids = make_ids(2, 14)
    with torch.no_grad():
        assert_close(model(ids, shape=(3, 4)).logits, by_parts(model, ids, (3, 4)))
    with pytest.raises(ValueError, match=r"14 tokens; expected the 12 .* after 2 condition tokens"):
        model(ids, shape=(2, 7))


def test_all_parameters_of_a_grid_learn() -> None:
    for model in (lightnet(), vit("t1"), vit("t2")):
        ids = make_ids(2, 20)
        model.loss(ids, ids.roll(1, 1), shape=(4, 5)).backward()
        for name, x in model.named_parameters():
            assert x.grad is not None, name
            assert bool(torch.isfinite(x.grad).all()), name
            assert bool((x.grad != 0).any()), name


@pytest.mark.parametrize("build", [lightnet, pytest.param(vit, marks=pytest.mark.slow)])
def test_compiled_grids_are_one_graph(build) -> None:
    model, ids = build(), make_ids(2, 15)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(ids, shape=(3, 5)).logits, model(ids, shape=(3, 5)).logits)


def test_what_is_no_grid_is_refused() -> None:
    model, ids = lightnet(), make_ids(1, 12)
    for shape, error, message in (
        ((3, 5), ValueError, r"shape is \(3, 5\), 15 tokens; expected the 12"),
        ((-3, -4), ValueError, r"extents of at least 1"),
        ((), ValueError, r"extents of at least 1"),
        ([3, 4], TypeError, r"shape is \[3, 4\]; expected a tuple of integers"),
        ((3, 4.0), TypeError, r"expected a tuple of integers"),
    ):
        with pytest.raises(error, match=message):
            model(ids, shape=shape)
    with pytest.raises(NotImplementedError, match=r"shape is \(3, 4\).*with cu_seqlens"):
        model(ids, shape=(3, 4), cu_seqlens=torch.tensor([0, 12]))
    with pytest.raises(ValueError, match=r"15 tokens; expected the 12"):
        model_of(SEQUENCES["softmax"])(ids, shape=(3, 5))


def test_a_causal_model_has_no_grid() -> None:
    model = model_of(SEQUENCES["softmax"], causal=True)
    for call in (model, model.hidden, lambda x, shape: model.loss(x, x, shape=shape)):
        with pytest.raises(NotImplementedError, match=r"shape is \(3, 4\).*causal model.*state"):
            call(make_ids(1, 12), shape=(3, 4))
