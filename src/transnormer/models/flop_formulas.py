"""Operation counts of the package's ops for torch's counter, which cannot look into them."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

# Each defines its ops when it is imported.
import transnormer.ops.cross_entropy.fused
import transnormer.ops.glu
import transnormer.ops.joint_attention
import transnormer.ops.linear_attention.constant_decay
import transnormer.ops.linear_attention.gated_decay  # noqa: F401

Formula = Callable[..., int]
# Forms of linear attention, each with an op of this name and one for its backward pass.
_ATTENTION = (
    "chunked_linear_attention",
    "constant_decay_attention",
    "scalar_gate_attention",
    "gated_decay_attention",
)


def attention_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> int:
    """Of causal linear attention's forward pass, from shapes.

    tokens heads (2 B (key_dim + value_dim) + 4 key_dim value_dim) in blocks of B = min(key_dim,
    value_dim, seq) tokens, as ``LinearAttentionCore.flops_per_token``; a form may take other blocks.
    """
    (batch, seq, heads, key_dim), value_dim = q, v[3]
    block = min(key_dim, value_dim, seq)
    each = 2 * block * (key_dim + value_dim) + 4 * key_dim * value_dim
    return batch * seq * heads * each


def flop_formulas() -> dict[Any, Formula]:
    """What ``FlopCounterMode(custom_mapping=...)`` needs to count the package's ops.

    Linear attention counts ``attention_flops``, its backward pass twice as much. The loss counts the
    product with the head, its backward pass three: the logits are made again. Where its gradients
    are formed beside it, the loss counts three and its backward pass none. A gated unit behind its
    projection counts the product with the weight, its backward pass two.
    """

    def forward(q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> int:
        return attention_flops(q, k, v)

    def backward(grad_o: Any, grad_final: Any, q: Any, k: Any, v: Any, *rest: Any, **o: Any) -> int:
        return 2 * attention_flops(q, k, v)

    def joint(joint: Any, decay: Any, bounds: Any, head_dim: int, *rest: Any, **o: Any) -> int:
        each = (joint[0], joint[1], joint[2] // (4 * head_dim), head_dim)
        return attention_flops(each, each, each)

    def joint_backward(grad: Any, x: Any, o: Any, a: Any, states: Any, *rest: Any, **k: Any) -> int:
        return 2 * joint(x, *rest)

    def glu(joint: Any, weight: Any, *rest: Any, **options: Any) -> int:
        return prod(joint[:-1]) * 2 * weight[0] * weight[1]

    def glu_backward(grad: Any, joint: Any, weight: Any, *rest: Any, **options: Any) -> int:
        return 2 * glu(joint, weight)

    def loss(x: Any, weight: Any, labels: Any, **options: Any) -> int:
        return 2 * x[0] * weight[0] * weight[1]

    def loss_backward(grad: Any, x: Any, weight: Any, *rest: Any, **options: Any) -> int:
        return 3 * loss(x, weight, None)

    def loss_sum(x: Any, weight: Any, labels: Any, gradient: bool, **options: Any) -> int:
        return (3 if gradient else 1) * loss(x, weight, labels)

    ops = torch.ops.transnormer
    found: dict[Any, Formula] = {
        ops.linear_cross_entropy: loss,
        ops.linear_cross_entropy_backward: loss_backward,
        ops.linear_cross_entropy_sum: loss_sum,
        ops.gated_projection: glu,
        ops.gated_projection_backward: glu_backward,
        ops.joint_attention: joint,
        ops.joint_attention_backward: joint_backward,
    }
    for name in _ATTENTION:
        found[getattr(ops, name)] = forward
        found[getattr(ops, f"{name}_backward")] = backward
    return found
