"""AdamW on a GPU whose step is one launch, with the gradient's clipping inside."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from transnormer.ops.adamw import ManyTensors, Numbers
from transnormer.optim.shares import own_share


class OneLaunchAdamW(torch.optim.Optimizer):
    """``torch.optim.AdamW`` of float32 parameters on one GPU, in one launch (``ops.adamw``).

    torch's fused step of a model of 24 layers is some twenty launches, for which the device waits on the
    host, behind another twenty that scale the gradients. State has torch's names and dtypes; its
    counts of steps are on the CPU. Of parameters that lie on several ranks each updates its share.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        """As torch.optim.AdamW; ValueError for a group with betas or eps of its own."""
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        for group in self.param_groups:
            if (group["betas"], group["eps"]) != (betas, eps):
                raise ValueError(
                    f"a group has betas {group['betas']} and eps {group['eps']}; expected {betas} "
                    f"and {eps}, as all have; one launch takes them once"
                )
        self._many: ManyTensors | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch's; a copy finds its own tensors."""
        super().__setstate__(state)
        self._many = None

    @torch.no_grad()
    def step(self, closure: None = None, *, factor: Tensor | None = None) -> None:  # pyrefly: ignore[bad-override]
        """Update the parameters that have gradients.

        Args:
            closure: not called.
            factor: float32 [], by which gradients are multiplied first; None is 1.
        """
        self.prepare(factor)()

    @torch.no_grad()
    def prepare(self, factor: Tensor | None = None) -> Callable[[], None]:
        """Return the step that the gradients of now make, a launch and no more for the host."""
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        states = [self._state_of(parameter) for parameter, _ in pairs]
        grads = [None if p.grad is None else own_share(p.grad) for p, _ in pairs]
        # Read anew: a run that goes back, or on, writes into the counts.
        stepped = [
            int(state["step"]) + (grad is not None)
            for state, grad in zip(states, grads, strict=True)
        ]
        known: dict[tuple[int, int], Numbers] = {}
        numbers = []
        for (_, group), count in zip(pairs, stepped, strict=True):
            key = (id(group), count)
            if key not in known:
                known[key] = _numbers(group, max(count, 1))
            numbers.append(known[key])
        tensors = [
            (own_share(p), own_share(state["exp_avg"]), own_share(state["exp_avg_sq"]))
            for (p, _), state in zip(pairs, states, strict=True)
        ]
        if self._many is None or not self._many.are(tensors):
            self._many = ManyTensors(*map(list, zip(*tensors)))
        first = self.param_groups[0]
        launch = self._many.prepare(grads, numbers, first["betas"], first["eps"], factor)

        def make() -> None:
            launch()
            # Behind the launch: the device is at work.
            moved = [x["step"] for x, g in zip(states, grads, strict=True) if g is not None]
            if moved:
                with torch.no_grad():
                    torch._foreach_add_(moved, 1.0)

        return make

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter)
        return state


def _numbers(group: dict[str, Any], step: int) -> Numbers:
    (beta1, beta2), lr = group["betas"], group["lr"]
    return Numbers(
        keep=1 - lr * group["weight_decay"],
        rate=lr / (1 - beta1**step),
        correction=1 / (1 - beta2**step),
    )
