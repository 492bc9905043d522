"""Local updates with an outer step whose all-reduce hides under the whole next round: CO2 and kin.

G workers share x_{t,0} at the start of round t. Each makes tau updates of its own; then

    delta_t = x_{t,0} - x^i_{t,tau}, averaged over the workers,
    m_t = beta m_{t-1} + g_t / Lambda_t,         x_{t+1,0} = x_{t,0} - eta clip(m_t, -phi, phi),

where g_t is the mean of delta_t, or, one round late, of delta_{t-1}: its all-reduce is started at the
end of a round and awaited at the end of the next (Sun et al. 2024, arXiv:2401.16265, "CO2"). The
other methods are settings of this one, see ``OuterConfig.of``.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from transnormer.optim.rounded_adamw import noise_of_share, round_stochastically
from transnormer.parallel.outer_config import OuterConfig, OuterReport

# Room that an all-reduce has in a round, and the largest part of a round that others may cost.
_ROOM, _PART = 1.2, 0.03
# Entries whose squares are summed at a time: what is made of them stays in a GPU's cache.
_SQUARED = 1 << 22


def automatic_tau(
    all_reduce_seconds: float, update_seconds: float, round_seconds: float = 0.0
) -> int:
    """Updates of a round that hide one all-reduce, and let the rest of its costs be a small part.

    tau >= 1.2 a / u hides an all-reduce of a seconds behind updates of u; with

        tau >= (1 - p) c / (p u),   p = 0.03,

    what else a round costs, c seconds however long it is, is at most p of tau u + c.

    Args:
        all_reduce_seconds: a.
        update_seconds: u, of an update with nothing beside it.
        round_seconds: c, the outer step and what the all-reduce costs the updates beside it.
    """
    hidden = _ROOM * all_reduce_seconds / update_seconds
    small = (1.0 - _PART) * round_seconds / (_PART * update_seconds)
    return max(1, math.ceil(hidden), math.ceil(small))


class OuterSync:
    """The outer step of one worker, over the shares of the parameters that it holds.

    Live parameters are never reduced: their difference from the round's start is copied into a
    buffer of its own. Beside the parameters it keeps the start, the momentum and that buffer
    (eager: also its own last difference), flat, in float32 (float64 for float64 parameters).

    Attributes:
        config: the method.
        tau: updates of a round, the one that runs included; may be set between updates.
        round: outer steps made.
        updates: made since the last of them.
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
            workers: ranks that hold the same share, one a worker; None is all processes. Nothing
                else should be sent in it: what is would wait for the all-reduce under way.
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
        self.tau, self.round, self.updates = config.tau, 0, 0
        self._first_lr = 0.0
        ranks = 1 if shards is None else dist.get_world_size(shards)
        # How much an entry of each parameter counts in a sum over the shards: what several of them
        # hold counts once.
        self._weights = [_pieces(p) / ranks for p in self._parameters]
        # Sum of squares of the last outer move, over all shards, on the device: read when it is used,
        # a round later. And the number of parameters.
        self._moved = self._number(0.0)
        sizes = [x.numel() for x in self._locals()]
        own = sum(n * weight for n, weight in zip(sizes, self._weights, strict=True))
        self._count = round(float(self._over_shards(self._number(own))))

    @torch.no_grad()
    def after_update(self, lr: float) -> OuterReport | None:
        """Count an update of the inner optimizer; make the outer step at the end of a round.

        Args:
            lr: the rate of that update.

        Returns:
            the outer step, where one was made.
        """
        if self.updates == 0:
            self._first_lr = lr
        self.updates += 1
        if self.updates < self.tau:
            return None
        own = self._flat()
        torch.sub(self._start, own, out=own)
        if self.config.delayed:
            exposed, found = self.is_reducing, self._late_average(own)
        else:
            exposed, found = True, own
            dist.all_reduce(found, group=self._workers)
            found /= self._size
        penalty = self._penalty()
        if found is not None:
            self._step(found, penalty)
        self._begin_round()
        self.round, self.updates = self.round + 1, 0
        return OuterReport(self.round, self.tau, penalty if self.config.delayed else None, exposed)

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

    @property
    def is_reducing(self) -> bool:
        """Whether an all-reduce is still under way."""
        return self._work is not None and not self._work.is_completed()

    def drain(self) -> None:
        """Wait for the all-reduce that is under way; its average is kept for the next step."""
        if self._work is not None and self._average is not None:
            self._work.wait()
            self._average /= self._size
        self._work = None

    def _step(self, found: Tensor, penalty: float) -> None:
        """Make the outer step of an average, whose memory is used up."""
        config = self.config
        if penalty != 1.0:
            found /= penalty
        self._momentum.mul_(config.momentum).add_(found)
        if config.nesterov:
            found += config.momentum * self._momentum
        move = self._clipped(found if config.nesterov else self._momentum, out=found)
        if config.lr != 1.0:
            move = torch.mul(move, config.lr, out=found)
        if config.penalty == "gap":
            self._moved = self._over_shards(self._square(move))
        self._start -= move

    def _clipped(self, step: Tensor, out: Tensor) -> Tensor:
        """The step, clipped into other memory where it is clipped at all."""
        clip = self.config.clip
        return step if clip is None else torch.clamp(step, -clip, clip, out=out)

    def _penalty(self) -> float:
        if self.config.penalty == "const":
            return self.config.penalty_value
        if self.config.penalty == "none" or self._first_lr == 0.0:
            return 1.0
        scale = self.tau * self._first_lr * math.sqrt(self._count)
        return 1.0 + math.sqrt(float(self._moved)) / scale

    def _square(self, x: Tensor) -> Tensor:
        """This rank's part of the sum of squares over all shards, in float64 []."""
        whole = all(weight == 1.0 for weight in self._weights)
        sizes = [x.numel()] if whole else [p.numel() for p in self._locals()]
        weights = [1.0] if whole else self._weights
        total = self._number(0.0)
        for part, weight in zip(x.split(sizes), weights, strict=True):
            for some in part.split(_SQUARED):
                total += weight * some.square().sum(dtype=torch.float64)
        return total

    def _over_shards(self, value: Tensor) -> Tensor:
        if self._shards is not None:
            dist.all_reduce(value, group=self._shards)
        return value

    def _number(self, value: float) -> Tensor:
        """A float64 [] tensor beside the parameters."""
        return torch.tensor(value, dtype=torch.float64, device=self._start.device)

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
        for x, values in self._beside(flat):
            x.copy_(values)

    @torch.no_grad()
    def _begin_round(self) -> None:
        """Let the parameters be the start of the next round.

        bfloat16 ones are rounded at random: to the nearest, a move of less than half a last place
        would be lost again in every round.
        """
        for number, (x, values) in enumerate(self._beside(self._start)):
            if x.dtype == torch.bfloat16:
                with noise_of_share(self._parameters[number], number, self.round):
                    values = round_stochastically(values)
            x.copy_(values)

    def _beside(self, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's parameters, each with its part of what lies end to end."""
        parts = self._locals()
        for x, values in zip(parts, flat.split([x.numel() for x in parts]), strict=True):
            yield x, values.view_as(x)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the parameters be where the workers would meet now, and afterwards what they were.

        That is their mean, less the step of a late average that none has made yet:
        mean x^i - eta clip(delta / Lambda, -phi, phi), of eager workers with the (G - 1) / G of delta
        that is not their own. The momentum rests.
        """
        own = self._flat()
        mean = own.clone()
        dist.all_reduce(mean, group=self._workers)
        mean /= self._size
        self.drain()
        if self._average is not None:
            left = 1.0 - 1.0 / self._size if self.config.eager else 1.0
            step = self._average * left / self._penalty()
            mean -= self._clipped(step, out=step) * self.config.lr
        self._put(mean)
        del mean
        try:
            yield
        finally:
            self._put(own)

    def all_reduce_seconds(self) -> float:
        """How long one all-reduce of what this rank holds takes now, the better of two."""
        buffer, found = torch.zeros_like(self._start), math.inf
        self.drain()
        for _ in range(2):
            # All begin together.
            dist.all_reduce(buffer[:1], group=self._workers)
            self.finish()
            began = time.perf_counter()
            dist.all_reduce(buffer, group=self._workers)
            self.finish()
            found = min(found, time.perf_counter() - began)
        return found

    def finish(self) -> None:
        """Wait until the device has done what it was given; not for an all-reduce beside it."""
        if self._start.is_cuda:
            torch.cuda.current_stream(self._start.device).synchronize()

    def state_tensors(self) -> dict[str, Tensor]:
        """This rank's state, with what was under way drained; a worker's own, as its parameters
        between two outer steps are."""
        self.drain()
        counts = [self.updates, self._first_lr, float(self._moved), self.round, self.tau]
        state = {
            "start": self._start,
            "momentum": self._momentum,
            "counts": torch.tensor(counts, dtype=torch.float64),
        }
        if self._average is not None:
            state["average"] = self._average
        if self._own is not None:
            state["own"] = self._own
        return {name: x.clone() for name, x in state.items()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what ``state_tensors`` returned on this rank; parameters are not touched.

        ``tau`` too is that of the state.

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
        updates, self._first_lr, moved, rounds, tau = tensors["counts"].tolist()
        self._moved = self._number(moved)
        self.updates, self.round, self.tau = int(updates), int(rounds), int(tau)


def _pieces(parameter: Tensor) -> int:
    """Over how many ranks a parameter is cut."""
    if not isinstance(parameter, DTensor):
        return 1
    sizes = zip(parameter.placements, parameter.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if not placement.is_replicate())
