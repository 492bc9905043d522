"""Models of this package in transformers: importing this registers them with the Auto classes.

Directories of the released TransNormerLLM have the model_type ``transnormer``, those of
``transnormer.save``, which may hold any decoder, ``transnormer_decoder``.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
)

from transnormer.hf.cache import DecoderCache, StaticDecoderCache
from transnormer.hf.config import TransnormerConfig, TransnormerDecoderConfig
from transnormer.hf.modeling import (
    TransnormerDecoderForCausalLM,
    TransnormerDecoderForMaskedLM,
    TransnormerDecoderModel,
    TransnormerForCausalLM,
    TransnormerModel,
)
from transnormer.hf.names import own_layout, register_names, released_layout
from transnormer.hf.tokenizer import BaiChuanTokenizer, DecoderTokenizer

__all__ = [
    "BaiChuanTokenizer",
    "DecoderCache",
    "StaticDecoderCache",
    "TransnormerConfig",
    "TransnormerDecoderConfig",
    "TransnormerDecoderForCausalLM",
    "TransnormerDecoderForMaskedLM",
    "TransnormerDecoderModel",
    "TransnormerForCausalLM",
    "TransnormerModel",
]

for _config, _model, _causal in (
    (TransnormerConfig, TransnormerModel, TransnormerForCausalLM),
    (TransnormerDecoderConfig, TransnormerDecoderModel, TransnormerDecoderForCausalLM),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForCausalLM.register(_config, _causal)
register_names(released_layout, TransnormerModel, TransnormerForCausalLM)
register_names(
    own_layout,
    TransnormerDecoderModel,
    TransnormerDecoderForCausalLM,
    TransnormerDecoderForMaskedLM,
)
AutoModelForMaskedLM.register(TransnormerDecoderConfig, TransnormerDecoderForMaskedLM)
AutoTokenizer.register(TransnormerConfig, tokenizer_class=BaiChuanTokenizer)
AutoTokenizer.register(TransnormerDecoderConfig, tokenizer_class=DecoderTokenizer)
