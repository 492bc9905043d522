"""What an evaluation is of: the model, the versions, and the figures as rows of a table."""

import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import torch

from transnormer.data.tokenizers import Tokenizer
from transnormer.eval.scorer import TaskResult
from transnormer.models.decoder import Decoder


def subject_of(model: Decoder, tokenizer: Tokenizer) -> dict[str, Any]:
    """What was evaluated: fingerprints of model and tokenizer, size, dtype, device."""
    weight = model.embedding.weight
    return {
        "fingerprint": model.fingerprint(),
        "tokenizer": tokenizer.fingerprint,
        "parameters": model.num_parameters(),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": str(weight.device),
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, this package, torch and others that took part."""
    found = {"python": platform.python_version(), "transnormer": version("transnormer")}
    found["torch"] = torch.__version__
    return found | {name: version(name) for name in packages}


def rows_of(results: Mapping[str, TaskResult]) -> Iterator[tuple[str, str, str, str]]:
    """Rows (task, items, figure, value with its standard error); a part has one row, below."""
    for name, result in results.items():
        for figure, (value, stderr) in result.figures.items():
            yield name, f"{result.items:,}", figure, _shown(value, stderr)
        for part, figures in result.parts.items():
            shown = (f"{figure} {_shown(*found)}" for figure, found in figures.items())
            yield f"  {part}", "", "", ", ".join(shown)


def _shown(value: float, stderr: float | None) -> str:
    text = f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"
    if stderr is None:
        return text
    return f"{text} +- {stderr:.4f}" if abs(stderr) < 1e6 else f"{text} +- {stderr:.4g}"
