"""Values that are drawn a part at a time are those of a model that is built whole."""

import pytest
import torch
from nn.mixer_cases import CASES, DIM, MixerCase
from start_cases import Held, model_of

from transnormer.models import zoo
from transnormer.models.checkpoint import AnyConfig
from transnormer.models.classifier import ClassifierConfig
from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.models.initial_values import build_on_meta, initial_values

BLOCKS = tuple(
    block for case in CASES if case.name in ("retention", "hgrn2") for block in case.blocks
)
HYBRID = DecoderConfig(
    vocab_size=23,
    model_dim=DIM,
    blocks=BLOCKS,
    tie_embeddings=False,
    max_positions=7,
    pad_token_id=3,
)
CLASSIFIER = ClassifierConfig(
    backbone=HYBRID.model_copy(update={"tie_embeddings": True}), num_classes=3
)


def check(config: AnyConfig) -> None:
    torch.manual_seed(5)
    real = model_of(config)
    exact, after = real.state_dict(), torch.rand(1)
    torch.manual_seed(5)
    model = build_on_meta(lambda: model_of(config))
    assert torch.initial_seed() == 5
    assert all(x.is_meta for x in model.parameters())
    found = {name: x.clone() for part in initial_values(model) for name, x in part.items()}
    assert found.keys() == exact.keys()
    for name, x in exact.items():
        assert found[name].dtype == x.dtype, name
        assert torch.equal(found[name], x), name
    # What is drawn next is the same too.
    assert torch.equal(torch.rand(1), after)
    buffers = dict(real.named_buffers())
    for name, x in model.named_buffers():
        assert x.dtype == buffers[name].dtype, name
        assert name in exact or torch.equal(x, buffers[name]), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_mixer_begins_with_the_same_values(case: MixerCase) -> None:
    check(case.config())


@pytest.mark.parametrize("config", [HYBRID, CLASSIFIER], ids=["hybrid", "classifier"])
def test_mixers_that_draw_for_themselves_keep_their_turn(config: AnyConfig) -> None:
    check(config)


def test_a_model_without_memory_spends_no_random_numbers() -> None:
    before = torch.get_rng_state()
    build_on_meta(lambda: Decoder(HYBRID))
    assert torch.equal(torch.get_rng_state(), before)


def test_one_part_is_in_memory_at_a_time() -> None:
    config = zoo.tnl_custom(vocab_size=8, model_dim=32, num_layers=12, heads=4, glu_dim=32)
    model = build_on_meta(lambda: Decoder(config))
    part = sum(x.numel() * x.element_size() for x in model.blocks[0].parameters())
    with Held() as held:
        count = sum(len(values) for values in initial_values(model))
    assert count == len(model.state_dict())
    assert held.most < 1.1 * part


def test_a_model_that_names_its_device_is_left_as_it_is() -> None:
    def build() -> Decoder:
        with torch.device("cpu"):
            model = Decoder(HYBRID)
        for buffer in model.buffers():
            buffer.fill_(7.0)
        return model

    torch.manual_seed(5)
    exact = build().state_dict()
    torch.manual_seed(5)
    found = build_on_meta(build)
    assert all(torch.equal(x, exact[name]) for name, x in found.state_dict().items())
    buffers = list(found.buffers())
    assert buffers
    assert all(bool((x == 7.0).all()) for x in buffers)
