"""What a row of the table of models is: arguments of eos, and what is left to do with y."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

from transnormer.ops.eos import eos


class EosRow(NamedTuple):
    """A model's layer as a call of eos.

    Attributes:
        i, e, s, o, log_o, psi: the arguments.
        post: makes the layer's result from y and the final state; None where y is the result.
    """

    i: Tensor
    e: Tensor
    s: Tensor
    o: Tensor | float | complex | None = None
    log_o: Tensor | float | complex | None = None
    psi: Literal["diag", "matmul"] = "diag"
    post: Callable[[Tensor, Tensor], Tensor] | None = None

    def run(
        self, state: Tensor | None = None, *, implementation: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """The layer's result and the state after the last token."""
        y, state = eos(
            self.i,
            self.e,
            self.s,
            self.o,
            log_o=self.log_o,
            psi=self.psi,
            state=state,
            implementation=implementation,
        )
        return (y if self.post is None else self.post(y, state)), state
