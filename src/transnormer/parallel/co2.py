"""Local updates with an outer step whose all-reduce hides under the whole next round: CO2 and kin.

G workers share x_{t,0} at the start of round t. Each makes tau updates of its own; then

    delta_t = x_{t,0} - x^i_{t,tau}, averaged over the workers,
    m_t = beta m_{t-1} + g_t / Lambda_t,         x_{t+1,0} = x_{t,0} - eta clip(m_t, -phi, phi),

where g_t is the mean of delta_t, or, one round late, of delta_{t-1}: its all-reduce is started at the
end of a round and awaited at the end of the next (Sun et al. 2024, arXiv:2401.16265, "CO2"). The
other methods are settings of this one, see ``OuterConfig.of``.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor
from torch.distributed.tensor import DTensor

from transnormer.config import Config

Method = Literal["local", "slowmo", "diloco", "co2", "co2_eager"]


class OuterConfig(Config):
    """The outer step.

    Attributes:
        tau: updates of a round.
        delayed: use the average of the round before, whose all-reduce ran beside this round.
        eager: of a late average, replace one's own stale share by the fresh one (Kale et al. 2025,
            arXiv:2502.12996).
        momentum: beta.
        nesterov: step along beta m + g instead of m.
        lr: eta.
        clip: phi, the largest step of an entry before eta; None never clips.
        penalty: Lambda, by which a late average is divided: "none" is 1; "const" is
            ``penalty_value``; "gap" is 1 + |x_{t,0} - x_{t-1,0}| / (tau gamma sqrt(n)) with the
            first inner rate gamma of the round and n parameters: a form of our own, since the
            paper's equation 3 was not at hand.
        penalty_value: of "const".
    """

    tau: int = Field(ge=1)
    delayed: bool = False
    eager: bool = False
    momentum: float = Field(default=0.0, ge=0.0, lt=1.0)
    nesterov: bool = False
    lr: float = Field(default=1.0, gt=0.0)
    clip: float | None = Field(default=None, gt=0.0)
    penalty: Literal["none", "const", "gap"] = "none"
    penalty_value: float = Field(default=1.0, ge=1.0)

    @classmethod
    def of(cls, method: Method, tau: int) -> "OuterConfig":
        """The published settings of a method.

        "local": local SGD, plain averaging. "slowmo": Wang et al. 2020 (arXiv:1910.00643), momentum
        0.5. "diloco": Douillard et al. 2023 (arXiv:2311.08105), Nesterov 0.9 at rate 0.7. "co2":
        one round late, with penalty and clip. "co2_eager": the same with eager shares.
        """
        late: dict[str, object] = {"delayed": True, "momentum": 0.2, "penalty": "gap", "clip": 1.0}
        settings: dict[Method, dict[str, object]] = {
            "local": {},
            "slowmo": {"momentum": 0.5},
            "diloco": {"momentum": 0.9, "nesterov": True, "lr": 0.7},
            "co2": late,
            "co2_eager": {"delayed": True, "eager": True, "momentum": 0.2},
        }
        return cls.model_validate({"tau": tau, **settings[method]})


def automatic_tau(all_reduce_seconds: float, update_seconds: float) -> int:
    """Updates of a round that hide one all-reduce with a fifth to spare."""
    return max(1, math.ceil(1.2 * all_reduce_seconds / update_seconds))


class OuterSync:
    """The outer step of one worker, over the shares of the parameters that it holds.

    Live parameters are never reduced: their difference from the round's start is copied into a
    buffer of its own. Beside the parameters it keeps the start, the momentum and that buffer
    (eager: also its own last difference), flat, in float32 (float64 for float64 parameters).
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        config: OuterConfig,
        workers: dist.ProcessGroup | None,
        shards: dist.ProcessGroup | None = None,
    ) -> None:
        """Take the parameters as they are for the start of round 0.

        Args:
            parameters: of the model, the same values on all workers; DTensors count with the share
                that this rank holds.
            config: the method.
            workers: ranks that hold the same share, one a worker; None is all processes.
            shards: ranks that share the parameters of one worker; None is this one alone.
        """
        self.config, self._workers, self._shards = config, workers, shards
        self._size = dist.get_world_size(workers)
        self._parameters = [p for p in parameters if p.requires_grad]
        self._start = self._flat()
        self._momentum = torch.zeros_like(self._start)
        self._average: Tensor | None = None
        self._own: Tensor | None = None
        self._work: dist.Work | None = None
        self._updates = 0
        self._first_lr = 0.0
        # Sum of squares of the last outer move, over all shards; and the number of parameters.
        self._moved = 0.0
        self._count = int(self._over_shards(float(self._start.numel())))

    @torch.no_grad()
    def after_update(self, lr: float) -> bool:
        """Count an update of the inner optimizer; make the outer step at the end of a round.

        Args:
            lr: the rate of that update.

        Returns:
            whether an outer step was made.
        """
        if self._updates % self.config.tau == 0:
            self._first_lr = lr
        self._updates += 1
        if self._updates % self.config.tau:
            return False
        own = self._start - self._flat()
        if self.config.delayed:
            found = self._late_average(own)
        else:
            found = own
            dist.all_reduce(found, group=self._workers)
            found /= self._size
        self._step(found)
        return True

    def _late_average(self, own: Tensor) -> Tensor | None:
        """The average of the round before; begins that of this round."""
        self.drain()
        found, stale = self._average, self._own
        if self.config.eager:
            self._own = own.clone()
            if found is None:
                found = torch.zeros_like(own)
            found = found + (own if stale is None else own - stale) / self._size
        self._average = own
        self._work = dist.all_reduce(own, group=self._workers, async_op=True)
        return found

    def drain(self) -> None:
        """Wait for the all-reduce that is under way; its average is kept for the next step."""
        if self._work is not None and self._average is not None:
            self._work.wait()
            self._average /= self._size
        self._work = None

    def _step(self, found: Tensor | None) -> None:
        config = self.config
        if found is not None:
            found = found / self._penalty()
            self._momentum = config.momentum * self._momentum + found
            step = self._momentum
            if config.nesterov:
                step = config.momentum * self._momentum + found
            if config.clip is not None:
                step = step.clamp(-config.clip, config.clip)
            move = config.lr * step
            if config.penalty == "gap":
                self._moved = self._over_shards(float(move.square().sum(dtype=torch.float64)))
            self._start = self._start - move
        self._put(self._start)

    def _penalty(self) -> float:
        if self.config.penalty == "const":
            return self.config.penalty_value
        if self.config.penalty == "none" or self._first_lr == 0.0:
            return 1.0
        scale = self.config.tau * self._first_lr * math.sqrt(self._count)
        return 1.0 + math.sqrt(self._moved) / scale

    def _over_shards(self, value: float) -> float:
        if self._shards is None:
            return value
        total = torch.tensor([value], dtype=torch.float64, device=self._start.device)
        dist.all_reduce(total, group=self._shards)
        return float(total)

    def _locals(self) -> list[Tensor]:
        return [p.to_local() if isinstance(p, DTensor) else p.detach() for p in self._parameters]

    @torch.no_grad()
    def _flat(self) -> Tensor:
        """A copy of this rank's parameters, end to end."""
        parts = [x.reshape(-1) for x in self._locals()]
        wide = torch.float32
        for part in parts:
            wide = torch.promote_types(wide, part.dtype)
        return torch.cat([part.to(wide) for part in parts])

    @torch.no_grad()
    def _put(self, flat: Tensor) -> None:
        parts = self._locals()
        for x, values in zip(parts, flat.split([x.numel() for x in parts]), strict=True):
            x.copy_(values.view_as(x))

    def state_tensors(self) -> dict[str, Tensor]:
        """This rank's state, with what was under way drained; a worker's own, as its parameters
        between two outer steps are."""
        self.drain()
        counts = torch.tensor([self._updates, self._first_lr, self._moved], dtype=torch.float64)
        state = {"start": self._start, "momentum": self._momentum, "counts": counts}
        if self._average is not None:
            state["average"] = self._average
        if self._own is not None:
            state["own"] = self._own
        return {name: x.clone() for name, x in state.items()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what ``state_tensors`` returned on this rank; parameters are not touched.

        Raises:
            ValueError: the state of another share of parameters.
        """
        if tensors["start"].shape != self._start.shape:
            raise ValueError(
                f"start has {tensors['start'].numel()} entries; expected {self._start.numel()}, "
                "those that this rank holds; go on in the layout of the checkpoint"
            )
        device = self._start.device
        self._work = None
        self._start = tensors["start"].to(device, copy=True)
        self._momentum = tensors["momentum"].to(device, copy=True)
        average, own = tensors.get("average"), tensors.get("own")
        self._average = None if average is None else average.to(device, copy=True)
        self._own = None if own is None else own.to(device, copy=True)
        updates, self._first_lr, self._moved = tensors["counts"].tolist()
        self._updates = int(updates)
