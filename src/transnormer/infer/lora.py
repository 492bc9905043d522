"""LoRA adapters in the files of the package peft, merged into a model; peft is not needed.

W' = W + s B A,  s = alpha / rank, or alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023,
arXiv:2312.03732), for each projection that the adapter names (Hu et al. 2021, arXiv:2106.09685).
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from transnormer.files import read_json
from transnormer.models.decoder import Decoder
from transnormer.ops.checks import accumulation_dtype

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What peft's model, and the one for transformers inside it, put in front of a decoder's own names.
_NAME = re.compile(r"(?P<outer>.*?)(?P<module>blocks\.\d+\..+)\.lora_(?P<part>[AB])\.weight")
# Kinds of adapters that are something else than W + s B A, by their field: the value without them.
_PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
}


def merge_adapter(model: Decoder, directory: str | Path) -> list[str]:
    """Add an adapter to a model's projections, in place; the model is as fast as before.

    Products and sums are float32 (float64 for a float64 model), rounded to the weight's dtype once.

    Args:
        model: the decoder that the adapter was trained on; its fingerprint changes.
        directory: with adapter_config.json and adapter_model.safetensors, as peft's
            ``save_pretrained`` writes them for a model of ``transnormer.hf``.

    Returns:
        names of the projections that changed, in order.

    Raises:
        FileNotFoundError: one of the two files is absent.
        ValueError: a damaged file; a projection that the model does not have, or has in another
            size; half of a pair; no pair at all. Each is named, and the model is as it was.
        NotImplementedError: an adapter of another kind (the field is named), or quantised weights.
    """
    directory = Path(directory)
    config, tensors = _read(directory)
    pairs = _pairs(tensors, directory / WEIGHTS)
    projections = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    merged: dict[str, Tensor] = {}
    for (outer, name), parts in sorted(pairs.items()):
        if len(parts) < 2:
            raise ValueError(
                f"{directory / WEIGHTS} holds {name}.lora_{min(parts)}.weight alone; expected "
                "lora_A and lora_B; copy the file again"
            )
        if name not in projections:
            known = sorted({key.rsplit(".", 1)[-1] for key in projections})
            raise ValueError(
                f"{directory / WEIGHTS} changes {name}; expected projections of this model: "
                f"{', '.join(known)} of {len(model.blocks)} blocks; load the model it was trained on"
            )
        weight, a, b = projections[name].weight, parts["A"], parts["B"]
        if type(weight) is not nn.Parameter:
            raise NotImplementedError(
                f"{name}.weight is a {type(weight).__name__}; expected plain weights: merge the "
                "adapter first, then quantise"
            )
        if a.dim() != 2 or b.dim() != 2 or (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise ValueError(
                f"{directory / WEIGHTS}: {name} has lora_A {list(a.shape)} and lora_B "
                f"{list(b.shape)}; expected [rank, {weight.shape[1]}] and [{weight.shape[0]}, rank]"
            )
        if a.shape[0] != b.shape[1]:
            raise ValueError(
                f"{directory / WEIGHTS}: {name} has the ranks {a.shape[0]} and {b.shape[1]}; "
                "expected one"
            )
        dtype = accumulation_dtype(weight.dtype)
        a, b = (x.to(device=weight.device, dtype=dtype) for x in (a, b))
        scale = _scale(config, outer + name, a.shape[0], directory / CONFIG)
        merged[name] = torch.add(weight.detach().to(dtype), b @ a, alpha=scale)
    with torch.no_grad():
        for name, weight in merged.items():
            projections[name].weight.copy_(weight)
    return list(merged)


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory} holds no {name}; expected an adapter as peft saves it; check the path"
            )
    config = read_json(directory / CONFIG)
    for field, legal in _PLAIN.items():
        if config.get(field) not in legal:
            raise NotImplementedError(
                f"{directory / CONFIG}: {field} is {config.get(field)!r}; expected {legal[0]!r}: "
                "only plain LoRA is merged here; merge it with peft and convert the model"
            )
    try:
        return config, load_file(directory / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(
            f"{directory / WEIGHTS} is not a readable safetensors file ({error}); copy it again"
        ) from error


def _pairs(tensors: Mapping[str, Tensor], file: Path) -> dict[tuple[str, str], dict[str, Tensor]]:
    """A and B by what stands in front of a module's name and that name."""
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, x in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                f"{file} holds {name}; expected lora_A and lora_B of projections inside blocks; is "
                "this the adapter of another kind of model?"
            )
        found.setdefault((match["outer"], match["module"]), {})[match["part"]] = x
    if not found:
        raise ValueError(f"{file} holds no tensors; expected lora_A and lora_B of projections")
    return found


def _scale(config: Mapping[str, Any], name: str, rank: int, file: Path) -> float:
    """What B A is multiplied by, patterns of modules' names before the common numbers."""

    def own(field: str, patterns: str) -> Any:
        for pattern, value in (config.get(patterns) or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", name):
                return value
        return config.get(field)

    expected, alpha = own("r", "rank_pattern"), own("lora_alpha", "alpha_pattern")
    if expected != rank:
        raise ValueError(
            f"{file}: the rank of {name} is {expected}; expected {rank}, that of its tensors"
        )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"{file}: the lora_alpha of {name} is {alpha!r}; expected a number")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
