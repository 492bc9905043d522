"""Loss spikes: noticed by a robust z-score, answered by a skipped update or a rollback."""

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from transnormer.config import Config
from transnormer.models.random_state import random_state, set_random_state
from transnormer.optim import Optimizer
from transnormer.train.divergence import TrainingDiverged, check_finite

# Of a normal distribution, the standard deviation over the median absolute deviation.
_DEVIATIONS = 1.4826
# The least deviation, as a share of the median: a loss that stands still has a tiny one.
_LEAST = 1e-3
_OPTIMIZER, _MODEL, _RANDOM = "optimizer/", "model/", "random/"


class GuardConfig(Config):
    """What is done about a step whose loss or gradient is far above those before it.

    x is a spike where (x - median) / (1.4826 MAD) exceeds the threshold, over the last `window`
    steps that were none (Iglewicz and Hoaglin 1993, modified z-score), or where x is not finite.
    Nothing is judged until the window is half full.

    Attributes:
        action: "off"; "skip" drops the step's update; "rollback" goes back to the last snapshot and
            on with the data behind the spike (as Chowdhery et al. 2022, arXiv:2204.02311, 5.1, did
            by hand).
        window: steps of the median.
        threshold: in robust standard deviations; only upwards.
        snapshot_every: steps between snapshots, kept in the memory of the CPU (weights, optimizer,
            random numbers); every scheduled checkpoint is one too.
        most: actions in a row, without an update between that counts, before the run gives up.
    """

    action: Literal["off", "skip", "rollback"] = "off"
    window: int = Field(default=128, ge=8)
    threshold: float = Field(default=8.0, gt=0, allow_inf_nan=False)
    snapshot_every: int = Field(default=100, ge=1)
    most: int = Field(default=5, ge=1)


class Snapshot(NamedTuple):
    """A run at a step, in the memory of the CPU.

    Attributes:
        step, tokens: of the run's counters.
        tensors: weights, optimizer and random state, and the guard's window, by name; of weights
            and optimizer what this process holds.
    """

    step: int
    tokens: int
    tensors: dict[str, Tensor]


class Guard:
    """Judges steps, and holds what is needed to go back."""

    def __init__(self, config: GuardConfig, run_dir: Path) -> None:
        self.config, self._run_dir = config, run_dir
        self._losses: deque[float] = deque(maxlen=config.window)
        self._norms: deque[float] = deque(maxlen=config.window)
        self._in_a_row = 0
        self.snapshot: Snapshot | None = None

    @property
    def rolls_back(self) -> bool:
        """Whether a spike sends the run back."""
        return self.config.action == "rollback"

    def judge(self, loss: float, norm: float, step: int) -> str | None:
        """Say why a step is a spike; None, and into the window with it, where it is none.

        Args:
            loss: of the step.
            norm: of its gradient.
            step: its number, from 1.

        Raises:
            TrainingDiverged: a value is not finite and the guard is off, or too many actions
                followed each other.
        """
        values = {"loss": loss, "grad_norm": norm}
        if self.config.action == "off":
            check_finite(values, step, self._run_dir)
            return None
        reason = self._reason("loss", loss, self._losses) or self._reason(
            "grad_norm", norm, self._norms
        )
        if reason is None:
            self._losses.append(loss)
            self._norms.append(norm)
            if not self.rolls_back:
                self._in_a_row = 0
            return None
        self._in_a_row += 1
        if self._in_a_row > self.config.most:
            check_finite(values, step, self._run_dir)
            raise TrainingDiverged(
                f"{reason} at step {step}, after {self.config.most} actions of the guard in a row; "
                "expected an end of the spikes; lower optimizer.lr, or raise guard.threshold where "
                "the new level is right"
            )
        return reason

    def _reason(self, name: str, value: float, past: deque[float]) -> str | None:
        if not math.isfinite(value):
            return f"{name} is {value}"
        if len(past) < self.config.window // 2:
            return None
        score = robust_score(value, past)
        if score <= self.config.threshold:
            return None
        return f"{name} is {value:.6g}, {score:.3g} robust deviations above its median"

    def due(self, step: int) -> bool:
        """Whether a snapshot belongs at this step."""
        return self.rolls_back and step % self.config.snapshot_every == 0

    def take(self, step: int, tokens: int, model: nn.Module, optimizer: Optimizer) -> None:
        """Keep a snapshot instead of the one before, where the guard rolls back."""
        if not self.rolls_back:
            return
        if self.snapshot is not None:
            if self.snapshot.step == step:
                return
            # What lies behind the last one was reached: the row of rollbacks to it is over.
            self._in_a_row = 0
        parts: dict[str, Mapping[str, Tensor]] = {
            _MODEL: model.state_dict(),
            _OPTIMIZER: optimizer.state_tensors(),
            _RANDOM: random_state(),
            "": self._window(),
        }
        tensors = {
            prefix + name: _own(x).to("cpu", copy=True)
            for prefix, part in parts.items()
            for name, x in part.items()
        }
        self.snapshot = Snapshot(step, tokens, tensors)

    @torch.no_grad()
    def roll_back(self, model: nn.Module, optimizer: Optimizer) -> Snapshot:
        """Put the snapshot's weights, optimizer, random state and window back; return it."""
        assert self.snapshot is not None
        kept = self.snapshot.tensors
        # Into the tensors that are there, where compiled graphs and optimizers know them.
        for name, x in model.state_dict().items():
            _own(x).copy_(kept[_MODEL + name])
        states = optimizer.state_tensors()
        if not _part(kept, _OPTIMIZER):
            optimizer.load_state_tensors({})
            states = {}
        for name, x in states.items():
            _own(x).copy_(kept[_OPTIMIZER + name])
        set_random_state(_part(kept, _RANDOM))
        self._set_window(kept)
        return self.snapshot

    def state_tensors(self, step: int) -> dict[str, Tensor] | None:
        """What a checkpoint of this step keeps: the window, and a snapshot of another step.

        None where the guard is off.
        """
        if self.config.action == "off":
            return None
        now = {f"now/{name}": x for name, x in self._window().items()}
        now["now/in_a_row"] = torch.tensor(self._in_a_row)
        if self.snapshot is None or self.snapshot.step == step:
            return now
        counts = torch.tensor([self.snapshot.step, self.snapshot.tokens])
        return {**self.snapshot.tensors, **now, "now/snapshot": counts}

    def load_state_tensors(self, tensors: Mapping[str, Tensor], *, alone: bool = True) -> None:
        """Restore what state_tensors returned; without a snapshot in it the next one is taken.

        A snapshot is of a process that holds the whole model; unless this one is alone, it is left.
        """
        now = _part(tensors, "now/")
        self._set_window(now)
        self._in_a_row = int(now["in_a_row"])
        if alone and "snapshot" in now:
            step, tokens = now["snapshot"].tolist()
            kept = {name: x for name, x in tensors.items() if not name.startswith("now/")}
            self.snapshot = Snapshot(step, tokens, kept)

    def _window(self) -> dict[str, Tensor]:
        return {
            "losses": torch.tensor(list(self._losses), dtype=torch.float64),
            "norms": torch.tensor(list(self._norms), dtype=torch.float64),
        }

    def _set_window(self, tensors: Mapping[str, Tensor]) -> None:
        for values, name in ((self._losses, "losses"), (self._norms, "norms")):
            values.clear()
            values.extend(tensors[name].tolist())


def robust_score(value: float, past: deque[float]) -> float:
    """(value - median) / (1.4826 MAD) of the past, whose MAD is at least a share of the median."""
    middle = statistics.median(past)
    spread = statistics.median(abs(x - middle) for x in past)
    return (value - middle) / max(_DEVIATIONS * spread, _LEAST * abs(middle), 1e-30)


def _own(x: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    local: Callable[[], Tensor] | None = getattr(x, "to_local", None)
    return x.detach() if local is None else local().detach()


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: x for name, x in tensors.items() if name.startswith(prefix)}
