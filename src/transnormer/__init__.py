"""TransNormerLLM and its relatives: linear-attention language models to train, study and serve.

``transnormer.ops`` needs torch alone, so everything else is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transnormer.infer.generate import Generation, generate
    from transnormer.models import zoo
    from transnormer.models.checkpoint import load, load_classifier, save
    from transnormer.models.classifier import ClassifierConfig, SequenceClassifier
    from transnormer.models.decoder import BlockConfig, Decoder, DecoderConfig, DecoderOutput
    from transnormer.models.state import DecoderState

__version__ = "0.1.0"

_LAZY = {
    "BlockConfig": "transnormer.models.decoder",
    "ClassifierConfig": "transnormer.models.classifier",
    "Decoder": "transnormer.models.decoder",
    "DecoderConfig": "transnormer.models.decoder",
    "DecoderOutput": "transnormer.models.decoder",
    "DecoderState": "transnormer.models.state",
    "Generation": "transnormer.infer.generate",
    "SequenceClassifier": "transnormer.models.classifier",
    "generate": "transnormer.infer.generate",
    "load": "transnormer.models.checkpoint",
    "load_classifier": "transnormer.models.checkpoint",
    "save": "transnormer.models.checkpoint",
    "zoo": "transnormer.models",
}

__all__ = [
    "BlockConfig",
    "ClassifierConfig",
    "Decoder",
    "DecoderConfig",
    "DecoderOutput",
    "DecoderState",
    "Generation",
    "SequenceClassifier",
    "generate",
    "load",
    "load_classifier",
    "save",
    "zoo",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'transnormer' has no attribute {name!r}")
    if name == "zoo":
        return importlib.import_module("transnormer.models.zoo")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
