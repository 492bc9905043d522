"""Gradients of bfloat16 parameters that several passes add up, in float32."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class WideSums:
    """Sums of a model's gradients beside its parameters, which see none while a pass runs.

    Added up in bfloat16, the gradients of 128 passes would be off by a hundredth. ``grad_dtype`` alone
    does not do: torch.compile (2.11) refuses a parameter whose gradient has another dtype.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take the model's trainable bfloat16 parameters."""
        held = (p for p in model.parameters() if p.requires_grad)
        self._parameters = [p for p in held if p.dtype == torch.bfloat16]
        self._sums: dict[Tensor, Tensor] | None = None
        for parameter in self._parameters:
            # Any dtype: a pass leaves bfloat16, the sum is float32.
            parameter.grad_dtype = None
            parameter.register_post_accumulate_grad_hook(self._add)

    def around(self, backward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """What makes a pass and leaves the sums in the parameters' gradients, with those before it."""

        def run(*arguments: Any) -> Tensor:
            self._sums = {p: p.grad for p in self._parameters if p.grad is not None}
            for parameter in self._parameters:
                parameter.grad = None
            try:
                return backward(*arguments)
            finally:
                for parameter in self._parameters:
                    parameter.grad = self._sums.get(parameter)
                self._sums = None

        return run

    def _add(self, parameter: Tensor) -> None:
        """Behind each of a parameter's gradients: into its sum, and gone."""
        if self._sums is None or parameter.grad is None:
            return
        total = self._sums.get(parameter)
        if total is None:
            self._sums[parameter] = parameter.grad.float()
        else:
            total.add_(parameter.grad)
        parameter.grad = None
