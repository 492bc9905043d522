"""Root-mean-square normalisation in two passes over memory each way."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _RmsNorm(torch.autograd.Function):
    """y = x r with r = (mean(x^2) + eps)^-1/2; dx = r dy - x r^3 mean(x dy).

    Autograd of the plain formula keeps four tensors of x's size and makes as many passes; this
    keeps x and one number a row.
    """

    @staticmethod
    def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.rsqrt(norm.square().div_(x.shape[-1]).add_(eps))
        return x * scale, scale

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]
    ) -> None:
        ctx.save_for_backward(inputs[0], output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
        x, scale = ctx.saved_tensors
        share = torch.linalg.vecdot(x, grad).unsqueeze(-1) * scale.pow(3) * (-1.0 / x.shape[-1])
        return torch.addcmul(grad * scale, x, share), None


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dim, [..., dim], in x's dtype throughout.

    Source: SRMSNorm of Qin et al. 2023, arXiv:2307.14995, section 3.1.
    """
    if torch.compiler.is_compiling():
        # A compiler fuses the formula itself, and cannot trace the function at symbolic sizes.
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return _RmsNorm.apply(x, eps)[0]
