"""AdamW of bfloat16 parameters, moments or both."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from transnormer.optim.shares import own_share
from transnormer.optim.split_weights import joined, split, take_remainder

# The bits of a float32 that a bfloat16 does not have.
_LOW_BITS = 16


def round_stochastically(x: Tensor) -> Tensor:
    """Round float32 to bfloat16, up or down at random with x as the mean.

    To the nearest a moment stands still once its steps are below half a last place (2^-9 of it, at
    beta_2 = 0.999 every step), and so does a parameter whose updates are; at random they move on
    average as they should (Zamirai et al. 2020, arXiv:2010.06192). The random numbers are torch's,
    so a run that restores its random state repeats them. NaN stays NaN.
    """
    noise = torch.randint(0, 1 << _LOW_BITS, x.shape, dtype=torch.int32, device=x.device)
    bits = x.contiguous().view(torch.int32) + noise
    rounded = (bits & -(1 << _LOW_BITS)).view(torch.float32)
    # Noise carries a NaN's bits over: all ones, which GPUs answer, would become a zero.
    return torch.where(x.isnan(), x, rounded).to(torch.bfloat16)


def _update(
    parameter: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    remainder: Tensor | None,
    keep: Tensor,
    rate: Tensor,
    correction: Tensor,
    factor: Tensor | None,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step of one tensor and its moments, in place.

    keep is 1 - lr decay, rate is lr / (1 - beta_1^t), correction 1 / (1 - beta_2^t), all on the CPU,
    factor what gradients are multiplied by: float32 [], since a compiled graph takes another number
    for another graph.
    """
    beta1, beta2 = betas
    grad = grad.float()
    if factor is not None:
        grad = grad * factor
    first = exp_avg.float().lerp(grad, 1 - beta1)
    second = (exp_avg_sq.float() * beta2).addcmul_(grad, grad, value=1 - beta2)
    _keep(exp_avg, first)
    _keep(exp_avg_sq, second)
    value = (parameter.float() if remainder is None else joined(parameter, remainder)) * keep
    value -= first.div_(second.mul_(correction).sqrt_().add_(eps)).mul_(rate)
    if remainder is None:
        _keep(parameter, value)
        return
    for x, half in zip((parameter, remainder), split(value), strict=True):
        x.copy_(half)


def _keep(x: Tensor, value: Tensor) -> None:
    """Write float32 into x, rounded stochastically where that is bfloat16."""
    x.copy_(round_stochastically(value) if x.dtype == torch.bfloat16 else value)


def _flat(x: Tensor) -> Tensor:
    """The same memory as one dim, and no view, whose base the compiler would look at."""
    if not x.is_contiguous():
        raise ValueError(
            f"a parameter has strides {x.stride()}; expected a contiguous one for a compiled step; "
            "use parameter.contiguous()"
        )
    storage, offset, size = x.untyped_storage(), x.storage_offset(), (x.numel(),)
    return x.new_empty(0).set_(storage, offset, size)  # pyrefly: ignore[no-matching-overload]


def noise_seed(parameter: Any, number: int, step: int) -> int:
    """A seed for the random bits of one parameter's step, the same wherever the same share lies.

    Args:
        parameter: of any layout.
        number: of the parameter in the optimizer, from 1.
        step: of the parameter, from 1.
    """
    share = 0
    if hasattr(parameter, "placements"):
        mesh = parameter.device_mesh
        for size, place, how in zip(mesh.shape, mesh.get_coordinate(), parameter.placements):
            if not how.is_replicate():
                share = share * size + place
    return (step << 40) + (number << 20) + share


@contextmanager
def noise_of_share(parameter: Any, number: int, step: int) -> Iterator[None]:
    """Draw the same numbers on all ranks that hold the same share of a parameter.

    Rounded by numbers of their own, ranks with the same values would drift apart. The random state
    is left as it was.
    """
    if not hasattr(parameter, "placements"):
        yield
        return
    device, seed = own_share(parameter).device, noise_seed(parameter, number, step)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)
        yield


def state_keys(dtype: torch.dtype, states: torch.dtype) -> tuple[str, ...]:
    """What the state of a parameter of a dtype holds beside moments of another.

    "step" is on the CPU: it decides numbers of the host, and reading it must not wait. float32 moments
    of a bfloat16 parameter have "remainder" beside them, int16: what it rounds away of float32 weights.
    """
    keys = ("step", "exp_avg", "exp_avg_sq")
    return (*keys, "remainder") if (dtype, states) == (torch.bfloat16, torch.float32) else keys


def new_state(parameter: Tensor, states: torch.dtype) -> dict[str, Tensor]:
    """The state of a parameter before its first step; see ``state_keys``."""
    made = {"step": torch.zeros((), dtype=torch.float32)}
    for key in state_keys(parameter.dtype, states)[1:]:
        dtype = torch.int16 if key == "remainder" else states
        made[key] = torch.zeros_like(parameter, dtype=dtype)
    low = take_remainder(parameter)
    if low is not None and "remainder" in made:
        made["remainder"] = low
    return made


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) of what is kept in bfloat16.

    m = beta_1 m + (1 - beta_1) g;  v = beta_2 v + (1 - beta_2) g^2;
    p = p (1 - lr decay) - lr (m / (1 - beta_1^t)) / (sqrt(v / (1 - beta_2^t)) + eps)

    in float32. bfloat16 moments are rounded stochastically behind the step, and so are bfloat16
    parameters beside them. With float32 moments a bfloat16 parameter is the upper half of float32
    weights, whose rest is in the state (``split_weights``). One tensor at a time: what a step allocates
    is a few float32 copies of the largest; compiled, it is one pass without any. Of parameters that
    lie on several ranks each updates its share.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        states: torch.dtype = torch.bfloat16,
        compile_backend: str | None = None,
    ) -> None:
        """As torch.optim.AdamW; TypeError for parameters of another dtype.

        states is the dtype of the moments, bfloat16 or float32. compile_backend lets torch.compile make
        the graph of a step, for tensors of any size.
        """
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps}
        defaults |= {"weight_decay": weight_decay, "states": states}
        super().__init__(params, defaults)
        self._update, self._compiled = _update, compile_backend is not None
        if compile_backend is not None:
            self._update = torch.compile(
                _update, fullgraph=True, dynamic=True, backend=compile_backend
            )
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dtype not in (torch.float32, torch.bfloat16):
                    raise TypeError(
                        f"a parameter is {parameter.dtype}; expected float32 or bfloat16, which "
                        "are what a step keeps its numbers in; cast the model"
                    )

    @property
    def states(self) -> torch.dtype:
        """The dtype of the moments."""
        return self.defaults["states"]

    @torch.no_grad()
    def step(self, closure: None = None, *, factor: Tensor | None = None) -> None:  # pyrefly: ignore[bad-override]
        """Update the parameters that have gradients.

        Args:
            closure: not called.
            factor: float32 [], by which gradients are multiplied first, in float32; None is 1.
        """
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group, number, factor)

    def _step(
        self,
        parameter: Tensor,
        grad: Tensor,
        group: dict[str, Any],
        number: int,
        factor: Tensor | None,
    ) -> None:
        state, (beta1, beta2), lr = self.state[parameter], group["betas"], group["lr"]
        if not state:
            state.update(new_state(parameter, self.states))
        state["step"] += 1
        step = int(state["step"])
        numbers = (1 - lr * group["weight_decay"], lr / (1 - beta1**step), 1 / (1 - beta2**step))
        keys = state_keys(parameter.dtype, self.states)[1:]
        held = (parameter, grad.contiguous(), *(state[key] for key in keys))
        shares = [own_share(x) for x in held]
        if not shares[0].numel():
            # Fewer rows than ranks.
            return
        if self._compiled:
            shares = [_flat(x) for x in shares]
        own, change, exp_avg, exp_avg_sq, *remainder = shares
        with noise_of_share(parameter, number, step):
            self._update(
                own,
                change,
                exp_avg,
                exp_avg_sq,
                remainder[0] if remainder else None,
                *(torch.tensor(value, dtype=torch.float32) for value in numbers),
                factor=None if factor is None else factor.float(),
                betas=(beta1, beta2),
                eps=group["eps"],
            )
