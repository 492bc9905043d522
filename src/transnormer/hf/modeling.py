"""The models of transformers by name: the same modules, and no computation of their own."""

from pathlib import Path
from typing import Any

from transnormer.hf.body import AnyTransnormerBody
from transnormer.hf.config import AnyTransnormerConfig, TransnormerConfig, TransnormerDecoderConfig
from transnormer.hf.heads import AnyTransnormerForCausalLM, AnyTransnormerHead
from transnormer.models.checkpoint import add_hashes
from transnormer.models.tensor_files import SHARD_INDEX, SINGLE


class TransnormerModel(AnyTransnormerBody):
    """A released TransNormerLLM without its head."""

    config_class = TransnormerConfig


class _OneSetOfWeights(AnyTransnormerHead):
    """A head that leaves no weights of an earlier save in its directory.

    transformers writes shards beside a single file of before, and would load the latter.
    """

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers'."""
        paths = [Path(save_directory, name) for name in (SINGLE, SHARD_INDEX)]
        before = {path: path.stat().st_mtime_ns for path in paths if path.is_file()}
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        after = {path: path.stat().st_mtime_ns for path in paths if path.is_file()}
        stale = [path for path, time in after.items() if before.get(path) == time]
        # Of several processes one writes.
        if len(stale) < len(after):
            for path in stale:
                path.unlink()
        return saved


class TransnormerForCausalLM(_OneSetOfWeights, AnyTransnormerForCausalLM):
    """A released TransNormerLLM; its directories load and are saved in the released layout."""

    config_class = TransnormerConfig


class TransnormerDecoderModel(AnyTransnormerBody):
    """Any decoder of this package without its head."""

    config_class = TransnormerDecoderConfig


class _Saved(_OneSetOfWeights):
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
