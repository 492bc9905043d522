"""Decay schedules: how fast each head of each layer forgets.

One sign holds everywhere in the package: ``log_decay <= 0`` and decay = exp(log_decay). Positive
slopes, as the papers print them, exist only inside this file and in ``models/convert``.
"""

import math
from typing import Literal

import torch
from torch import Tensor

DecayRule = Literal["tnl", "paper", "geometric", "none"]
RetnetDecayRule = Literal["retnet", "linspace"]


def alibi_slopes(heads: int) -> list[float]:
    """Slopes of ALiBi (Press et al. 2022, arXiv:2108.12409), one per head, in float64.

    A power of two gives 2^(-8h/heads), h = 1..heads; any other number takes the list of the power
    of two below it and then every second entry of the list of twice that power.
    """
    if heads < 1:
        raise ValueError(f"heads is {heads}; expected at least 1")
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * h / power) for h in range(1, power + 1)]
    doubled = [2.0 ** (-4.0 * h / power) for h in range(1, 2 * power + 1)]
    return slopes + doubled[0::2][: heads - power]


def tnl_log_decay(
    heads: int,
    layer_index: int,
    num_layers: int,
    *,
    rule: DecayRule = "tnl",
    temperature: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Constant log decay of TransNormerLLM's heads in one layer.

    ``tnl`` is the released code's rule, -slope_h * (1 - l / max(L - 1, 1) + 1e-5) with ALiBi
    slopes, which the weights were trained with (the text of Qin et al. 2023, arXiv:2307.14995,
    section 3.1, prints another one: ``paper``, -(8 h / heads) * (1 - (l + 1) / L), kept for
    sensitivity runs). ``geometric`` is -1 / n_h with n_h geometric from 2 to 256 tokens, times the
    same factor of the layer as ``tnl``. ``none`` gives zeros.

    Args:
        heads: number of (key-value) heads.
        layer_index: layer, counted from 0.
        num_layers: layers of the model.
        rule: one of the rules above.
        temperature: False leaves out the factor of the layer (the paper's ablation).
        dtype: of the result; computed in float64.

    Returns:
        log decay, [heads], at most 0.

    Raises:
        ValueError: a count below 1, a layer outside the model, an unknown rule.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers is {num_layers}; expected at least 1")
    if not 0 <= layer_index < num_layers:
        raise ValueError(f"layer_index is {layer_index}; expected 0 <= layer_index < {num_layers}")
    slopes = torch.tensor(alibi_slopes(heads), dtype=torch.float64)
    # max(L - 1, 1): the released rule divides by zero for a model of one layer.
    factor = 1.0 - layer_index / max(num_layers - 1, 1) + 1e-5
    if rule == "paper":
        slopes = torch.arange(heads, dtype=torch.float64) * (8.0 / heads)
        factor = 1.0 - (layer_index + 1) / num_layers
    elif rule == "geometric":
        slopes = 1.0 / torch.logspace(1.0, 8.0, heads, base=2.0, dtype=torch.float64)
    elif rule == "none":
        slopes = torch.zeros(heads, dtype=torch.float64)
    elif rule != "tnl":
        raise ValueError(f"rule is {rule!r}; expected 'tnl', 'paper', 'geometric' or 'none'")
    return (-slopes * (factor if temperature else 1.0)).to(dtype)


def retnet_log_decay(
    heads: int, *, rule: RetnetDecayRule = "retnet", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Constant log decay of RetNet's heads, the same in every layer.

    ``retnet`` is log(1 - 2^(-5 - h)), h = 0 .. heads - 1 (Sun et al. 2023, arXiv:2307.08621,
    section 2.2, and torchscale); ``linspace`` log(1 - x_h) with x_h geometric from 1/32 to 1/512,
    which the paper's experiments took (section 3.1).

    Args:
        heads: number of heads.
        rule: one of the rules above.
        dtype: of the result; computed in float64.

    Returns:
        log decay, [heads], below 0.

    Raises:
        ValueError: a count below 1, an unknown rule.
    """
    if heads < 1:
        raise ValueError(f"heads is {heads}; expected at least 1")
    if rule == "retnet":
        forgotten = torch.exp2(-5.0 - torch.arange(heads, dtype=torch.float64))
    elif rule == "linspace":
        ends = -math.log(32.0), -math.log(512.0)
        forgotten = torch.linspace(*ends, heads, dtype=torch.float64).exp()
    else:
        raise ValueError(f"rule is {rule!r}; expected 'retnet' or 'linspace'")
    return torch.log1p(-forgotten).to(dtype)
