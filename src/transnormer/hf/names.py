"""What a tensor is called in a file and in the models for transformers."""

from typing import Any, TypeAlias

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

Renamings: TypeAlias = list[WeightConverter | WeightRenaming]
_OURS = "(embedding|position_embedding|shared|blocks|final_norm)"


def own_layout(inside: str) -> Renamings:
    """Renamings from the layout of ``transnormer.save``; transformers reverses them to save.

    Args:
        inside: where the model has its decoder: "transnormer.", below "model." under a head.
    """
    return [WeightRenaming(rf"^{_OURS}\.", rf"{inside}\1.")]


def released_layout(inside: str) -> Renamings:
    """Renamings from the layout of the released models, as ``models.convert.released`` has them."""
    return [
        WeightRenaming(r"^model\.embed_tokens\.", f"{inside}embedding."),
        WeightRenaming(r"^model\.layers\.", f"{inside}blocks."),
        WeightRenaming(r"\.channel_mixer\.l1\.", ".channel_mixer.gate_proj."),
        WeightRenaming(r"\.channel_mixer\.l2\.", ".channel_mixer.up_proj."),
        WeightRenaming(r"\.channel_mixer\.l3\.", ".channel_mixer.down_proj."),
    ]


def register_names(layout: Any, body: type, *heads: type) -> None:
    """Tell transformers a layout's names, of a model without its head and of such with it."""
    for kind, inside in ((body, ""), *((head, "model.") for head in heads)):
        renamings = layout(f"{inside}transnormer.")
        # The same names again, where an exported file was loaded before.
        register_checkpoint_conversion_mapping(kind.__name__, renamings, overwrite=True)
