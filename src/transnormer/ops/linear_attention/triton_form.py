"""What calls of one form share: their cut, tiles and constants, and launches that are prepared once.

A launch through Triton's JIT looks at every argument and option again, which takes the host longer
than the driver does (docs/kernels.md has what a call costs). A form is decided by all that the JIT would look
at, so the compiled kernel can be handed the next call's tensors at once.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from transnormer.ops.linear_attention import constant_decay, launch_config
from transnormer.ops.linear_attention.launch_config import Tiles
from transnormer.ops.linear_attention.triton_runtime import arithmetic, launch

# Forms that are remembered; a length or a number of packed sequences more is a form more.
_REMEMBERED = 1024
# And launches of a form: their gradients may have any strides.
_LAUNCHES = 64


class Key(NamedTuple):
    """What decides a form; shapes, strides and dtypes are those of the tensors named.

    Attributes:
        q, k, v: shape, stride and dtype of each.
        log_decay: dim and dtype, None without one.
        cu_seqlens: packed sequences and dtype, None without.
        device: of all.
        scale, reverse: of the call.
        backward: whether its tiles are those of the backward pass.
        in_parts: whether sums of every segment are wanted.
    """

    q: tuple[torch.Size, tuple[int, ...], torch.dtype]
    k: tuple[torch.Size, tuple[int, ...], torch.dtype]
    v: tuple[torch.Size, tuple[int, ...], torch.dtype]
    log_decay: tuple[int, torch.dtype] | None
    cu_seqlens: tuple[int, torch.dtype] | None
    device: torch.device
    scale: float
    reverse: bool
    backward: bool
    in_parts: bool


class Launch(NamedTuple):
    """A kernel of constants, compiled, and what follows the tensors."""

    compiled: Any
    grid: tuple[int, int, int]
    rest: tuple[Any, ...]


class Form:
    """Cut, tiles and constants of calls with equal keys."""

    def __init__(self, key: Key) -> None:
        (q_shape, _, self.dtype), (k_shape, _, _), (v_shape, _, _) = key.q, key.k, key.v
        self.scale, self.reverse = key.scale, key.reverse
        self.batch, self.seq, self.kv_heads, self.key_dim = k_shape
        self.heads, self.value_dim = q_shape[2], v_shape[3]
        self.groups = self.heads // self.kv_heads
        self.gpu = constant_decay.gpu_of(key.device)
        self.packed, self.sequences = key.cu_seqlens is not None, self.batch
        rows = self.batch, self.seq, self.heads, key.device
        if key.cu_seqlens is not None:
            self.sequences = key.cu_seqlens[0]
            self.plan = constant_decay.plan(*rows, self.sequences)
        elif key.in_parts:
            self.plan = constant_decay.plan_with_sums(*rows)
        else:
            self.plan = constant_decay.plan(*rows)
        # T, L and SEGMENTS of the kernels.
        self.cut = self.seq, self.plan.length, self.plan.segments
        self.arithmetic = arithmetic(self.dtype)
        self.gated, self.chunk = key.log_decay is not None and key.log_decay[0] == 3, 0
        kind = "none" if key.log_decay is None else "constant"
        self.decay: dict[str, Any] = {"DECAY": kind, "PARTS": 1}
        if self.gated:
            self.decay = {"DECAY": "gates", "PARTS": 1 if self.dtype == torch.bfloat16 else 2}
            dims = (self.key_dim, self.value_dim)
            cuts = [self.sweep_tiles(*dims, backward=key.backward).chunk]
            if key.backward:
                cuts.append(self.sweep_tiles(*dims[::-1], backward=True).chunk)
            # Sums of gates are the same in all sweeps.
            self.chunk = min(cuts)
        self._launches: dict[Hashable, Launch] = {}

    def sweep_tiles(self, key_dim: int, value_dim: int, *, backward: bool = False) -> Tiles:
        """Tiles of a sweep with these dims."""
        rows = self.plan.units * self.heads
        tiles = launch_config.sweep_tiles(
            key_dim, value_dim, self.dtype, rows, self.gpu, backward=backward, gated=self.gated
        )
        return tiles._replace(chunk=self.chunk) if self.chunk else tiles

    def launch(
        self,
        variant: Hashable,
        tensors: Sequence[Tensor | None],
        rest: Callable[[], tuple[Any, int, tuple[Any, ...], dict[str, Any]]],
    ) -> None:
        """Run a kernel on tensors, which are its first arguments.

        Args:
            variant: equal for launches of this form with equal ``rest``, whose tensors are None in the
                same places and have equal dtypes.
            tensors: all that the kernel takes, on the current device.
            rest: gives the kernel, the number of programs, the numbers behind the tensors, and the
                constants by name, options such as num_warps among them.
        """
        addresses = 0
        for x in tensors:
            if x is not None:
                addresses |= x.data_ptr()
        # What the JIT knows of an address: whether 16 divides it. One that it does not is rare.
        aligned = not addresses & 15
        known = self._launches.get(variant) if aligned else None
        if known is not None:
            known.compiled[known.grid](*tensors, *known.rest)
            return
        kernel, programs, numbers, constants = rest()
        compiled = launch(kernel, programs, *tensors, *numbers, **constants)
        # The interpreter compiles nothing.
        if aligned and compiled is not None:
            names = kernel.arg_names[len(tensors) + len(numbers) :]
            if len(self._launches) >= _LAUNCHES:
                self._launches.clear()
            following = (*numbers, *(constants[name] for name in names))
            self._launches[variant] = Launch(compiled, (programs, 1, 1), following)


_remembered = lru_cache(_REMEMBERED)(Form)


def form_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
    *,
    backward: bool,
    in_parts: bool,
) -> Form:
    """The form of a call; see ``Key``."""
    key = Key(
        (q.shape, q.stride(), q.dtype),
        (k.shape, k.stride(), k.dtype),
        (v.shape, v.stride(), v.dtype),
        None if log_decay is None else (log_decay.dim(), log_decay.dtype),
        None if cu_seqlens is None else (cu_seqlens.shape[0] - 1, cu_seqlens.dtype),
        q.device,
        scale,
        reverse,
        backward,
        in_parts,
    )
    # The interpreter is for tests, which change how calls are cut.
    return Form(key) if triton.knobs.runtime.interpret else _remembered(key)
