"""Configurations of the models for transformers: what is in their config.json, and what it means."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from transnormer.config import validate
from transnormer.models.checkpoint import FORMAT, MODEL_TYPE
from transnormer.models.convert import released
from transnormer.models.decoder import DecoderConfig

# Keys of this package's config.json that are about the files beside it, not about the model.
_ABOUT_FILES = ("format", "weights", "tokenizer_fingerprint")
_SOURCE = Path("config.json")


class AnyTransnormerConfig(PreTrainedConfig):
    """What both layouts share.

    Attributes:
        layer_types: "full_attention" of blocks of softmax attention, "linear_attention" of others.
    """

    model_type = ""
    keys_to_ignore_at_inference = ["past_key_values"]

    use_cache: bool = True
    tie_word_embeddings: bool | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    layer_types: list[str] | None = None

    def decoder_config(self) -> DecoderConfig:
        """The model in this package's words."""
        raise NotImplementedError(f"{type(self).__name__} has no decoder_config")

    def _set_layer_types(self, config: DecoderConfig) -> None:
        self.layer_types = [
            "full_attention" if block.token_mixer.kind == "softmax" else "linear_attention"
            for block in config.blocks
        ]

    def _token_ids(self) -> dict[str, int | None]:
        """The special ids as the decoder knows them: the first of several ends of text."""
        eos = self.eos_token_id
        return {
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": (eos[0] if eos else None) if isinstance(eos, list) else eos,
        }


class TransnormerDecoderConfig(AnyTransnormerConfig):
    """Configuration of any decoder of this package, ``transnormer.save``'s config.json.

    The model is described by the key ``decoder``, a ``DecoderConfig`` as a table; the other fields
    are read off it. vocab_size, tie_word_embeddings and the special ids may be set and then win.
    """

    model_type = MODEL_TYPE
    has_no_defaults_at_init = True

    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    initializer_range: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for key in _ABOUT_FILES:
            kwargs.pop(key, None)
        given = kwargs.pop("decoder", None)
        if given is None:
            raise ValueError("decoder is missing; expected a DecoderConfig or its table")
        if not isinstance(given, DecoderConfig):
            given = validate(DecoderConfig, given, source=str(_SOURCE))
        # Not ``decoder``: transformers takes a field of this name for a configuration of its own.
        self._decoder = given
        heads = [getattr(block.token_mixer, "heads", None) for block in given.blocks]
        read_off = {
            "vocab_size": given.vocab_size,
            "hidden_size": given.model_dim,
            "num_hidden_layers": len(given.blocks),
            "num_attention_heads": next((h for h in heads if h is not None), 1),
            "initializer_range": given.init_std,
            "tie_word_embeddings": given.tie_embeddings,
            "pad_token_id": given.pad_token_id,
            "bos_token_id": given.bos_token_id,
            "eos_token_id": given.eos_token_id,
        }
        for name, value in read_off.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self._set_layer_types(given)
        super().__post_init__(**kwargs)

    def decoder_config(self) -> DecoderConfig:
        """The model in this package's words.

        Raises:
            ValueError: hidden_size or num_hidden_layers is not what ``decoder`` says.
        """
        sizes = {"hidden_size": self._decoder.model_dim}
        sizes["num_hidden_layers"] = len(self._decoder.blocks)
        for name, size in sizes.items():
            if getattr(self, name) != size:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; expected {size}, as decoder says; make "
                    "another DecoderConfig"
                )
        return self._decoder.model_copy(
            update={
                "vocab_size": self.vocab_size,
                "tie_embeddings": bool(self.tie_word_embeddings),
                "init_std": self.initializer_range,
                **self._token_ids(),
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json, ``decoder`` brought up to date with the other fields."""
        table = super().to_dict()
        table.pop("_decoder", None)
        table["format"] = FORMAT
        table["decoder"] = self.decoder_config().model_dump(mode="json")
        return table


class TransnormerConfig(AnyTransnormerConfig):
    """Configuration of the released TransNormerLLM models: their config.json, field by field.

    Defaults are the released code's; an empty linear_use_lrpe_list is LRPE in the first layer, and
    a glu_dim of -1 is decoder_embed_dim.
    """

    model_type = released.MODEL_TYPE
    attribute_map = {
        "hidden_size": "decoder_embed_dim",
        "num_hidden_layers": "decoder_layers",
        "num_attention_heads": "decoder_attention_heads",
        "intermediate_size": "glu_dim",
        "initializer_range": "init_std",
    }

    vocab_size: int = 64_000
    decoder_embed_dim: int = 1024
    decoder_layers: int = 24
    decoder_attention_heads: int = 8
    hidden_dim: int = 1024
    glu_dim: int = 2816
    linear_use_lrpe_list: list[int | bool] | None = None
    linear_act_fun: str = "silu"
    norm_type: str = "simplermsnorm"
    no_scale_embedding: bool = False
    bias: bool = False
    init_std: float = 0.02
    add_bos_token: bool = False
    tie_word_embeddings: bool | None = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        self.linear_use_lrpe_list = list(self.linear_use_lrpe_list or ())
        super().__post_init__(**kwargs)
        self._set_layer_types(self.decoder_config())

    def decoder_config(self) -> DecoderConfig:
        """The model in this package's words; errors are ``released.read_config``'s."""
        raw = {key: getattr(self, key) for key in released.ReleasedConfig.model_fields}
        return released.read_config({**raw, **self._token_ids()}, _SOURCE)
