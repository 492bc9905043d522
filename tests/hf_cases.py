"""Small models of this package as models of transformers, with equal weights."""

from typing import Any

from decoder_cases import make_model
from transformers import PreTrainedModel
from transformers.utils import logging

from transnormer.hf import TransnormerDecoderConfig, TransnormerDecoderForCausalLM
from transnormer.models import zoo
from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.nn.token_mixers import LightningConfig, SoftmaxConfig

# Progress bars of loading and saving, which say nothing here.
logging.disable_progress_bar()

PAD = 0


def hybrid_config(**changes: Any) -> DecoderConfig:
    """Three layers: linear, softmax, linear."""
    config = zoo.hybrid_custom(
        vocab_size=61,
        model_dim=32,
        num_layers=3,
        glu_dim=48,
        pattern=(LightningConfig(heads=2, lrpe=True), SoftmaxConfig(heads=4, kv_heads=2)),
    )
    return config.model_copy(update={"init_std": 0.2, **changes})


def wrapped(
    model: Decoder, kind: type[PreTrainedModel] = TransnormerDecoderForCausalLM
) -> PreTrainedModel:
    """A decoder's weights in a model of transformers, in eval mode."""
    result = kind(TransnormerDecoderConfig(decoder=model.config))
    tensors = dict(model.state_dict())
    head = tensors.pop("lm_head.weight", None)
    result.model.transnormer.load_state_dict(tensors)
    if head is not None:
        result.lm_head.weight.data.copy_(head)
    return result.to(next(model.parameters()).dtype).eval()


def pair(config: DecoderConfig | None = None) -> tuple[Decoder, PreTrainedModel]:
    """A decoder with weights drawn from a seed, and the same in transformers."""
    model = make_model(config)
    return model, wrapped(model)
