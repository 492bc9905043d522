"""AdamW's step of many tensors in one launch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transnormer.ops.kernel_devices import why_not_named


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
    p = keep p - rate m / (sqrt(correction v) + eps),    g the gradient times a factor,

    in float32 (Loshchilov and Hutter 2017, arXiv:1711.05101). The gradients themselves are read once
    and stay as they are: clipping by the factor costs nothing. The host looks at addresses alone; what
    it sends to the device beside the launch is a table of them, when gradients have moved, and three
    numbers a tensor.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
    ) -> None:
        """Take the tensors, float32, contiguous, on one GPU; their memory must stay theirs.

        Raises:
            ValueError: a tensor that is not contiguous, moments of another size.
            TypeError: another dtype.
            RuntimeError: kernels cannot run there.
        """
        self._tensors = tuple(zip(parameters, exp_avgs, exp_avg_sqs, strict=True))
        self._device = parameters[0].device
        if (reason := why_not(self._device)) is not None:
            raise RuntimeError(reason)
        for tensors in self._tensors:
            for x in tensors:
                _check(x, tensors[0])
        self._fixed = [(p.data_ptr(), m.data_ptr(), v.data_ptr()) for p, m, v in self._tensors]
        from transnormer.ops.adamw.triton_adamw import tiles_of

        self._tiles = tiles_of([x.numel() for x in parameters]).to(self._device)
        self._one = torch.ones((), dtype=torch.float32, device=self._device)
        self._read: list[int] = []
        self._table = torch.empty(0)

    def are(self, tensors: Sequence[tuple[Tensor, Tensor, Tensor]]) -> bool:
        """Whether these (parameter, m, v) are the tensors taken, at the same places."""
        return [tuple(x.data_ptr() for x in three) for three in tensors] == self._fixed

    def prepare(
        self,
        grads: Sequence[Tensor | None],
        numbers: Sequence[Numbers],
        betas: tuple[float, float],
        eps: float,
        factor: Tensor | None = None,
    ) -> Callable[[], None]:
        """Return what makes a step, once, before the next one is prepared.

        Args:
            grads: of the parameters; one that is None leaves its parameter and moments.
            numbers: of each parameter.
            betas, eps: of all.
            factor: float32 [], on the device: by which gradients are multiplied; None is 1.

        Raises:
            ValueError, TypeError: a gradient of another shape or dtype.
        """
        from transnormer.ops.adamw import triton_adamw

        # A copy lives until the launch, by the result.
        grads = [None if g is None else g.contiguous() for g in grads]
        for grad, (parameter, _, _) in zip(grads, self._tensors, strict=True):
            if grad is not None:
                _check(grad, parameter)
        read = [0 if g is None else g.data_ptr() for g in grads]
        if read != self._read:
            rows = [
                (p, g, m, v, tensors[0].numel())
                for g, (p, m, v), tensors in zip(read, self._fixed, self._tensors, strict=True)
            ]
            self._table, self._read = self._sent(rows, torch.int64), read
        table, sent = self._table, self._sent(list(numbers), torch.float32)
        scale = self._one if factor is None else factor.to(self._device, torch.float32)

        def step(held: Sequence[Tensor | None] = grads) -> None:
            triton_adamw.step(table, self._tiles, sent, scale, betas, eps)

        return step

    def _sent(self, rows: list[Any], dtype: torch.dtype) -> Tensor:
        """A small table on the device, which nobody waits for."""
        table = torch.tensor(rows, dtype=dtype, pin_memory=self._device.type == "cuda")
        return table.to(self._device, non_blocking=True)


def why_not(device: torch.device) -> str | None:
    """Why tensors of a device cannot be taken; None where they can, Triton's interpreter with them."""
    return why_not_named(device, True)


def _check(x: Tensor, like: Tensor) -> None:
    if x.dtype != torch.float32:
        raise TypeError(f"a tensor is {x.dtype}; expected torch.float32")
    if x.shape != like.shape or x.device != like.device or not x.is_contiguous():
        raise ValueError(
            f"a tensor of shape {list(x.shape)}, strides {x.stride()}, on {x.device}; expected shape "
            f"{list(like.shape)} on {like.device}, contiguous; use contiguous()"
        )
