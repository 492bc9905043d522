"""Learning-rate schedules: pure functions of the step, so that a resumed run needs no state."""

import math
from typing import Literal

from pydantic import Field

from transnormer.config import Config

Schedule = Literal["cosine", "constant", "wsd"]


class ScheduleConfig(Config):
    """The learning rate over a run, as multiples of the peak rate."""

    schedule: Schedule = "cosine"
    # Steps of linear warm-up from peak / warmup to the peak.
    warmup: int = Field(default=0, ge=0)
    # The last step's rate as a share of the peak (cosine and wsd).
    final: float = Field(default=0.1, ge=0, le=1)
    # Share of all steps over which wsd falls linearly at the end.
    decay: float = Field(default=0.2, gt=0, le=1)


def lr_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """Return the rate of update number `step` (counted from 0) of `steps`, over the peak rate.

    Warm-up is linear and its last step has the peak rate. cosine falls from there to `final` at
    the last step (Loshchilov and Hutter 2016, arXiv:1608.03983, without restarts). wsd stays and
    falls linearly to `final` over the last `decay` share of the steps (Hu et al. 2024,
    arXiv:2404.06395). A warm-up longer than the run is cut off by its end.
    """
    if step < 0 or steps < 1:
        raise ValueError(f"step is {step} of {steps}; expected step >= 0 and steps >= 1")
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "constant":
        return 1.0
    start = config.warmup
    if config.schedule == "wsd":
        start = max(start, steps - max(1, round(config.decay * steps)))
    progress = min(1.0, max(0, step + 1 - start) / max(1, steps - start))
    if config.schedule == "wsd":
        return 1.0 - (1.0 - config.final) * progress
    return config.final + (1.0 - config.final) * 0.5 * (1.0 + math.cos(math.pi * progress))
