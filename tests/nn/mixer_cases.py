"""Small configurations of every token mixer, for the contract suite; a new mixer adds its own."""

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from transnormer.models.decoder import BlockConfig, Decoder, DecoderConfig
from transnormer.nn.channel_mixers import GluConfig
from transnormer.nn.norms import NormConfig
from transnormer.nn.token_mixers import (
    CosformerConfig,
    DiagAttentionConfig,
    EosConfig,
    GauConfig,
    Hgrn1Config,
    Hgrn2Config,
    LightNetConfig,
    LightningConfig,
    RetentionConfig,
    SoftmaxConfig,
    TokenMixerConfig,
    TpeConfig,
)

VOCAB, DIM = 29, 32
CHANNEL = GluConfig(hidden_dim=24)


class MixerCase(NamedTuple):
    """A configuration, and what the contract suite may expect of it.

    Attributes:
        name: unique; begins with the mixer's kind, so that ``pytest -k KIND`` finds it.
        blocks: of the model that is tested.
        bidirectional: None: the mixer refuses causal=False; "equivariant": permuted tokens give
            permuted outputs; "positional": they do not.
        sees_all: a bidirectional token sees every other one (False: attention within blocks).
        compiles: run the torch.compile tests, which are slow, on the last block's mixer: one
            configuration a kind.
        rounded: ends of names of parameters, beside projections and norms, that a cast to half
            precision may round; never frequencies, slopes or decays.
        init_std: of the weights, wide enough that every term matters.
    """

    name: str
    blocks: tuple[BlockConfig, ...]
    bidirectional: Literal["equivariant", "positional"] | None = "positional"
    sees_all: bool = True
    compiles: bool = False
    rounded: tuple[str, ...] = ()
    init_std: float = 0.2

    def config(self, *, causal: bool = True) -> DecoderConfig:
        """The model's configuration."""
        return DecoderConfig(
            vocab_size=VOCAB,
            model_dim=DIM,
            blocks=self.blocks,
            init_std=self.init_std,
            causal=causal,
        )

    def model(
        self, dtype: torch.dtype = torch.float32, *, causal: bool = True, seed: int = 1
    ) -> Decoder:
        """The model in eval mode, with weights drawn from a seed."""
        torch.manual_seed(seed)
        return Decoder(self.config(causal=causal)).to(dtype).eval()


def twice(mixer: TokenMixerConfig) -> tuple[BlockConfig, ...]:
    """Two blocks of the mixer, so that depth and shared parts count."""
    return (BlockConfig(token_mixer=mixer, channel_mixer=CHANNEL),) * 2


def ids_of(batch: int, seq: int, seed: int = 2) -> Tensor:
    """Random tokens, [batch, seq]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (batch, seq), generator=generator)


class GauCase(MixerCase):
    """Scales and biases are not 0.02 but near 1, as after training: attention then counts."""

    __slots__ = ()

    def model(
        self, dtype: torch.dtype = torch.float32, *, causal: bool = True, seed: int = 1
    ) -> Decoder:
        model = super().model(dtype, causal=causal, seed=seed)
        with torch.no_grad():
            for name, x in model.named_parameters():
                if name.endswith(("scales", "offsets", "distance_bias", "rotary_bias")):
                    x.copy_(0.6 * torch.randn(x.shape))
        return model


def flash(**changes: Any) -> tuple[BlockConfig, ...]:
    """Two blocks of gated attention units, which have no channel mixer."""
    mixer = GauConfig(key_dim=8, hidden_dim=48, **changes)
    norm = NormConfig(kind="scale", eps=1e-5)
    return (BlockConfig(norm=norm, token_mixer=mixer, channel_mixer=None),) * 2


# One section a kind, in alphabetical order.
COSFORMER = (
    MixerCase("cosformer", twice(CosformerConfig(heads=2, max_positions=512)), compiles=True),
    MixerCase(
        "cosformer-no-out-proj",
        twice(CosformerConfig(heads=1, max_positions=300, out_proj=False, bias=False)),
    ),
)
DIAG_ATTENTION = (
    MixerCase("diag_attention", twice(DiagAttentionConfig(heads=2)), sees_all=False, compiles=True),
    MixerCase(
        "diag_attention-relu",
        twice(
            DiagAttentionConfig(
                heads=4,
                block_size=6,
                weights="relu",
                norm=NormConfig(eps=1e-8, eps_outside=True),
                bias=False,
            )
        ),
        sees_all=False,
    ),
    MixerCase(
        "diag_attention-transnormer",
        (
            *twice(DiagAttentionConfig(heads=2, block_size=16))[:1],
            *twice(
                LightningConfig(
                    heads=2,
                    lrpe=True,
                    lrpe_form="rotary",
                    decay="none",
                    gate="none",
                    qk_activation="1+elu",
                    norm=NormConfig(eps=1e-8, eps_outside=True),
                    bias=True,
                )
            )[:1],
        ),
    ),
)
EOS_ROUNDED = ("e_matrix", "s_matrix")
EOS = (
    MixerCase("eos", twice(EosConfig(heads=2, key_dim=8)), bidirectional=None, compiles=True),
    MixerCase(
        "eos-phase",
        twice(EosConfig(heads=2, key_dim=6, oscillation="phase", activation="1+elu", bias=True)),
        bidirectional=None,
    ),
    MixerCase(
        "eos-additive",
        twice(EosConfig(key_dim=8, oscillation="additive")),
        bidirectional=None,
    ),
    MixerCase(
        "eos-ssm",
        twice(EosConfig(key_dim=4, oscillation="ssm", activation="silu", delta_rank=3)),
        bidirectional=None,
    ),
    MixerCase(
        "eos-constants",
        (
            *twice(EosConfig(key_dim=6, expand="constant", oscillation="data_key"))[:1],
            *twice(EosConfig(heads=2, key_dim=6, shrink="constant", oscillation="slopes"))[:1],
        ),
        bidirectional=None,
        rounded=EOS_ROUNDED,
    ),
)
GAU_ROUNDED = ("scales", "offsets", "distance_bias", "rotary_bias")
GAU = (
    GauCase("gau", flash(), compiles=True, rounded=GAU_ROUNDED),
    GauCase("gau-chunk", flash(chunk_size=7, bias=False, divisor=3), rounded=GAU_ROUNDED),
    GauCase("gau-quad", flash(form="quad", divisor=20), rounded=GAU_ROUNDED),
)
HGRN1 = (
    MixerCase("hgrn1", twice(Hgrn1Config()), compiles=True),
    MixerCase(
        "hgrn1-paper",
        twice(
            Hgrn1Config(
                gate_activation="sigmoid",
                gate_position="before_norm",
                lower_bound="exclusive",
                norm=NormConfig(),
                bias=False,
            )
        ),
    ),
)
HGRN2 = (
    MixerCase("hgrn2", twice(Hgrn2Config(head_dim=16)), compiles=True),
    MixerCase(
        "hgrn2-images",
        twice(
            Hgrn2Config(
                head_dim=4,
                q_activation="sigmoid",
                v_activation="silu",
                lower_bound="exclusive",
                norm=NormConfig(kind="layer"),
                bias=True,
            )
        ),
    ),
    MixerCase(
        "hgrn2-hybrid",
        (
            *twice(Hgrn2Config(head_dim=16)),
            *twice(LightningConfig(heads=2))[:1],
            *twice(Hgrn1Config(lower_bound="none"))[:1],
            *twice(Hgrn2Config(head_dim=16))[:1],
        ),
    ),
)
LIGHTNET = (
    MixerCase("lightnet", twice(LightNetConfig(heads=2)), compiles=True),
    MixerCase(
        "lightnet-no-positions",
        twice(LightNetConfig(heads=2, lrpe=False, gate="none", norm=NormConfig())),
        bidirectional="equivariant",
    ),
    MixerCase(
        "lightnet-initial-mass",
        twice(
            LightNetConfig(
                heads=2,
                hidden_dim=48,
                key_dim=8,
                gate_rank=5,
                gate_activation="silu",
                gate_position="before_norm",
                norm=NormConfig(kind="rms", groups=2),
                initial_mass=1.0,
                bias=True,
            )
        ),
    ),
)
LIGHTNING = (
    MixerCase("lightning", twice(LightningConfig(heads=2, lrpe=True)), compiles=True),
    MixerCase(
        "lightning-no-positions",
        twice(LightningConfig(heads=4, decay="none", gate="none", qk_activation="1+elu")),
        bidirectional="equivariant",
    ),
    MixerCase(
        "lightning-low-rank-gate",
        twice(
            LightningConfig(
                heads=2,
                hidden_dim=48,
                gate="low_rank",
                gate_activation="sigmoid",
                gate_position="before_norm",
                norm=NormConfig(kind="rms", groups=2),
                bias=True,
                decay_temperature=False,
            )
        ),
    ),
    MixerCase(
        "lightning-hybrid",
        (
            BlockConfig(
                norm=None, token_mixer=LightningConfig(heads=2, lrpe=True), channel_mixer=None
            ),
            *twice(LightningConfig(heads=2)),
        ),
    ),
)

RETENTION = (
    MixerCase("retention", twice(RetentionConfig(heads=2)), compiles=True),
    MixerCase(
        "retention-narrow",
        twice(RetentionConfig(heads=4, key_dim=6, value_width=20, decay="linspace")),
    ),
)
SOFTMAX = (
    MixerCase("softmax", twice(SoftmaxConfig(heads=4, kv_heads=2, bias=True)), compiles=True),
    MixerCase(
        "softmax-no-positions",
        twice(SoftmaxConfig(heads=2, head_dim=12, rope_base=None)),
        bidirectional="equivariant",
    ),
    MixerCase(
        "softmax-hybrid",
        (*twice(LightningConfig(heads=2)), *twice(SoftmaxConfig(heads=2))[:1]),
    ),
)
TPE = (
    MixerCase(
        "tpe",
        (
            BlockConfig(norm=None, token_mixer=TpeConfig(exponents=5), channel_mixer=None),
            *twice(LightningConfig(heads=2, lrpe=True, lrpe_init="half", decay="none")),
        ),
        rounded=("mixing",),
    ),
    MixerCase(
        "tpe-alone",
        (BlockConfig(norm=None, token_mixer=TpeConfig(), channel_mixer=None),),
        compiles=True,
        rounded=("mixing",),
    ),
)

CASES: tuple[MixerCase, ...] = (
    *COSFORMER,
    *DIAG_ATTENTION,
    *EOS,
    *GAU,
    *HGRN1,
    *HGRN2,
    *LIGHTNET,
    *LIGHTNING,
    *RETENTION,
    *SOFTMAX,
    *TPE,
)

KINDS = frozenset(
    get_args(config.model_fields["kind"].annotation)[0]
    for config in get_args(get_args(TokenMixerConfig)[0])
)
