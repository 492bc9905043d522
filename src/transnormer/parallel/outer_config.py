"""The settings of local updates with an outer step, and what such a step reports."""

from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from transnormer.config import Config

Method = Literal["local_sgd", "slowmo", "diloco", "co2", "co2_eager"]
Penalty = Literal["none", "const", "gap"]

_LATE: dict[str, Any] = {"delayed": True, "momentum": 0.2}
_SETTINGS: dict[Method, dict[str, Any]] = {
    "local_sgd": {},
    "slowmo": {"momentum": 0.5},
    "diloco": {"momentum": 0.9, "nesterov": True, "lr": 0.7},
    "co2": {**_LATE, "penalty": "gap", "clip": 1.0},
    "co2_eager": {**_LATE, "eager": True},
}


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
        penalty: Lambda, by which an average is divided: "none" is 1; "const" is ``penalty_value``;
            "gap" is 1 + |x_{t,0} - x_{t-1,0}| / (tau gamma sqrt(n)) with the first inner rate gamma
            of the round and n parameters: a form of our own, since the paper's equation 3 was not
            at hand.
        penalty_value: of "const".
    """

    tau: int = Field(ge=1)
    delayed: bool = False
    eager: bool = False
    momentum: float = Field(default=0.0, ge=0.0, lt=1.0)
    nesterov: bool = False
    lr: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    clip: float | None = Field(default=None, gt=0.0)
    penalty: Penalty = "none"
    penalty_value: float = Field(default=1.0, ge=1.0, allow_inf_nan=False)

    @classmethod
    def of(cls, method: Method, tau: int) -> "OuterConfig":
        """The settings of a method.

        "local_sgd": plain averaging. "slowmo": Wang et al. 2020 (arXiv:1910.00643), momentum 0.5.
        "diloco": Douillard et al. 2023 (arXiv:2311.08105), Nesterov 0.9 at rate 0.7. "co2": one
        round late, with penalty and clip. "co2_eager": one round late with eager shares. Momentum
        and clip of the last two are choices of ours.
        """
        return cls.model_validate({"tau": tau, **_SETTINGS[method]})


class OuterTable(Config):
    """The [parallel.outer] table: copies of the model that meet every tau updates.

    Attributes:
        method: whose settings hold where the keys below do not replace them, see
            ``OuterConfig.of``.
        tau: updates of a round. "auto", for the two methods that do not wait, is as many as hide
            one all-reduce with a fifth to spare, and as many more as let what else a round costs be
            at most 3 % of it, see ``automatic_tau``: measured in the first updates and in the
            three rounds behind them, told, and kept.
        lr, momentum, penalty, penalty_value: of ``OuterConfig``.
        clip: the same; 0 never clips.
    """

    method: Method
    tau: int | Literal["auto"]
    lr: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    momentum: float | None = Field(default=None, ge=0.0, lt=1.0)
    clip: float | None = Field(default=None, ge=0.0, allow_inf_nan=False)
    penalty: Penalty | None = None
    penalty_value: float | None = Field(default=None, ge=1.0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check(self) -> "OuterTable":
        if isinstance(self.tau, int) and self.tau < 1:
            raise ValueError(f"tau is {self.tau}; expected at least 1, or 'auto'")
        late = bool(_SETTINGS[self.method].get("delayed"))
        if self.tau == "auto" and not late:
            raise ValueError(
                f"tau is 'auto' for method {self.method!r}; expected a number: this method waits "
                "for its all-reduce, which no number of updates hides"
            )
        config = self.config(1)
        if config.penalty != "none" and not late:
            raise ValueError(
                f"penalty is {config.penalty!r} for method {self.method!r}; expected 'none': its "
                "averages are not late; leave it out"
            )
        if self.penalty_value is not None and config.penalty != "const":
            raise ValueError(
                f"penalty_value is {self.penalty_value} beside penalty = {config.penalty!r}; "
                "expected it unset; leave it out, or set penalty to 'const'"
            )
        if config.eager and (config.clip is not None or config.penalty == "gap"):
            raise ValueError(
                f"clip is {config.clip} and penalty {config.penalty!r} for method 'co2_eager'; "
                "expected neither a clip nor 'gap': each copy steps by a share of its own, and what "
                "is not linear in it lets the copies drift apart for good; leave them out"
            )
        return self

    def config(self, tau: int) -> OuterConfig:
        """The outer step with rounds of tau updates."""
        own = {
            key: getattr(self, key)
            for key in ("lr", "momentum", "penalty", "penalty_value")
            if getattr(self, key) is not None
        }
        if self.clip is not None:
            own["clip"] = self.clip or None
        base = OuterConfig.of(self.method, tau)
        return OuterConfig.model_validate({**base.model_dump(), **own})


class OuterReport(NamedTuple):
    """One outer step.

    Attributes:
        round: its number, from 1.
        tau: updates of a round.
        gap: Lambda, by which the average was divided; None for methods that are not late.
        exposed: whether the all-reduce was still under way when its result was needed, so that
            something waited for it.
        note: what a reader of the run should know, once.
    """

    round: int
    tau: int
    gap: float | None
    exposed: bool
    note: str | None = None

    def row(self) -> dict[str, Any]:
        """What a step's record says of it."""
        row = {"outer_round": self.round, "outer_tau": self.tau, "outer_exposed": self.exposed}
        return row if self.gap is None else row | {"staleness_gap": self.gap}
