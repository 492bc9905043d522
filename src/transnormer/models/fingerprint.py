"""What identifies a model: a hash of its configuration and of a summary of every tensor."""

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

# Integers of as many bytes as a dtype has.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(config: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a configuration and of each tensor's name, shape, dtype, sum and sample.

    The sum is of all bits, read as integers, so it does not depend on the order of adding; the
    sample is up to 1024 evenly spaced values. Cheap for large models; any training step or
    another dtype changes it.
    """
    digest = hashlib.sha256(config.encode())
    for name, x in _plain_tensors(tensors):
        flat = x.detach().reshape(-1)
        bits = flat.view(_INTEGERS[flat.dtype.itemsize]).sum(dtype=torch.int64).item()
        sample = flat[:: max(-(-flat.numel() // 1024), 1)].cpu().contiguous()
        digest.update(f"{name} {list(x.shape)} {x.dtype} {bits}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain_tensors(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name; a quantised one, which has no bits of its own, as its parts."""
    for name, x in tensors.items():
        flatten = getattr(x, "__tensor_flatten__", None)
        parts = [] if flatten is None else flatten()[0]
        # torchao's integers with their scales; tensors spread over processes have parts too.
        if "qdata" in parts:
            yield from ((f"{name}.{part}", getattr(x, part)) for part in parts)
        else:
            yield name, x
