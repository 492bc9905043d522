"""Width transfer: its coordinate check, and where it applies."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from decoder_cases import VOCAB, make_ids
from torch import Tensor

from transnormer.models import zoo
from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.models.width import Scale, scale_initial_values, width_scales
from transnormer.optim import OptimizerConfig, build_optimizer

BASE = 32


def config_of(dim: int, **changes: object) -> DecoderConfig:
    config = zoo.tnl_custom(
        vocab_size=VOCAB, model_dim=dim, num_layers=2, heads=dim // 16, glu_dim=3 * dim
    )
    return config.model_copy(update={"tie_embeddings": False, "init_std": 0.2, **changes})


class Coordinates(NamedTuple):
    """Typical sizes (root mean squares): at the start, and of the change after some updates."""

    start: dict[str, float]
    change: dict[str, float]


def probe(model: Decoder, ids: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: found.__setitem__(name, output[0].detach().clone())

    hooks = [
        block.register_forward_hook(keep(f"block {i}")) for i, block in enumerate(model.blocks)
    ]
    with torch.no_grad():
        found["logits"] = model(ids).logits
    for hook in hooks:
        hook.remove()
    return found


def coordinates(dim: int, *, transfer: bool) -> Coordinates:
    """Of a model after four updates on one batch."""
    torch.manual_seed(0)
    model, ids = Decoder(config_of(dim)), make_ids(4, 33)
    scales = width_scales(model, BASE) if transfer else {}
    scale_initial_values(dict(model.named_parameters()), scales)
    config = OptimizerConfig(lr=0.01, weight_decay=0, eps=1e-12)
    rates = {name: scale.lr for name, scale in scales.items()}
    optimizer = build_optimizer(model, config, rates)
    before = probe(model, ids[:, :-1])
    for _ in range(4):
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.set_lr(config.lr)
        optimizer.step()
        optimizer.zero_grad()
    after = probe(model, ids[:, :-1])

    def size(x: Tensor) -> float:
        return x.square().mean().sqrt().item()

    return Coordinates(
        {name: size(x) for name, x in before.items()},
        {name: size(after[name] - x) for name, x in before.items()},
    )


def test_coordinates_do_not_depend_on_the_width() -> None:
    narrow, wide = coordinates(BASE, transfer=True), coordinates(8 * BASE, transfer=True)
    for name in ("block 0", "block 1"):
        assert wide.start[name] == pytest.approx(narrow.start[name], rel=0.25), name
        assert wide.change[name] == pytest.approx(narrow.change[name], rel=0.25), name
    # Logits start as random sums, which fade by the root of the width; what is learned stays.
    assert wide.start["logits"] == pytest.approx(narrow.start["logits"] / math.sqrt(8), rel=0.25)
    assert 0.4 < wide.change["logits"] / narrow.change["logits"] < 1.25


def test_without_transfer_they_grow() -> None:
    narrow, wide = coordinates(BASE, transfer=False), coordinates(8 * BASE, transfer=False)
    assert wide.start["block 1"] > 8 * narrow.start["block 1"]
    assert wide.change["block 1"] > 8 * narrow.change["block 1"]
    assert wide.change["logits"] > 2 * narrow.change["logits"]


def test_at_the_base_width_nothing_changes() -> None:
    scales = width_scales(Decoder(config_of(BASE)), BASE)
    assert set(scales.values()) == {Scale(1.0, 1.0)}


def test_every_matrix_has_its_scales() -> None:
    model = Decoder(config_of(2 * BASE))
    scales = width_scales(model, BASE)
    assert scales["lm_head.weight"] == Scale(0.5, 0.5)
    assert scales["embedding.weight"] == Scale(0.5**0.5, 0.5**0.5)
    assert scales["blocks.1.channel_mixer.down_proj.weight"] == Scale(0.5**0.5, 0.5)
    assert set(scales) == {name for name, x in model.named_parameters() if x.ndim == 2}
    unscaled = width_scales(Decoder(config_of(2 * BASE, embedding_scale=False)), BASE)
    assert "embedding.weight" not in unscaled


def test_the_decay_of_a_step_does_not_change() -> None:
    model = Decoder(config_of(4 * BASE))
    rates = {name: scale.lr for name, scale in width_scales(model, BASE).items()}
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.5), rates)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    for x in model.parameters():
        x.grad = torch.zeros_like(x)
    optimizer.set_lr(0.1)
    optimizer.step()
    for name, x in model.named_parameters():
        factor = 0.95 if x.ndim == 2 else 1.0
        torch.testing.assert_close(x.detach(), before[name] * factor, rtol=1e-6, atol=0)


def test_a_tied_head_is_refused() -> None:
    with pytest.raises(ValueError, match="base_dim is 32 and tie_embeddings true; expected false"):
        width_scales(Decoder(config_of(BASE, tie_embeddings=True)), BASE)
    with pytest.raises(ValueError, match="base_dim is 0; expected at least 1"):
        width_scales(Decoder(config_of(BASE)), 0)
