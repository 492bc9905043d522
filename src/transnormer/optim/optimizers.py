"""Optimizers: AdamW with decoupled decay on matrices only, and Muon for the blocks' matrices."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from transnormer.ops.adamw import why_not
from transnormer.optim.one_launch_adamw import OneLaunchAdamW
from transnormer.optim.rounded_adamw import RoundedAdamW, new_state, state_keys
from transnormer.optim.schedules import ScheduleConfig, lr_factor
from transnormer.optim.shared_muon import SharedMuon, WholeMatrices
from transnormer.optim.shares import own_share


class OptimizerConfig(ScheduleConfig):
    """An optimizer with its schedule; every rate is the peak rate."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(default=3e-4, gt=0, allow_inf_nan=False)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0, allow_inf_nan=False)
    # adamw only: of its moments. bfloat16 halves them, rounded stochastically.
    states: Literal["float32", "bfloat16"] = "float32"
    weight_decay: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    # Largest global norm of the gradient; larger ones are scaled down to it. 0 never clips.
    clip: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    # adamw only: the width at which lr was tuned; rates and initial values of another width follow
    # from it (models/width.py). None takes lr as it is.
    base_dim: int | None = Field(default=None, ge=1)
    # muon only: momentum of the blocks' matrices. Their updates are scaled to AdamW's size, so
    # that one rate serves both.
    momentum: float = Field(default=0.95, ge=0, lt=1)

    @field_validator("betas")
    @classmethod
    def _check_betas(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas is {list(betas)}; expected two numbers in [0, 1)")
        return betas

    @model_validator(mode="after")
    def _check_name(self) -> "OptimizerConfig":
        if self.name == "muon" and self.states != "float32":
            raise ValueError(
                f"states is {self.states!r}; expected 'float32' for name = 'muon', whose momentum "
                "is orthogonalised; leave it out"
            )
        if self.name == "muon" and self.base_dim is not None:
            raise ValueError(
                f"base_dim is {self.base_dim}; expected it unset for name = 'muon', whose updates "
                "have a size of their own; leave it out"
            )
        return self

    def lr_at(self, step: int, steps: int) -> float:
        """Return the learning rate of update number `step` (from 0) of `steps`."""
        return self.lr * lr_factor(self, step, steps)


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Return whether weight decay applies: a `weight` of two dims.

    Those are the projections, the token embedding and the output head (they are one tensor when
    tied). Biases, norm weights, rotation angles and learned bounds are not shrunk towards zero:
    zero means nothing special for them.
    """
    return parameter.ndim == 2 and name.rsplit(".", 1)[-1] == "weight"


def clip_factor(most: float, norm: Tensor) -> Tensor:
    """What scales gradients, whose norm is given, [], to a norm of at most ``most``, as torch does."""
    return (most / (norm + 1e-6)).clamp(max=1.0)


def gradient_norm(grads: Iterable[Tensor]) -> Tensor:
    """Norm of plain tensors of one device together, [], summed in float32 or better.

    torch's get_total_norm gives a norm of bfloat16 gradients in their own three digits.
    """
    found: dict[torch.dtype, list[Tensor]] = {}
    for grad in grads:
        found.setdefault(grad.dtype, []).append(grad)
    if not found:
        return torch.zeros(())
    widest = torch.float32
    for dtype in found:
        widest = torch.promote_types(widest, dtype)
    norms = [x for some in found.values() for x in torch._foreach_norm(some, 2.0, dtype=widest)]
    return torch.linalg.vector_norm(torch.stack(norms))


class Optimizer:
    """One or two torch optimizers that act as one, with state kept under parameter names."""

    def __init__(self, parts: Iterable[torch.optim.Optimizer], names: Mapping[Tensor, str]) -> None:
        self._parts = tuple(parts)
        self._names = dict(names)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every group, times its own scale."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)

    def prepare(self, factor: Tensor | None = None) -> Callable[[], None]:
        """Return what updates the parameters from the gradients that they have now.

        What the host can do ahead it does here, zeros for states that are missing with it; no value
        has changed until the result is called, and none has where it is not.

        Args:
            factor: by which all gradients are multiplied first, [], see ``clip_factor``; None is 1.
        """
        steps = [
            part.prepare(factor)
            if isinstance(part, OneLaunchAdamW)
            else partial(_step, part, factor)
            for part in self._parts
        ]

        def make() -> None:
            for step in steps:
                step()

        return make

    def step(self, factor: Tensor | None = None) -> None:
        """Update the parameters from their gradients; see ``prepare``."""
        self.prepare(factor)()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def groups(self) -> list[dict[str, object]]:
        """Return the parameter groups as names with their weight decay, for reports and tests."""
        return [
            {
                "optimizer": type(part).__name__.lower(),
                "weight_decay": group["weight_decay"],
                "names": [self._names[parameter] for parameter in group["params"]],
            }
            for part in self._parts
            for group in part.param_groups
        ]

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the whole state, as "parameter name/key" -> tensor.

        Before a step is prepared it is that of split weights, which have a rest. The tensors are the
        live ones: copy what must outlast the next step.
        """
        # In the order of the parameters: that of groups depends on how they lie on ranks.
        return {
            f"{name}/{key}": value
            for parameter, name in self._names.items()
            for part in self._parts
            if parameter in part.state
            for key, value in part.state[parameter].items()
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what state_tensors returned; ValueError where it belongs to another model."""
        states: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            owner, _, key = name.rpartition("/")
            states.setdefault(owner, {})[key] = value
        for part in self._parts:
            keys: set[str] = set()
            fused = bool(part.defaults.get("fused"))
            for group in part.param_groups:
                for parameter in group["params"]:
                    name = self._names[parameter]
                    state = states.pop(name, {})
                    if isinstance(part, RoundedAdamW | OneLaunchAdamW):
                        keys = set(state_keys(parameter.dtype, part.states))
                    if keys and state and set(state) != keys:
                        raise ValueError(
                            f"optimizer state of {name} is {sorted(state)}; "
                            f"expected {sorted(keys)}; take another checkpoint"
                        )
                    keys = keys or set(state)
                    part.state[parameter] = {
                        key: _fit(f"{name}/{key}", value, parameter, beside=fused)
                        for key, value in state.items()
                    }
        if states:
            raise ValueError(
                f"optimizer state has {min(states)}; expected only parameters of this model; "
                "use the checkpoint's own configuration"
            )


def _step(part: torch.optim.Optimizer, factor: Tensor | None) -> None:
    if isinstance(part, RoundedAdamW):
        part.step(factor=factor)
        return
    if factor is not None:
        held = (p.grad for group in part.param_groups for p in group["params"])
        grads = [own_share(grad) for grad in held if grad is not None]
        if grads:
            torch._foreach_mul_(grads, factor)
    part.step()


def _fit(key: str, value: Tensor, parameter: Tensor, *, beside: bool) -> Tensor:
    if value.ndim == 0:
        # Step counters: fused updates want them beside the parameter, the others on the CPU.
        return value.to(parameter.device if beside and parameter.is_cuda else "cpu", copy=True)
    if value.shape != parameter.shape:
        raise ValueError(
            f"optimizer state {key} has shape {list(value.shape)}; "
            f"expected {list(parameter.shape)}; use the checkpoint's own configuration"
        )
    return value.to(parameter.device, copy=True)


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    lr_scales: Mapping[str, float] | None = None,
    *,
    compile_backend: str | None = None,
    matrices: WholeMatrices | None = None,
) -> Optimizer:
    """Build the optimizer of a model's trainable parameters.

    adamw: Loshchilov and Hutter 2017 (arXiv:1711.05101); decay on matrices only, see is_matrix.
    muon: torch.optim.Muon (Jordan 2024) for the matrices inside `blocks`, AdamW for the rest. Its
    updates are scaled by 0.2 sqrt(max(rows, columns)) (Liu et al. 2025, arXiv:2502.16982). Each
    matrix is orthogonalised as it is stored: q, k, v and gate, which are one, together.

    lr_scales multiplies the rate of AdamW's parameters by name; their weight decay a step, rate
    times weight_decay, does not change. bfloat16 parameters with float32 states are the upper half
    of float32 weights (``split_weights``). AdamW on one GPU is ``OneLaunchAdamW``; elsewhere it is
    torch's own fused one, or ``RoundedAdamW`` where anything is bfloat16, which compile_backend
    compiles. matrices is how muon
    works on matrices that lie on several processes; None has them here.
    """
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if not named:
        raise ValueError("model has 0 trainable parameters; expected at least one")
    names: dict[Tensor, str] = {value: name for name, value in named.items()}
    rest = dict(named)
    parts: list[torch.optim.Optimizer] = []
    if config.name == "muon":
        blocks = {
            name: rest.pop(name)
            for name, value in named.items()
            if is_matrix(name, value) and "blocks." in name
        }
        if not blocks:
            raise ValueError("optimizer.name is 'muon'; expected a model with matrices in blocks")
        parts.append(_muon(blocks, config, matrices))
    if rest:
        parts.append(_adamw(rest, config, lr_scales or {}, compile_backend))
    return Optimizer(parts, names)


def _adamw(
    named: Mapping[str, Tensor],
    config: OptimizerConfig,
    lr_scales: Mapping[str, float],
    compile_backend: str | None,
) -> torch.optim.Optimizer:
    # By decay, scale and the ranks that share them, which a fused update cannot mix; matrices first.
    found: dict[tuple[float, float, object], list[Tensor]] = {}
    for wanted in (True, False):
        for name, value in named.items():
            if is_matrix(name, value) is wanted:
                scale = lr_scales.get(name, 1.0)
                decay = config.weight_decay / scale if wanted else 0.0
                ranks = getattr(value, "device_mesh", None)
                found.setdefault((decay, scale, ranks), []).append(value)
    groups = [
        {"params": params, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale, _), params in found.items()
    ]
    rates = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": 0.0}
    states = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.states]
    dtypes = {x.dtype for x in named.values()}
    first = next(iter(named.values())).device
    on_one_gpu = first.type == "cuda" and all(x.device == first for x in named.values())
    made: OneLaunchAdamW | RoundedAdamW
    if on_one_gpu and why_not(first) is None and dtypes <= {torch.float32, torch.bfloat16}:
        made = OneLaunchAdamW(groups, states=states, **rates)
    elif torch.bfloat16 in {states, *dtypes}:
        made = RoundedAdamW(groups, states=states, compile_backend=compile_backend, **rates)
    else:
        fused = all(value.device.type in ("cpu", "cuda") for value in named.values())
        return torch.optim.AdamW(groups, fused=fused, **rates)
    for value in named.values():
        if "remainder" in state_keys(value.dtype, states):
            # A part of the weights, which is saved, and goes back with them, from the beginning.
            made.state[value] = new_state(value, states)
    return made


def _muon(
    named: Mapping[str, Tensor], config: OptimizerConfig, matrices: WholeMatrices | None
) -> torch.optim.Optimizer:
    rates = {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "momentum": config.momentum,
    }
    if matrices is not None:
        return SharedMuon(named, matrices, **rates)
    return torch.optim.Muon(list(named.values()), adjust_lr_fn="match_rms_adamw", **rates)
