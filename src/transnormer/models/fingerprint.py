"""What identifies a model: a hash of its configuration and of a summary of every tensor."""

import hashlib
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

# Of all fingerprints. Those without it are of an earlier kind, which did not see every order.
PREFIX = "2-"
# Integers of as many bytes as a dtype has.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Entries that make one number of the summary, and those that are worked on at once (8 MB).
_BLOCK, _AT_ONCE = 1 << 12, 1 << 20


def fingerprint(config: str, tensors: Mapping[str, Tensor]) -> str:
    """PREFIX and the SHA-256 of a configuration and of each tensor's name, shape, dtype and summary.

    The summary has for each 4,096 entries sum_i w_i b_i modulo 2^64, b_i the bits of an entry as an
    integer and w_i a fixed number of its place, without any regularity. So the order of the entries
    counts, and the device does not. Cheap for large models where they are: a GPU sends 8 bytes for
    4,096 entries.
    """
    digest = hashlib.sha256(config.encode())
    for name, x in _plain_tensors(tensors):
        digest.update(f"{name} {list(x.shape)} {x.dtype}".encode())
        digest.update(_summary(x.detach()).numpy().tobytes())
    return PREFIX + digest.hexdigest()


def _summary(x: Tensor) -> Tensor:
    """One number for each block of entries, int64 [blocks] on the CPU."""
    flat, places = x.reshape(-1), _places(x.device)
    flat = flat.view(_INTEGERS[flat.dtype.itemsize])
    sums = []
    for part in flat.split(_AT_ONCE):
        blocks = -(-part.numel() // _BLOCK)
        rows = F.pad(part, (0, blocks * _BLOCK - part.numel())).view(blocks, _BLOCK)
        sums.append((rows * places).sum(1))
    return torch.cat(sums).cpu()


def _places(device: torch.device) -> Tensor:
    """The number of each place in a block: MurmurHash3's finaliser, but for signed shifts."""
    place = torch.arange(1, _BLOCK + 1, dtype=torch.int64, device=device)
    for factor in (-49064778989728563, -4265267296055464877):
        place = (place ^ (place >> 33)) * factor
    return place ^ (place >> 33)


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
