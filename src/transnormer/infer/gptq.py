"""Rounding weights to 4 bits so that the outputs on given texts change least: GPTQ.

Frantar et al. 2022, arXiv:2210.17323: columns of a weight are rounded one after the other, and the
error of each is taken up by the columns that are not rounded yet, as the inputs' second moments say.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from transnormer.infer.reading import evaluate
from transnormer.models.decoder import Decoder

_HIGHEST = 7


def gptq(
    weight: Tensor, moments: Tensor, group_size: int, *, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Round a weight to 4 bits, scale x integer, against sum ||(W - W') x||^2 over inputs x.

    With U the upper Cholesky factor of (moments + damping mean(diag) I)^-1, column j becomes
    w'_j = s round(w_j / s), and the later columns lose (w_j - w'_j) / U_jj U_j,later. The scale of a
    group is max |w| / 7 of its columns when it is reached. In float32, the factor in float64.

    Args:
        weight: [outputs, inputs].
        moments: sum of x x^T over inputs, [inputs, inputs]; inputs that never occur have a 0 row.
        group_size: inputs that share a scale; divides them.
        damping: added to the diagonal, as a share of its mean.

    Returns:
        integers from -7 to 7, int8 [outputs, inputs], and scales, float32
        [outputs, inputs / group_size].
    """
    w, size = weight.detach().float().clone(), weight.shape[1]
    full = moments.double()
    diagonal = full.diagonal()
    shift = damping * diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    full = full + shift * torch.eye(size, dtype=full.dtype, device=full.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(full))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    ints = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    scales = []
    for start in range(0, size, group_size):
        end = start + group_size
        part, own = w[:, start:end], factor[start:end, start:end]
        largest = part.abs().amax(1, keepdim=True)
        scale = torch.where(largest > 0, largest / _HIGHEST, 1.0)
        errors = torch.empty_like(part)
        for j in range(group_size):
            rounded = (part[:, j : j + 1] / scale).round().clamp(-_HIGHEST, _HIGHEST)
            ints[:, start + j] = rounded[:, 0].to(torch.int8)
            errors[:, j : j + 1] = (part[:, j : j + 1] - rounded * scale) / own[j, j]
            part[:, j + 1 :] -= errors[:, j : j + 1] * own[j, j + 1 :]
        # The columns of later groups take up the errors of a whole group at once.
        w[:, end:] -= errors @ factor[start:end, end:]
        scales.append(scale)
    return ints, torch.cat(scales, 1)


def calibrate(
    model: Decoder,
    targets: Mapping[str, nn.Linear],
    batches: Iterable[Tensor],
    group_size: int,
    install: Callable[[nn.Linear, Tensor, Tensor], None],
) -> None:
    """Round projections block by block, each by the inputs that the rounded blocks before give it.

    Reads every batch once a block.

    Args:
        model: the decoder.
        targets: its projections by name.
        batches: ids [batch, seq] of texts like those to come.
        group_size: of ``gptq``.
        install: puts integers and scales in the place of a projection's weight.

    Raises:
        ValueError: no batches.
    """
    texts = list(batches)
    if not texts:
        raise ValueError("calibration is empty; expected at least one batch of token ids")
    device = next(model.parameters()).device
    for index in range(len(model.blocks)):
        prefix = f"blocks.{index}."
        parts = {name: module for name, module in targets.items() if name.startswith(prefix)}
        moments = {
            name: torch.zeros(module.in_features, module.in_features, device=device)
            for name, module in parts.items()
        }
        hooks = [
            module.register_forward_pre_hook(_adding_to(moments[name]))
            for name, module in parts.items()
        ]
        try:
            for ids in texts:
                evaluate(model, ids.to(device), logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        for name, module in parts.items():
            install(module, *gptq(module.weight, moments[name], group_size))


def _adding_to(moments: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].detach().flatten(0, -2).float()
        moments.addmm_(x.T, x)

    return hook
