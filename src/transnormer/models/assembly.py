"""Putting the tensors of a directory into a model that was built without memory."""

from collections.abc import Callable, Container, Mapping
from operator import methodcaller
from pathlib import Path

import torch
from torch import nn

from transnormer.models.tensor_files import StoredTensor
from transnormer.nn.precision import KeepPrecision
from transnormer.ops.checks import FLOAT_DTYPES

CONFIG = "config.json"


def assemble(
    model: nn.Module,
    stored: Mapping[str, StoredTensor],
    directory: Path,
    stored_name: Callable[[str], str],
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> None:
    """Give a model on the meta device its weights and buffers, and leave it in eval mode.

    Args:
        model: on the meta device.
        stored: the tensors by the model's own names.
        directory: where they came from, for messages.
        stored_name: what a tensor is called in its files, for messages.
        device: where to put it; None is the CPU.
        dtype: of the weights; None keeps the stored one. Angles and decays stay float32 or better.

    Raises:
        ValueError: tensors that are not exactly those of the model.
        TypeError: a dtype that no model has.
    """
    keep = _kept_precise(model)
    _check_tensors(model, stored, directory, stored_name)
    stored_dtype = _common_dtype(stored, keep, directory, dtype)
    tensors = {}
    for name, (tensor, _) in stored.items():
        wanted = torch.promote_types(stored_dtype, keep[name]) if name in keep else stored_dtype
        tensors[name] = tensor.to(device=device or "cpu", dtype=wanted)
    compute_buffers(model, stored, device or "cpu")
    # After the buffers that are computed: a module may have stored tensors beside them.
    model.load_state_dict(tensors, assign=True)
    model.requires_grad_(True).eval()


def compute_buffers(model: nn.Module, stored: Container[str], device: torch.device | str) -> None:
    """Initialise the modules of a model on the meta device that have buffers, with what else is theirs.

    Args:
        model: changed in place.
        stored: names of tensors; a module whose buffers are all among them is left as it is.
        device: where to.
    """
    for prefix, module in model.named_modules():
        if any(f"{prefix}.{name}" not in stored for name, _ in module.named_buffers(recurse=False)):
            module.to_empty(device=device, recurse=False)
            methodcaller("reset_parameters")(module)


def _kept_precise(model: nn.Module) -> dict[str, torch.dtype]:
    """The lowest dtype of each stored tensor that a model of any dtype keeps precise, by name."""
    return {
        f"{prefix}.{name}": module.lowest
        for prefix, module in model.named_modules()
        if isinstance(module, KeepPrecision)
        for name in module.state_dict()
        if "." not in name
    }


def _check_tensors(
    model: nn.Module,
    stored: Mapping[str, StoredTensor],
    directory: Path,
    stored_name: Callable[[str], str],
) -> None:
    expected = model.state_dict()
    for name, meta in expected.items():
        if name not in stored:
            raise ValueError(
                f"{directory} lacks {stored_name(name)}; expected it in its weight files"
            )
        tensor, file = stored[name]
        if tensor.shape != meta.shape:
            raise ValueError(
                f"{file}: {stored_name(name)} has shape {list(tensor.shape)}; expected "
                f"{list(meta.shape)}, by {directory / CONFIG}"
            )
        if not tensor.is_floating_point():
            raise ValueError(
                f"{file}: {stored_name(name)} is {tensor.dtype}; expected a floating dtype"
            )
    for name, (_, file) in stored.items():
        if name not in expected:
            raise ValueError(
                f"{file} holds {stored_name(name)}; expected only the tensors of the model that "
                f"{directory / CONFIG} describes"
            )


def _common_dtype(
    stored: Mapping[str, StoredTensor],
    keep: Mapping[str, torch.dtype],
    directory: Path,
    dtype: torch.dtype | None,
) -> torch.dtype:
    if dtype is not None:
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype is {dtype!r}; expected a torch dtype, float16 to float64")
        return dtype
    found = {x.tensor.dtype for name, x in stored.items() if name not in keep}
    if len(found) > 1:
        names = ", ".join(sorted(str(x).removeprefix("torch.") for x in found))
        raise ValueError(f"{directory} stores weights in {names}; expected one dtype; pass dtype=")
    return found.pop()
