"""Forget gates with a lower bound that rises with depth (HGRN, HGRN2)."""

from typing import Literal

import torch
from torch import Tensor, nn

from transnormer.nn.precision import KeepPrecision
from transnormer.ops.checks import accumulation_dtype

LowerBoundRule = Literal["cumulative", "exclusive", "none"]


class LowerBounds(KeepPrecision):
    """The lower bounds of all layers' forget gates, from one learned matrix.

    P = softmax(gamma) over the layers. "cumulative": bound_l = P_1 + .. + P_l (the released
    language models, which subtract P_0 from the cumulative sum; flash-linear-attention too).
    "exclusive": bound_l = P_0 + .. + P_{l-1} (the formula of Qin et al. 2023, arXiv:2311.04823, and
    the code for images and Long Range Arena). Both are 0 in the first layer, rise with depth, stay
    below 1 and agree at the start, when all P are equal. What gamma starts with (ones here; zeros
    in flash-linear-attention) does not matter: softmax does not see it.

    Args:
        num_layers: layers of the model. In a hybrid that is all its blocks, whatever their kind: a
            bound belongs to a depth, and the rows of other kinds share in the sums only.
        width: channels of the gate.
        rule: one of the rules above.
    """

    def __init__(
        self, num_layers: int, width: int, rule: Literal["cumulative", "exclusive"]
    ) -> None:
        super().__init__()
        self.rule = rule
        dtype = accumulation_dtype(torch.get_default_dtype())
        self.gamma = nn.Parameter(torch.empty(num_layers, width, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gamma)

    def extra_repr(self) -> str:
        return f"num_layers={self.gamma.shape[0]}, width={self.gamma.shape[1]}, rule={self.rule}"

    def forward(self) -> Tensor:
        """The bounds, [num_layers, width], float32 (float64 for a float64 model)."""
        shares = self.gamma.softmax(0)
        shares = shares[1:] if self.rule == "cumulative" else shares[:-1]
        bounds = torch.cat([torch.zeros_like(self.gamma[:1]), shares.cumsum(0)])
        # A sum that rounds to 1 would never let anything in, and its logarithm has no gradient.
        return bounds.clamp(max=1.0 - torch.finfo(bounds.dtype).eps)


def bound_of(shared: Tensor | None, rule: LowerBoundRule, layer_index: int) -> Tensor | None:
    """One layer's bound, [width], from the result of ``LowerBounds``; None for the rule "none".

    Raises:
        ValueError: the bounds are needed and absent.
    """
    if rule == "none":
        return None
    if shared is None:
        raise ValueError(
            "shared is None; expected the lower bounds of all layers; call the module that "
            "build_shared returns, or set lower_bound to 'none'"
        )
    return shared[layer_index]
