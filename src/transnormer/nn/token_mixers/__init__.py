"""Token mixers: parts that move information along the sequence.

Each is one file with a configuration (``kind`` is its tag) and a module; ``base`` says what they
have in common.
"""

from typing import Annotated

from pydantic import Field

from transnormer.nn.token_mixers.base import TokenMixer, TokenMixerBase
from transnormer.nn.token_mixers.cosformer import Cosformer, CosformerConfig
from transnormer.nn.token_mixers.diag_attention import DiagAttention, DiagAttentionConfig
from transnormer.nn.token_mixers.eos import Eos, EosConfig, EosState
from transnormer.nn.token_mixers.gau import Gau, GauConfig, GauState
from transnormer.nn.token_mixers.hgrn1 import Hgrn1, Hgrn1Config
from transnormer.nn.token_mixers.hgrn2 import Hgrn2, Hgrn2Config
from transnormer.nn.token_mixers.lightnet import LightNet, LightNetConfig, LightNetState
from transnormer.nn.token_mixers.lightning import Lightning, LightningConfig
from transnormer.nn.token_mixers.retention import Retention, RetentionConfig
from transnormer.nn.token_mixers.softmax import Softmax, SoftmaxConfig
from transnormer.nn.token_mixers.tpe import Tpe, TpeConfig

# The union of all mixers' configurations; ``kind`` tells them apart.
TokenMixerConfig = Annotated[
    CosformerConfig
    | DiagAttentionConfig
    | EosConfig
    | GauConfig
    | Hgrn1Config
    | Hgrn2Config
    | LightningConfig
    | LightNetConfig
    | RetentionConfig
    | SoftmaxConfig
    | TpeConfig,
    Field(discriminator="kind"),
]

__all__ = [
    "Cosformer",
    "CosformerConfig",
    "DiagAttention",
    "DiagAttentionConfig",
    "Eos",
    "EosConfig",
    "EosState",
    "Gau",
    "GauConfig",
    "GauState",
    "Hgrn1",
    "Hgrn1Config",
    "Hgrn2",
    "Hgrn2Config",
    "LightNet",
    "LightNetConfig",
    "LightNetState",
    "Lightning",
    "LightningConfig",
    "Retention",
    "RetentionConfig",
    "Softmax",
    "SoftmaxConfig",
    "TokenMixer",
    "TokenMixerBase",
    "TokenMixerConfig",
    "Tpe",
    "TpeConfig",
]
