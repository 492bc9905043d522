"""AdamW on a GPU whose step is one launch, with the gradient's clipping inside."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transnormer.ops.adamw import ManyTensors, Numbers
from transnormer.optim.rounded_adamw import new_state, noise_seed, state_keys
from transnormer.optim.shares import own_share


class OneLaunchAdamW(torch.optim.Optimizer):
    """AdamW on one GPU, in one launch for each dtype of its parameters (``ops.adamw``).

    torch's fused step of a model of 24 layers is some twenty launches, for which the device waits on the
    host, behind another twenty that scale the gradients. Of float32 parameters and moments the step
    and the state are ``torch.optim.AdamW``'s, its counts of steps on the CPU; of bfloat16 ones those
    of ``RoundedAdamW`` but for its random bits, which are the same in every run: they follow from the
    step, the parameter and the share. Gradients of all parameters of a dtype have one dtype. Of
    parameters that lie on several ranks each updates its share.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        states: torch.dtype = torch.float32,
    ) -> None:
        """As torch.optim.AdamW; ValueError for a group with betas or eps of its own.

        states is the dtype of the moments; beside float32 ones of a bfloat16 parameter lies the rest
        of its float32 weights.
        """
        # Copies keep the defaults alone.
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps}
        defaults |= {"weight_decay": weight_decay, "states": states}
        super().__init__(params, defaults)
        for group in self.param_groups:
            if (group["betas"], group["eps"]) != (betas, eps):
                raise ValueError(
                    f"a group has betas {group['betas']} and eps {group['eps']}; expected {betas} "
                    f"and {eps}, as all have; one launch takes them once"
                )
        self._many: dict[torch.dtype, ManyTensors] = {}

    @property
    def states(self) -> torch.dtype:
        """The dtype of the moments."""
        return self.defaults["states"]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch's; a copy finds its own tensors."""
        super().__setstate__(state)
        self._many = {}

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
        """Return the step that the gradients of now make, a launch a dtype and no more for the host."""
        found: dict[torch.dtype, list[_Parameter]] = {}
        known: dict[tuple[int, int], Numbers] = {}
        pairs = ((p, group) for group in self.param_groups for p in group["params"])
        for number, (parameter, group) in enumerate(pairs, 1):
            state = self._state_of(parameter)
            # Read anew: a run that goes back, or on, writes into the counts.
            count = int(state["step"]) + (parameter.grad is not None)
            key = (id(group), count)
            if key not in known:
                known[key] = _numbers(group, max(count, 1))
            one = _Parameter(parameter, state, number, count, known[key])
            found.setdefault(parameter.dtype, []).append(one)
        launches = [self._prepared(dtype, some, factor) for dtype, some in found.items()]
        moved = [x.state["step"] for some in found.values() for x in some if x.grad is not None]

        def make() -> None:
            for launch in launches:
                launch()
            # Behind the launches: the device is at work.
            if moved:
                with torch.no_grad():
                    torch._foreach_add_(moved, 1.0)

        return make

    def _prepared(
        self, dtype: torch.dtype, some: Sequence["_Parameter"], factor: Tensor | None
    ) -> Callable[[], None]:
        tensors = [x.tensors(self.states) for x in some]
        many = self._many.get(dtype)
        if many is None or not many.are(tensors):
            many = self._many[dtype] = ManyTensors(*map(list, zip(*tensors)))
        first = self.param_groups[0]
        seeds = [noise_seed(x.parameter, x.number, x.count) for x in some] if many.rounds else []
        grads, numbers = [x.grad for x in some], [x.numbers for x in some]
        return many.prepare(grads, numbers, first["betas"], first["eps"], factor, seeds)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state.update(new_state(parameter, self.states))
        return state


class _Parameter(NamedTuple):
    """A parameter with its state, its number from 1, the step it is to make and that step's numbers."""

    parameter: Tensor
    state: dict[str, Tensor]
    number: int
    count: int
    numbers: Numbers

    @property
    def grad(self) -> Tensor | None:
        """This rank's share of the gradient."""
        grad = self.parameter.grad
        return None if grad is None else own_share(grad)

    def tensors(self, states: torch.dtype) -> tuple[Tensor, ...]:
        """This rank's shares: parameter, moments, remainder if there is one."""
        keys = state_keys(self.parameter.dtype, states)[1:]
        return tuple(own_share(x) for x in (self.parameter, *(self.state[key] for key in keys)))


def _numbers(group: dict[str, Any], step: int) -> Numbers:
    (beta1, beta2), lr = group["betas"], group["lr"]
    return Numbers(
        keep=1 - lr * group["weight_decay"],
        rate=lr / (1 - beta1**step),
        correction=1 / (1 - beta2**step),
    )
