"""AdamW's step of many tensors in one launch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transnormer.ops.kernel_devices import why_not_named

_DTYPES = (torch.float32, torch.bfloat16)


class Numbers(NamedTuple):
    """What one parameter's step takes beside its tensors, at step t of rate lr.

    Attributes:
        keep: 1 - lr decay.
        rate: lr / (1 - beta_1^t).
        correction: 1 / (1 - beta_2^t).
    """

    keep: float
    rate: float
    correction: float


class ManyTensors:
    """Parameters and moments whose steps are made in one launch, wherever they lie.

    m = beta_1 m + (1 - beta_1) g;  v = beta_2 v + (1 - beta_2) g^2;
    w = keep w - rate m / (sqrt(correction v) + eps),    g the gradient times a factor,

    in float32 (Loshchilov and Hutter 2017, arXiv:1711.05101). w is the parameter, or a bfloat16 one with
    the remainder of float32 weights beside it (``optim.split_weights``). bfloat16 moments, and
    bfloat16 parameters without remainders, are rounded stochastically behind the step, by a seed a
    tensor. The gradients themselves are read once and stay as they are: clipping by the factor costs
    nothing. The host looks at addresses alone; what it sends to the device beside the launch is a
    table of them, when gradients have moved, and a few numbers a tensor.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        remainders: Sequence[Tensor] | None = None,
    ) -> None:
        """Take the tensors, contiguous, on one GPU; their memory must stay theirs.

        Args:
            parameters: float32 or bfloat16, all in one.
            exp_avgs, exp_avg_sqs: their moments, float32 or bfloat16, all in one.
            remainders: int16, of the weights that bfloat16 parameters round.

        Raises:
            ValueError: a tensor that is not contiguous, moments of another size.
            TypeError: another dtype, or several; remainders beside float32 parameters.
            RuntimeError: kernels cannot run there.
        """
        kinds = [parameters, exp_avgs, exp_avg_sqs] + ([] if remainders is None else [remainders])
        self._tensors = tuple(zip(*kinds, strict=True))
        self._device = parameters[0].device
        if (reason := why_not(self._device)) is not None:
            raise RuntimeError(reason)
        self._dtype, self._moments = parameters[0].dtype, exp_avgs[0].dtype
        self._split = remainders is not None
        if self._split and self._dtype != torch.bfloat16:
            raise TypeError(f"parameters of remainders are {self._dtype}; expected torch.bfloat16")
        self.rounds = torch.bfloat16 in (self._moments, None if self._split else self._dtype)
        if other := {self._dtype, self._moments}.difference(_DTYPES):
            raise TypeError(f"a tensor is {other.pop()}; expected torch.float32 or torch.bfloat16")
        dtypes = (self._dtype, self._moments, self._moments, torch.int16)
        for tensors in self._tensors:
            for x, dtype in zip(tensors, dtypes):
                _check(x, tensors[0], dtype)
        self._fixed = [tuple(x.data_ptr() for x in tensors) for tensors in self._tensors]
        from transnormer.ops.adamw.triton_adamw import tiles_of

        self._tiles = tiles_of([x.numel() for x in parameters]).to(self._device)
        self._one = torch.ones((), dtype=torch.float32, device=self._device)
        self._read: list[int] = []
        self._table = torch.empty(0)

    def are(self, tensors: Sequence[tuple[Tensor, ...]]) -> bool:
        """Whether these, (parameter, m, v, remainder if any), are the tensors taken, where they lay."""
        return [tuple(x.data_ptr() for x in some) for some in tensors] == self._fixed

    def prepare(
        self,
        grads: Sequence[Tensor | None],
        numbers: Sequence[Numbers],
        betas: tuple[float, float],
        eps: float,
        factor: Tensor | None = None,
        seeds: Sequence[int] = (),
    ) -> Callable[[], None]:
        """Return what makes a step, once, before the next one is prepared.

        Args:
            grads: of the parameters, in their dtype or all in float32; one that is None leaves its
                parameter and moments.
            numbers: of each parameter.
            betas, eps: of all.
            factor: float32 [], on the device: by which gradients are multiplied; None is 1.
            seeds: of each parameter's random bits, where ``rounds``: another one for each step.

        Raises:
            ValueError, TypeError: a gradient of another shape or dtype, seeds that are missing.
        """
        from transnormer.ops.adamw import triton_adamw

        if self.rounds and len(seeds) != len(self._tensors):
            raise ValueError(
                f"seeds are {len(seeds)}; expected {len(self._tensors)}, one a parameter"
            )
        # A copy lives until the launch, by the result.
        grads = [None if g is None else g.contiguous() for g in grads]
        wide = any(g is not None and g.dtype == torch.float32 for g in grads)
        read_as = torch.float32 if wide else self._dtype
        for grad, tensors in zip(grads, self._tensors, strict=True):
            if grad is not None:
                _check(grad, tensors[0], read_as)
        read = [0 if g is None else g.data_ptr() for g in grads]
        if read != self._read:
            rows = [
                (p, g, m, v, r[0] if r else 0, tensors[0].numel())
                for g, (p, m, v, *r), tensors in zip(read, self._fixed, self._tensors, strict=True)
            ]
            self._table, self._read = self._sent(rows, torch.int64), read
        table, sent = self._table, self._sent(list(numbers), torch.float32)
        drawn = self._sent(list(seeds), torch.int64) if self.rounds else table
        scale = self._one if factor is None else factor.to(self._device, torch.float32)
        dtypes = (self._dtype, read_as, self._moments)

        def step(held: Sequence[Tensor | None] = grads) -> None:
            # A rank's shares may all be empty.
            if self._tiles.shape[0]:
                triton_adamw.step(
                    table, self._tiles, sent, drawn, scale, betas, eps, dtypes, self._split
                )

        return step

    def _sent(self, rows: list[Any], dtype: torch.dtype) -> Tensor:
        """A small table on the device, which nobody waits for."""
        table = torch.tensor(rows, dtype=dtype, pin_memory=self._device.type == "cuda")
        return table.to(self._device, non_blocking=True)


def why_not(device: torch.device) -> str | None:
    """Why tensors of a device cannot be taken; None where they can, Triton's interpreter with them."""
    return why_not_named(device, True)


def _check(x: Tensor, like: Tensor, dtype: torch.dtype) -> None:
    if x.dtype != dtype:
        raise TypeError(f"a tensor is {x.dtype}; expected {dtype}")
    if x.shape != like.shape or x.device != like.device or not x.is_contiguous():
        raise ValueError(
            f"a tensor of shape {list(x.shape)}, strides {x.stride()}, on {x.device}; expected shape "
            f"{list(like.shape)} on {like.device}, contiguous; use contiguous()"
        )
