"""Hugging Face's LLaMA layout (model_type "llama"): its field names, its tensor names, and ours.

What the fields below say is all of the model or it is refused by name; other keys of a config.json
do not change what the model computes. Fields that are absent have the layout's own defaults.
Source: transformers' LlamaConfig and LlamaForCausalLM; Touvron et al. 2023, arXiv:2302.13971.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from transnormer import files
from transnormer.config import Config, validate
from transnormer.models import tensor_files
from transnormer.models.convert.differences import refuse_difference
from transnormer.models.decoder import BlockConfig, Decoder, DecoderConfig
from transnormer.models.directories import replaced
from transnormer.models.tensor_files import StoredTensor
from transnormer.nn.activations import Activation
from transnormer.nn.channel_mixers import GluConfig
from transnormer.nn.norms import NormConfig
from transnormer.nn.token_mixers import SoftmaxConfig

MODEL_TYPE = "llama"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_NAMES = {EMBEDDING: "embedding.weight", "model.norm.weight": "final_norm.weight", HEAD: HEAD}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_OUR_LAYER = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
# Within a layer: their module -> ours.
_PARTS = {
    "input_layernorm": "token_norm",
    "self_attn.q_proj": "token_mixer.q_proj",
    "self_attn.k_proj": "token_mixer.k_proj",
    "self_attn.v_proj": "token_mixer.v_proj",
    "self_attn.o_proj": "token_mixer.out_proj",
    "post_attention_layernorm": "channel_norm",
    "mlp.gate_proj": "channel_mixer.gate_proj",
    "mlp.up_proj": "channel_mixer.up_proj",
    "mlp.down_proj": "channel_mixer.down_proj",
}
_NAMES_BACK = {ours: theirs for theirs, ours in _NAMES.items()}
_PARTS_BACK = {ours: theirs for theirs, ours in _PARTS.items()}
# Older files hold the rotary frequencies, which follow from rope_theta.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "relu": "relu",
}


class LlamaFields(Config):
    """The fields of a LLaMA's config.json that say what the model computes."""

    vocab_size: int = Field(default=32_000, ge=1)
    hidden_size: int = Field(default=4096, ge=1)
    intermediate_size: int = Field(default=11_008, ge=1)
    num_hidden_layers: int = Field(default=32, ge=1)
    num_attention_heads: int = Field(default=32, ge=1)
    num_key_value_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    hidden_act: str = "silu"
    rms_norm_eps: float = Field(default=1e-6, ge=0.0)
    initializer_range: float = Field(default=0.02, gt=0.0)
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    rope_theta: float = Field(default=10_000.0, gt=0.0)


def is_llama(raw: Mapping[str, Any]) -> bool:
    """True if the contents of a config.json are of this layout."""
    return raw.get("model_type") == MODEL_TYPE


def ours(name: str) -> str | None:
    """Our name of one of their tensors; None if the layout has no such tensor."""
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in _PARTS:
        return _NAMES.get(name)
    return f"blocks.{int(match[1])}.{_PARTS[match[2]]}.{match[3]}"


def theirs(name: str) -> str:
    """Their name of one of our tensors, or our own where the layout has none."""
    match = _OUR_LAYER.fullmatch(name)
    if match is None or match[2] not in _PARTS_BACK:
        return _NAMES_BACK.get(name, name)
    return f"model.layers.{match[1]}.{_PARTS_BACK[match[2]]}.{match[3]}"


def read_config(raw: Mapping[str, Any], config_file: Path) -> DecoderConfig:
    """The configuration that a config.json describes.

    Args:
        raw: its contents.
        config_file: for messages.

    Raises:
        ValueError: a value of the wrong type, or sizes that do not fit each other.
        NotImplementedError: a field that the decoder cannot express; it is named.
    """
    known = {key: raw[key] for key in LlamaFields.model_fields if key in raw}
    rope = _rope_table(raw, config_file)
    if "rope_theta" in rope:
        known["rope_theta"] = rope["rope_theta"]
    if raw.get("quantization_config"):
        raise NotImplementedError(
            f"{config_file}: quantization_config is set; expected plain floating weights; take the "
            "checkpoint that is not quantized"
        )
    fields = validate(LlamaFields, known, source=str(config_file))
    return _decoder_config(fields, config_file)


def read(
    raw: Mapping[str, Any], stored: Mapping[str, StoredTensor], config_file: Path
) -> tuple[DecoderConfig, dict[str, StoredTensor]]:
    """The configuration and the tensors of a LLaMA checkpoint under our names.

    Args:
        raw: contents of config.json.
        stored: all tensors of the checkpoint.
        config_file: for messages.

    Raises:
        ValueError: as ``read_config``; an unknown tensor; a tied head that is not the embedding.
        NotImplementedError: as ``read_config``.
    """
    config = read_config(raw, config_file)
    tensors = {}
    for name, tensor in stored.items():
        known = ours(name)
        if known is not None:
            tensors[known] = tensor
        elif not _DERIVED.fullmatch(name):
            raise ValueError(
                f"{tensor.file} holds {name}; expected only tensors of Hugging Face's LLaMA layout"
            )
    head = tensors.get(HEAD)
    if config.tie_embeddings and head is not None:
        embedding = tensors.get("embedding.weight")
        if embedding is None or not torch.equal(head.tensor, embedding.tensor):
            raise ValueError(
                f"{head.file}: {HEAD} differs from {EMBEDDING}; expected them equal, as "
                f"tie_word_embeddings is true in {config_file}; set it to false to keep the head"
            )
        del tensors[HEAD]
    return config, tensors


def write(
    config: DecoderConfig, tensors: Mapping[str, Tensor], *, max_position_embeddings: int = 2048
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The contents of config.json and the tensors under their names in the layout.

    Args:
        config: what the model is.
        tensors: its state.
        max_position_embeddings: the longest text that other libraries let it read; the model
            itself has no such limit.

    Raises:
        NotImplementedError: the layout cannot express a field, which is named.
    """
    fields = _fields_of(config)
    again = _decoder_config(fields, Path("config.json"))
    refuse_difference(_resolved(config), _resolved(again), "config", "LLaMA")
    raw: dict[str, Any] = {
        "model_type": MODEL_TYPE,
        "architectures": ["LlamaForCausalLM"],
        **fields.model_dump(mode="json"),
        # Newer readers look here, older ones at rope_theta.
        "rope_parameters": {"rope_type": "default", "rope_theta": fields.rope_theta},
        "max_position_embeddings": max_position_embeddings,
        "torch_dtype": str(tensors["embedding.weight"].dtype).removeprefix("torch."),
        "use_cache": True,
    }
    return raw, {theirs(name): tensor for name, tensor in tensors.items()}


def save(model: Decoder, path: str | Path, *, max_position_embeddings: int = 2048) -> None:
    """Write a model as a directory for transformers' ``from_pretrained``, whole or not at all.

    Args:
        model: a decoder of softmax attention and gated linear units, in its dtype.
        path: the directory; a saved model there is replaced.
        max_position_embeddings: as ``write``'s.

    Raises:
        NotImplementedError: the layout cannot express the model; the field is named.
        ValueError: path holds something that is not a saved model.
    """
    raw, tensors = write(
        model.config, model.state_dict(), max_position_embeddings=max_position_embeddings
    )
    with replaced(path) as directory:
        tensor_files.write_tensors(tensors, directory)
        files.write_json(raw, directory / "config.json")


def _rope_table(raw: Mapping[str, Any], config_file: Path) -> dict[str, Any]:
    """What newer and older files say of rotary positions beside rope_theta; plain ones only."""
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    table = raw.get(key) or {}
    if not isinstance(table, dict):
        raise ValueError(f"{config_file}: {key} is {table!r}; expected a table")
    kind = table.get("rope_type", table.get("type", "default"))
    if kind != "default":
        raise NotImplementedError(
            f"{config_file}: {key}.rope_type is {kind!r}; expected 'default': frequencies that are "
            "scaled are not supported"
        )
    for name, holder in ((f"{key}.", table), ("", raw)):
        part = holder.get("partial_rotary_factor")
        if part not in (None, 1.0):
            raise NotImplementedError(
                f"{config_file}: {name}partial_rotary_factor is {part!r}; expected 1.0: all "
                "channels of a head turn"
            )
    return table


def _decoder_config(fields: LlamaFields, config_file: Path) -> DecoderConfig:
    """Our configuration of the model that the fields describe."""
    if fields.hidden_act not in _ACTIVATIONS:
        raise NotImplementedError(
            f"{config_file}: hidden_act is {fields.hidden_act!r}; expected one of "
            f"{', '.join(_ACTIVATIONS)}"
        )
    if fields.attention_dropout:
        raise NotImplementedError(
            f"{config_file}: attention_dropout is {fields.attention_dropout}; expected 0.0: scores "
            "are not dropped; set it to 0.0"
        )
    eos = fields.eos_token_id
    if isinstance(eos, tuple):
        if len(eos) != 1:
            raise NotImplementedError(
                f"{config_file}: eos_token_id is {list(eos)}; expected one id; keep one in the file "
                "and name the others when generating"
            )
        eos = eos[0]
    heads, kv_heads = fields.num_attention_heads, fields.num_key_value_heads
    head_dim = fields.head_dim
    if head_dim == fields.hidden_size // heads:
        head_dim = None
    norm = NormConfig(kind="rms", eps=fields.rms_norm_eps)
    block = BlockConfig(
        norm=norm,
        token_mixer=SoftmaxConfig(
            heads=heads,
            kv_heads=None if kv_heads == heads else kv_heads,
            head_dim=head_dim,
            rope_base=fields.rope_theta,
            bias=fields.attention_bias,
        ),
        channel_mixer=GluConfig(
            hidden_dim=fields.intermediate_size,
            activation=_ACTIVATIONS[fields.hidden_act],
            bias=fields.mlp_bias,
        ),
    )
    # Some files write -1 where they mean that there is no such id.
    pad, bos, eos = (
        None if x is None or x < 0 else x for x in (fields.pad_token_id, fields.bos_token_id, eos)
    )
    table = {
        "vocab_size": fields.vocab_size,
        "model_dim": fields.hidden_size,
        "blocks": (block,) * fields.num_hidden_layers,
        "final_norm": norm,
        "embedding_scale": False,
        "tie_embeddings": fields.tie_word_embeddings,
        "init_std": fields.initializer_range,
        "pad_token_id": pad,
        "bos_token_id": bos,
        "eos_token_id": eos,
    }
    return validate(DecoderConfig, table, source=str(config_file))


def _fields_of(config: DecoderConfig) -> LlamaFields:
    """The fields nearest to a configuration; the first block speaks for all."""
    for index, block in enumerate(config.blocks):
        for part, kind, name in (
            ("token_mixer", SoftmaxConfig, "softmax"),
            ("channel_mixer", GluConfig, "glu"),
        ):
            mixer = getattr(block, part)
            if not isinstance(mixer, kind):
                raise NotImplementedError(
                    f"config.blocks[{index}].{part}.kind is {getattr(mixer, 'kind', None)!r}; "
                    f"expected {name!r}, the only {part.replace('_', ' ')} of the LLaMA layout; "
                    "save with layout='transnormer'"
                )
    first = config.blocks[0]
    token_mixer, channel_mixer = first.token_mixer, first.channel_mixer
    assert isinstance(token_mixer, SoftmaxConfig)
    assert isinstance(channel_mixer, GluConfig)
    names: dict[str, str] = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    return LlamaFields(
        vocab_size=config.vocab_size,
        hidden_size=config.model_dim,
        intermediate_size=channel_mixer.hidden_dim,
        num_hidden_layers=len(config.blocks),
        num_attention_heads=token_mixer.heads,
        num_key_value_heads=token_mixer.kv_heads or token_mixer.heads,
        head_dim=token_mixer.head_dim or config.model_dim // token_mixer.heads,
        hidden_act=names.get(channel_mixer.activation, "silu"),
        rms_norm_eps=config.final_norm.eps,
        initializer_range=config.init_std,
        attention_bias=token_mixer.bias,
        mlp_bias=channel_mixer.bias,
        tie_word_embeddings=config.tie_embeddings,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        rope_theta=token_mixer.rope_base or LlamaFields().rope_theta,
    )


def _resolved(config: DecoderConfig) -> dict[str, Any]:
    """The configuration as a table in which None widths are written out."""
    table = config.model_dump()
    for block in table["blocks"]:
        mixer = block["token_mixer"]
        mixer["kv_heads"] = mixer["kv_heads"] or mixer["heads"]
        mixer["head_dim"] = mixer["head_dim"] or config.model_dim // mixer["heads"]
    return table
