"""Muon for matrices that lie on several processes, a share of each on every one of them."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from transnormer.optim.shares import own_share


class WholeMatrices(Protocol):
    """How processes that hold shares of matrices work on whole ones."""

    def apply(
        self, shares: Mapping[str, Tensor], function: Callable[[Tensor], Tensor]
    ) -> Mapping[str, Tensor]:
        """Call a function with each whole matrix, once among all processes; all of them call this.

        Args:
            shares: what this process holds of matrices of one dtype, by name; overwritten.
            function: whole matrix -> another of its shape and dtype.

        Returns:
            shares of what the function gave, laid out as those that were given.
        """
        ...


class SharedMuon(torch.optim.Optimizer):
    """``torch.optim.Muon`` for shares of matrices (Jordan 2024; Liu et al. 2025, arXiv:2502.16982).

    B = m B + (1 - m) G;  W = (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) NS(m B + (1 - m) G)

    Momentum B is shared out as W is. The Newton-Schulz iteration NS needs the whole matrix: it is
    torch's own, in bfloat16, of the same numbers as in one process, so that updates are the same up
    to the order of sums in G.
    """

    def __init__(
        self,
        named: Mapping[str, Tensor],
        matrices: WholeMatrices,
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
    ) -> None:
        """Take parameters of two dims by name; rates are those of ``torch.optim.Muon``."""
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(list(named.values()), defaults)
        self._matrices, self._names = matrices, {x: name for name, x in named.items()}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient; all processes call it."""
        for group in self.param_groups:
            momentum = group["momentum"]
            updates = {}
            for x in group["params"]:
                if x.grad is None:
                    continue
                state = self.state[x]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(x)
                buffer = own_share(state["momentum_buffer"]).lerp_(own_share(x.grad), 1 - momentum)
                update = torch.empty_like(x)
                torch.lerp(own_share(x.grad), buffer, momentum, out=own_share(update))
                updates[self._names[x]] = update
            found = self._matrices.apply(updates, _step_from_zero)
            for x in group["params"]:
                if x.grad is not None:
                    own = own_share(x).mul_(1 - group["lr"] * group["weight_decay"])
                    own.add_(own_share(found[self._names[x]]), alpha=group["lr"])


def _step_from_zero(update: Tensor) -> Tensor:
    """What torch's Muon makes of a matrix of zeros at a rate of 1: -0.2 sqrt(max) NS(update)."""
    matrix = torch.zeros_like(update)
    matrix.grad = update
    one_step = torch.optim.Muon(
        [matrix],
        lr=1.0,
        weight_decay=0.0,
        momentum=0.0,
        nesterov=False,
        adjust_lr_fn="match_rms_adamw",
    )
    one_step.step()
    return matrix
