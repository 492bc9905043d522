"""The models of transformers by name: the same modules, and no computation of their own."""

from pathlib import Path
from typing import Any

from transnormer.hf.body import AnyTransnormerBody
from transnormer.hf.config import AnyTransnormerConfig, TransnormerConfig, TransnormerDecoderConfig
from transnormer.hf.heads import AnyTransnormerForCausalLM, AnyTransnormerHead
from transnormer.models.checkpoint import add_hashes


class TransnormerModel(AnyTransnormerBody):
    """A released TransNormerLLM without its head."""

    config_class = TransnormerConfig


class TransnormerForCausalLM(AnyTransnormerForCausalLM):
    """A released TransNormerLLM; its directories load and are saved in the released layout."""

    config_class = TransnormerConfig


class TransnormerDecoderModel(AnyTransnormerBody):
    """Any decoder of this package without its head."""

    config_class = TransnormerDecoderConfig


class _Saved(AnyTransnormerHead):
    """A head whose directories ``transnormer.load`` reads."""

    config_class = TransnormerDecoderConfig

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; config.json also holds the hashes that ``transnormer.load`` checks."""
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        add_hashes(Path(save_directory))
        return saved


class TransnormerDecoderForCausalLM(_Saved, AnyTransnormerForCausalLM):
    """Any causal decoder of this package."""


class TransnormerDecoderForMaskedLM(_Saved):
    """Any bidirectional decoder of this package."""

    def __init__(self, config: AnyTransnormerConfig) -> None:
        if config.decoder_config().causal:
            raise NotImplementedError(
                "causal is True; expected False for a masked language model; use "
                "AutoModelForCausalLM"
            )
        super().__init__(config)
