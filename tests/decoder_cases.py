"""Small models for the tests of the decoder."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from transnormer.models import zoo
from transnormer.models.decoder import BlockConfig, Decoder, DecoderConfig
from transnormer.nn.channel_mixers import GluConfig
from transnormer.nn.token_mixers import LightningConfig
from transnormer.train.adapters import add_adapters, open_adapters
from transnormer.train.lora_config import LoraConfig

VOCAB, DIM, LAYERS, HEADS, HIDDEN = 61, 32, 3, 2, 48


def tnl_config(**changes: Any) -> DecoderConfig:
    """A released TransNormerLLM in small, with weights so wide that every term matters."""
    config = zoo.tnl_custom(
        vocab_size=VOCAB, model_dim=DIM, num_layers=LAYERS, heads=HEADS, glu_dim=HIDDEN
    )
    return config.model_copy(update={"init_std": 0.2, **changes})


def variant_config(
    mixer: Mapping[str, Any] | None = None,
    *,
    glu: Mapping[str, Any] | None = None,
    norm: Any = None,
    lrpe: str = "first",
    **changes: Any,
) -> DecoderConfig:
    """The small model with other switches; lrpe is "first", "all" or "none"."""
    blocks = []
    for i in range(LAYERS):
        rotated = lrpe == "all" or (lrpe == "first" and i == 0)
        fields = {"token_mixer": LightningConfig(heads=HEADS, lrpe=rotated, **(mixer or {}))}
        fields["channel_mixer"] = GluConfig(hidden_dim=HIDDEN, **(glu or {}))
        if norm is not None:
            fields["norm"] = norm
        blocks.append(BlockConfig(**fields))
    return tnl_config(blocks=tuple(blocks), **changes)


def make_model(config: DecoderConfig | None = None, dtype: torch.dtype = torch.float32) -> Decoder:
    """A model in eval mode with weights drawn from seed 1."""
    torch.manual_seed(1)
    return Decoder(config or tnl_config()).to(dtype).eval()


def adapted() -> Decoder:
    """A model without dropout whose adapters have some, in training, float64."""
    model = make_model()
    add_adapters(model, LoraConfig(rank=2, dropout=0.5), "")
    open_adapters(model)
    return model.double().train()


def make_ids(batch: int, seq: int, seed: int = 2) -> Tensor:
    """Random tokens, [batch, seq]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (batch, seq), generator=generator)


def assert_logits_agree(actual: Tensor, exact: Tensor, limit: float) -> None:
    """The largest difference, as a share of the standard deviation of the exact logits."""
    assert actual.shape == exact.shape
    error = ((actual.double() - exact.double()).abs().max() / exact.double().std()).item()
    assert error <= limit, f"logits differ by {error:.3g} of their deviation, more than {limit}"
