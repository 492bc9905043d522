"""The rows of op_gpu: shapes, the bytes that each must move, and what was promised for it."""

from typing import NamedTuple

import torch
from torch import Tensor

from transnormer.ops.decay import tnl_log_decay

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Slopes of the first layer of 24 and of the last, 1e-5 of it: strong and hardly any decay.
LAYERS = {"first_layer": 0, "last_layer": 23}


class Target(NamedTuple):
    """At most these shares of a peer's time; ``peer`` "best" is the fastest of all."""

    peer: str
    forward: float
    backward: float
    forward_last_layer: float | None = None


class Row(NamedTuple):
    """One shape of the attention op."""

    batch: int
    heads: int
    seq: int
    dim: int
    target: Target | None = None
    dtype: str = "bf16"
    # Without tuned peers: each new dtype costs FLA minutes of autotuning.
    peers: bool = True

    @property
    def name(self) -> str:
        """As given to --rows."""
        suffix = "" if self.dtype == "bf16" else f"-{self.dtype}"
        return f"{self.batch}x{self.heads}x{self.seq}x{self.dim}{suffix}"

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one of q, k, v, o."""
        size = torch.finfo(DTYPES[self.dtype]).bits // 8
        return self.batch * self.heads * self.seq * self.dim * size

    @property
    def forward_bytes(self) -> int:
        """q, k, v read once, o written once."""
        return 4 * self.tensor_bytes

    @property
    def backward_bytes(self) -> int:
        """q, k, v, do read once, dq, dk, dv written once."""
        return 7 * self.tensor_bytes

    @property
    def output_bytes(self) -> int:
        """o and the three gradients: what forward and backward must allocate."""
        return 4 * self.tensor_bytes

    def shrunk(self) -> "Row":
        """A toy of the same name's kind, for dry runs."""
        small = min(self.seq, 64 + self.seq // 1024)
        return self._replace(batch=min(self.batch, 2), heads=2, seq=small, dim=32)


# The first row is also the one at whose length FLA tunes its kernels for head dim 128.
ATTENTION_ROWS = (
    Row(4, 32, 8192, 128, Target("fla_chunk", 0.41, 0.30)),
    Row(4, 32, 1024, 128, Target("softmax_cudnn", 0.60, 0.50)),
    Row(4, 32, 2048, 128, Target("softmax_cudnn", 0.42, 0.38)),
    Row(4, 32, 4096, 128),
    Row(4, 32, 16_384, 128),
    Row(4, 32, 32_768, 128, Target("fla_chunk", 0.41, 0.30)),
    Row(2, 32, 8192, 128, Target("best", 0.55, 0.50)),
    Row(1, 16, 8192, 128, Target("best", 0.55, 0.50)),
    Row(1, 16, 131_072, 128, Target("fla_chunk", 0.28, 0.28, forward_last_layer=0.33)),
    Row(2, 32, 8192, 64, Target("best", 0.62, 0.60)),
    Row(1, 8, 2048, 128, Target("best", 0.55, 0.50)),
    Row(4, 16, 8192, 256, Target("best", 0.55, 0.50)),
)
DTYPE_ROWS = (
    Row(4, 32, 2048, 128, dtype="fp32", peers=False),
    Row(4, 32, 2048, 128, dtype="fp16", peers=False),
)
PARTS = ("packed", "flatness", "decode", "host", "lightning1", "gated")
GROUPS = {
    "attention": tuple(row.name for row in ATTENTION_ROWS),
    "dtypes": tuple(row.name for row in DTYPE_ROWS),
    "quick": ("4x32x8192x128", "4x32x2048x128", "decode", "host"),
    "all": tuple(row.name for row in (*ATTENTION_ROWS, *DTYPE_ROWS)) + PARTS,
}
# What was promised of the parts.
PACKED_TARGET = 1.15
DECODE_TARGET = 0.85
FLATNESS_TARGET = {"first_layer": 1.10, "last_layer": 1.60}
HOST_TARGET_US = {"forward_without_gradient": 35.0, "forward_with_gradient": 60.0}
MEMORY_TARGET = 1.1


def select(names: list[str]) -> list[str]:
    """Names of rows and parts, groups unfolded, in the order of definition, each once.

    Raises:
        ValueError: an unknown name.
    """
    known = GROUPS["all"]
    wanted = set()
    for name in names:
        if name not in GROUPS and name not in known:
            expected = ", ".join((*GROUPS, *known))
            raise ValueError(f"row is {name!r}; expected one of {expected}")
        wanted |= set(GROUPS.get(name, (name,)))
    return [name for name in known if name in wanted]


def slopes(heads: int, layer: str, device: str) -> Tensor:
    """Log decay of the first or last layer of 24, float32 [heads]."""
    return tnl_log_decay(heads, LAYERS[layer], 24).to(device)


def packed_bounds(tokens: int, documents: int = 32) -> list[int]:
    """Bounds of documents of uneven length that fill so many tokens; none is a multiple of 64."""
    weights = [3 + (i * 7919) % 97 for i in range(documents)]
    total = sum(weights)
    return [tokens * sum(weights[:i]) // total for i in range(documents + 1)]


def flatness_shapes(tokens: int = 1 << 20) -> list[tuple[int, int]]:
    """(batch, seq) with the same number of tokens, sequences from 8k to all of them."""
    return [(tokens // seq, seq) for seq in (1 << 13, 1 << 15, 1 << 17, 1 << 19, 1 << 20)]
