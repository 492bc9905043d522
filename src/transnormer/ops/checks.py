"""Checks at the public door of an op: one style of error for shapes, dtypes and values."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that states and sums have: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_autocast_enabled(kind: str) -> bool:
    """Whether autocast is on for a kind of device."""
    # Asking is an error on meta; torch 2.11 cannot compile torch.amp.is_autocast_available.
    return kind != "meta" and torch.is_autocast_enabled(kind)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast gives x: its own where autocast is off or x is float64."""
    kind = x.device.type
    if x.dtype == torch.float64 or not is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def no_autocast(kind: str) -> AbstractContextManager[object]:
    """Autocast off on a kind of device, if it is on there."""
    if is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def values_are_visible(x: Tensor) -> bool:
    """Whether a check of x's values costs nothing: eager, on the CPU, a real tensor."""
    if torch.compiler.is_compiling():
        return False
    # Fake and functional tensors are subclasses; they have no values to look at.
    return type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu"


def check_tensor(name: str, x: object, *, optional: bool = False) -> None:
    """Raise TypeError unless x is a tensor (or None, where it is optional)."""
    if not isinstance(x, Tensor) and not (optional and x is None):
        what = "a tensor or None" if optional else "a tensor"
        raise TypeError(f"{name} is {type(x).__name__}; expected {what}; use torch.as_tensor")


def check_number(name: str, x: object) -> float:
    """The number as a float; raises TypeError for anything else."""
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise TypeError(f"{name} is {x!r}; expected a number")
    return float(x)


def check_float(name: str, x: Tensor) -> None:
    """Raise TypeError unless x has one of the dtypes that ops take."""
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} is {x.dtype}; expected float64, float32, bfloat16 or float16")


def check_rank(name: str, x: Tensor, dims: str) -> None:
    """Raise ValueError unless x has the named dims, e.g. ``"batch seq heads key_dim"``."""
    if x.dim() != len(dims.split()):
        raise ValueError(f"{name} has shape {list(x.shape)}; expected [{', '.join(dims.split())}]")


def check_shape(name: str, x: Tensor, shape: Sequence[int], dims: str) -> None:
    """Raise ValueError unless x's shape equals ``shape``, whose dims are named ``dims``."""
    if x.shape != tuple(shape):
        named = ", ".join(f"{d} {n}" for d, n in zip(dims.split(), shape, strict=True))
        raise ValueError(f"{name} has shape {list(x.shape)}; expected {list(shape)} ({named})")


def check_same(name: str, x: Tensor, dtype: torch.dtype, device: torch.device, of: str) -> None:
    """Raise TypeError for another dtype than ``of`` has, ValueError for another device."""
    if x.dtype != dtype:
        raise TypeError(f"{name} is {x.dtype}; expected {dtype}, the dtype of {of}; convert it")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}; expected {device}, the device of {of}; move it")


def check_log_decay_values(log_decay: Tensor) -> None:
    """Raise ValueError for NaN or positive entries, where looking costs no synchronisation."""
    if not values_are_visible(log_decay) or bool((log_decay <= 0).all()):
        return
    if bool(log_decay.isnan().any()):
        raise ValueError("log_decay holds NaN; expected values <= 0 (-inf is legal)")
    raise ValueError(
        f"log_decay holds {float(log_decay.max())}; expected values <= 0, since decay is "
        "exp(log_decay); pass the negative of a slope"
    )


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, seq: int, device: torch.device) -> None:
    """Check the cumulative lengths of packed sequences: [num_sequences + 1], 0 first, seq last.

    Raises:
        TypeError: not int32 or int64.
        ValueError: another rank or device, batch not 1, or (CPU, eager) values that do not start
            at 0, decrease, or do not end at seq.
    """
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens is {cu_seqlens.dtype}; expected int32 or int64")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens has shape {list(cu_seqlens.shape)}; expected [num_sequences + 1], at "
            "least 2 entries"
        )
    if batch != 1:
        raise ValueError(f"batch is {batch}; expected 1 with cu_seqlens; pack along seq")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}; expected {device}; move it")
    if not values_are_visible(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != seq or any(b < a for a, b in zip(bounds, bounds[1:])):
        raise ValueError(
            f"cu_seqlens is {bounds if len(bounds) <= 12 else f'{bounds[:6]} ... {bounds[-3:]}'}; "
            f"expected non-decreasing values from 0 to seq, which is {seq}"
        )
