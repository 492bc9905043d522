"""The released TransNormerLLM layout: its field names, its tensor names, and ours.

A model is expressible when the fields below describe all of it; what they cannot say is refused
by name. Sizes are read off the tensors, and the fields must agree with them.
Source: the released Hugging Face code and checkpoints (OpenNLPLab/TransNormerLLM-385M, -1B, -7B).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transnormer.config import Config, validate
from transnormer.models.convert.differences import refuse_difference
from transnormer.models.decoder import BlockConfig, DecoderConfig
from transnormer.models.tensor_files import StoredTensor
from transnormer.nn.activations import Activation
from transnormer.nn.channel_mixers import GluConfig
from transnormer.nn.token_mixers import LightningConfig

MODEL_TYPE = "transnormer"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
# Within a layer: released name -> ours.
_PARTS = {
    "token_mixer.qkvu_proj.weight": "token_mixer.qkvu_proj.weight",
    "token_mixer.qkvu_proj.bias": "token_mixer.qkvu_proj.bias",
    "token_mixer.out_proj.weight": "token_mixer.out_proj.weight",
    "token_mixer.out_proj.bias": "token_mixer.out_proj.bias",
    "token_mixer.lrpe.theta": "token_mixer.lrpe.theta",
    "channel_mixer.l1.weight": "channel_mixer.gate_proj.weight",
    "channel_mixer.l2.weight": "channel_mixer.up_proj.weight",
    "channel_mixer.l3.weight": "channel_mixer.down_proj.weight",
}
_PARTS_BACK = {ours: released for released, ours in _PARTS.items()}
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "elu": "elu",
    "1+elu": "1+elu",
    "sigmoid": "sigmoid",
    "gelu": "gelu",
    "none": "none",
}
# What the released code takes where a config.json is silent.
_DEFAULTS = {
    "vocab_size": 64_000,
    "decoder_embed_dim": 1024,
    "decoder_layers": 24,
    "decoder_attention_heads": 8,
    "hidden_dim": 1024,
    "glu_dim": 2816,
}
_KINDS = {
    "token_mixer": "expected 'lightning', the only token mixer of the released layout",
    "channel_mixer": "expected 'glu', the only channel mixer of the released layout",
}


class ReleasedConfig(Config):
    """The fields of a released config.json that say what the model is; None is to be inferred."""

    vocab_size: int | None = None
    decoder_embed_dim: int | None = None
    decoder_layers: int | None = None
    decoder_attention_heads: int | None = None
    hidden_dim: int | None = None
    glu_dim: int | None = None
    """-1 is decoder_embed_dim."""
    linear_use_lrpe_list: tuple[bool | int, ...] = ()
    """Empty is to be inferred."""
    linear_act_fun: str = "silu"
    norm_type: str = "simplermsnorm"
    no_scale_embedding: bool = False
    bias: bool = False
    init_std: float = 0.02
    tie_word_embeddings: bool | None = None
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2


def is_released(raw: Mapping[str, Any]) -> bool:
    """True if the contents of a config.json are of the released layout."""
    return raw.get("model_type", MODEL_TYPE) == MODEL_TYPE and "decoder" not in raw


def ours(name: str) -> str | None:
    """Our name of a released tensor; None if the layout has no such tensor."""
    if name == EMBEDDING:
        return "embedding.weight"
    if name == HEAD:
        return HEAD
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in _PARTS:
        return None
    return f"blocks.{int(match[1])}.{_PARTS[match[2]]}"


def theirs(name: str) -> str:
    """The released name of one of our tensors, or our own where the layout has none."""
    if name == "embedding.weight":
        return EMBEDDING
    _, _, rest = name.partition("blocks.")
    index, _, part = rest.partition(".")
    return f"model.layers.{index}.{_PARTS_BACK[part]}" if part in _PARTS_BACK else name


def read(
    raw: Mapping[str, Any], stored: Mapping[str, StoredTensor], config_file: Path
) -> tuple[DecoderConfig, dict[str, StoredTensor]]:
    """The configuration and the tensors of a released checkpoint under our names.

    Args:
        raw: contents of config.json; unknown keys are other libraries' and are ignored.
        stored: all tensors of the checkpoint.
        config_file: for messages.

    Raises:
        ValueError: fields and tensors that do not agree, an unknown tensor.
        NotImplementedError: a norm or an activation that the decoder does not have.
    """
    known = {key: raw[key] for key in ReleasedConfig.model_fields if key in raw}
    fields = validate(ReleasedConfig, known, source=str(config_file))
    for name, (_, file) in stored.items():
        if ours(name) is None:
            raise ValueError(
                f"{file} holds {name}; expected only tensors of the released TransNormerLLM layout"
            )
    tied = _is_tied(fields, stored, config_file)
    config = _decoder_config(_inferred(fields, stored, config_file), tied, config_file)
    tensors = {str(ours(name)): tensor for name, tensor in stored.items()}
    if tied:
        tensors.pop(HEAD, None)
    return config, tensors


def read_config(raw: Mapping[str, Any], config_file: Path) -> DecoderConfig:
    """The configuration that the fields of a config.json alone describe, without the tensors.

    What ``read`` infers has its default instead: the sizes of the released code, LRPE in the first
    layer, a tied head.

    Args:
        raw: contents of config.json; unknown keys are other libraries' and are ignored.
        config_file: for messages.

    Raises:
        ValueError: a value of the wrong type, or sizes that do not fit each other.
        NotImplementedError: a norm or an activation that the decoder does not have.
    """
    known = {key: raw[key] for key in ReleasedConfig.model_fields if key in raw}
    fields = validate(ReleasedConfig, known, source=str(config_file))
    sizes = {key: value for key, value in _DEFAULTS.items() if getattr(fields, key) is None}
    fields = fields.model_copy(update=sizes)
    layers, dim = fields.decoder_layers, fields.decoder_embed_dim
    assert layers is not None
    given = fields.linear_use_lrpe_list or (True, *[False] * (layers - 1))
    if len(given) != layers:
        raise ValueError(
            f"{config_file}: linear_use_lrpe_list has {len(given)} entries; expected {layers}, one "
            "for each layer"
        )
    update: dict[str, Any] = {"linear_use_lrpe_list": given}
    if fields.glu_dim == -1:
        update["glu_dim"] = dim
    tied = fields.tie_word_embeddings is not False
    return _decoder_config(fields.model_copy(update=update), tied, config_file)


def write(
    config: DecoderConfig, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The contents of config.json and the tensors under their released names.

    Raises:
        NotImplementedError: the layout cannot express a field, which is named.
    """
    fields = _fields_of(config)
    again = _decoder_config(fields, config.tie_embeddings, Path("config.json"))
    refuse_difference(_resolved(config), _resolved(again), "config", "released")
    raw: dict[str, Any] = {
        "model_type": MODEL_TYPE,
        "architectures": ["TransnormerForCausalLM"],
        **fields.model_dump(mode="json"),
        "torch_dtype": str(tensors["embedding.weight"].dtype).removeprefix("torch."),
        "use_cache": True,
        "add_bos_token": False,
    }
    return raw, {theirs(name): tensor for name, tensor in tensors.items()}


def _is_tied(fields: ReleasedConfig, stored: Mapping[str, StoredTensor], config_file: Path) -> bool:
    """Whether the head is the embedding; the tensors decide where the field is absent."""
    if EMBEDDING not in stored:
        raise ValueError(f"{config_file.parent} lacks {EMBEDDING}; expected it in its weight files")
    tie = fields.tie_word_embeddings
    if HEAD not in stored:
        if tie is False:
            raise ValueError(
                f"{config_file.parent} lacks {HEAD}; expected it, as tie_word_embeddings is false "
                f"in {config_file}"
            )
        return True
    head, file = stored[HEAD]
    same = torch.equal(head, stored[EMBEDDING].tensor)
    if tie and not same:
        raise ValueError(
            f"{file}: {HEAD} differs from {EMBEDDING}; expected them equal, as tie_word_embeddings "
            f"is true in {config_file}; set it to false to keep the head"
        )
    return same if tie is None else tie


def _inferred(
    fields: ReleasedConfig, stored: Mapping[str, StoredTensor], config_file: Path
) -> ReleasedConfig:
    """The fields completed from the shapes; raises ValueError where the two disagree."""
    layers = 1 + max((int(m[1]) for m in map(_LAYER.fullmatch, stored) if m), default=-1)
    if layers == 0:
        raise ValueError(f"{config_file.parent} lacks model.layers.0; expected at least one layer")

    def size(name: str, dim: int, rank: int = 2) -> int:
        if name not in stored:
            raise ValueError(f"{config_file.parent} lacks {name}; expected it in its weight files")
        tensor, file = stored[name]
        if tensor.dim() != rank:
            raise ValueError(f"{file}: {name} has shape {list(tensor.shape)}; expected {rank} dims")
        return tensor.shape[dim]

    def settled(field: str, found: int, name: str) -> int:
        value = getattr(fields, field)
        if value is not None and value != found:
            raise ValueError(
                f"{config_file}: {field} is {value}; expected {found}, by {name} in "
                f"{stored[name].file if name in stored else config_file.parent}"
            )
        return found

    first = "model.layers.0."
    qkvu, gate = f"{first}token_mixer.qkvu_proj.weight", f"{first}channel_mixer.l1.weight"
    dim = settled("decoder_embed_dim", size(EMBEDDING, 1), EMBEDDING)
    hidden = settled("hidden_dim", size(qkvu, 0) // 4, qkvu)
    if fields.glu_dim == -1:
        fields = fields.model_copy(update={"glu_dim": dim})
    heads = fields.decoder_attention_heads
    thetas = [f"model.layers.{i}.token_mixer.lrpe.theta" for i in range(layers)]
    for name in thetas:
        if name in stored:
            heads = settled("decoder_attention_heads", size(name, 0, rank=3), name)
    if heads is None:
        raise ValueError(
            f"{config_file}: decoder_attention_heads is missing; expected it, as no lrpe.theta "
            "tells the number of heads"
        )
    if heads < 1 or hidden % heads:
        raise ValueError(
            f"{config_file}: decoder_attention_heads is {heads}; expected a divisor of {hidden}, "
            f"the width of {qkvu}"
        )
    return fields.model_copy(
        update={
            "vocab_size": settled("vocab_size", size(EMBEDDING, 0), EMBEDDING),
            "decoder_embed_dim": dim,
            "decoder_layers": settled("decoder_layers", layers, f"model.layers.{layers - 1}"),
            "decoder_attention_heads": heads,
            "hidden_dim": hidden,
            "glu_dim": settled("glu_dim", size(gate, 0), gate),
            "linear_use_lrpe_list": _lrpe_list(fields, thetas, stored, config_file),
        }
    )


def _lrpe_list(
    fields: ReleasedConfig,
    thetas: list[str],
    stored: Mapping[str, StoredTensor],
    config_file: Path,
) -> tuple[bool, ...]:
    """Which layers have LRPE: those that hold theta, and the list, if any, must agree."""
    found = tuple(name in stored for name in thetas)
    given = fields.linear_use_lrpe_list
    if given and len(given) != len(found):
        raise ValueError(
            f"{config_file}: linear_use_lrpe_list has {len(given)} entries; expected {len(found)}, "
            "one for each layer"
        )
    for name, listed, present in zip(thetas, given, found):
        if listed and not present:
            raise ValueError(
                f"{config_file.parent} lacks {name}; expected it, as linear_use_lrpe_list says"
            )
        if present and not listed:
            raise ValueError(
                f"{stored[name].file} holds {name}; expected none, as linear_use_lrpe_list in "
                f"{config_file} says; correct the list or remove it"
            )
    return found


def _decoder_config(fields: ReleasedConfig, tied: bool, config_file: Path) -> DecoderConfig:
    """Our configuration of the model that complete fields describe."""
    if fields.norm_type != "simplermsnorm":
        raise NotImplementedError(
            f"{config_file}: norm_type is {fields.norm_type!r}; expected 'simplermsnorm', the only "
            "norm of the released models"
        )
    if fields.linear_act_fun not in _ACTIVATIONS:
        raise NotImplementedError(
            f"{config_file}: linear_act_fun is {fields.linear_act_fun!r}; expected one of "
            f"{', '.join(_ACTIVATIONS)}"
        )
    assert fields.vocab_size is not None
    assert fields.decoder_embed_dim is not None
    assert fields.decoder_attention_heads is not None
    assert fields.glu_dim is not None
    hidden = fields.hidden_dim
    blocks = tuple(
        BlockConfig(
            token_mixer=LightningConfig(
                heads=fields.decoder_attention_heads,
                hidden_dim=None if hidden == fields.decoder_embed_dim else hidden,
                lrpe=bool(lrpe),
                qk_activation=_ACTIVATIONS[fields.linear_act_fun],
                bias=fields.bias,
            ),
            channel_mixer=GluConfig(hidden_dim=fields.glu_dim),
        )
        for lrpe in fields.linear_use_lrpe_list
    )
    return DecoderConfig(
        vocab_size=fields.vocab_size,
        model_dim=fields.decoder_embed_dim,
        blocks=blocks,
        embedding_scale=not fields.no_scale_embedding,
        tie_embeddings=tied,
        init_std=fields.init_std,
        pad_token_id=fields.pad_token_id,
        bos_token_id=fields.bos_token_id,
        eos_token_id=fields.eos_token_id,
    )


def _fields_of(config: DecoderConfig) -> ReleasedConfig:
    """The released fields nearest to a configuration; the first block speaks for all."""
    for index, block in enumerate(config.blocks):
        for part, kind in (("token_mixer", LightningConfig), ("channel_mixer", GluConfig)):
            mixer = getattr(block, part)
            if not isinstance(mixer, kind):
                raise NotImplementedError(
                    f"config.blocks[{index}].{part}.kind is {getattr(mixer, 'kind', None)!r}; "
                    f"{_KINDS[part]}; "
                    "save with layout='transnormer'"
                )
    mixers = [x.token_mixer for x in config.blocks if isinstance(x.token_mixer, LightningConfig)]
    token_mixer, channel_mixer = mixers[0], config.blocks[0].channel_mixer
    assert isinstance(channel_mixer, GluConfig)
    return ReleasedConfig(
        vocab_size=config.vocab_size,
        decoder_embed_dim=config.model_dim,
        decoder_layers=len(config.blocks),
        decoder_attention_heads=token_mixer.heads,
        hidden_dim=token_mixer.hidden_dim or config.model_dim,
        glu_dim=channel_mixer.hidden_dim,
        linear_use_lrpe_list=tuple(int(mixer.lrpe) for mixer in mixers),
        linear_act_fun=token_mixer.qk_activation,
        no_scale_embedding=not config.embedding_scale,
        bias=token_mixer.bias,
        init_std=config.init_std,
        tie_word_embeddings=config.tie_embeddings,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )


def _resolved(config: DecoderConfig) -> dict[str, Any]:
    """The configuration as a table in which None widths are written out."""
    table = config.model_dump()
    for block in table["blocks"]:
        mixer = block["token_mixer"]
        mixer["hidden_dim"] = mixer["hidden_dim"] or config.model_dim
        if mixer["gate"] != "low_rank":
            mixer["gate_rank"] = None
    return table
