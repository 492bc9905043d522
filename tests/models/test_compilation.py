"""Compiled blocks that keep a share of their activations: less memory, the same gradients."""

from typing import Any

import pytest
import torch
from decoder_cases import make_ids, make_model
from tolerances import COMPILED_GRADIENT, assert_close
from torch import Tensor

from transnormer.models.compilation import compile_blocks
from transnormer.models.decoder import Decoder


def kept_and_gradients(model: Decoder) -> tuple[int, list[Tensor]]:
    """Elements that autograd keeps of a step, without weights, and the gradients."""
    weights = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if x.data_ptr() not in weights:
            kept[x.data_ptr()] = x.numel()
        return x

    ids = make_ids(2, 64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    return sum(kept.values()), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_smaller_share_keeps_less_and_changes_no_gradient() -> None:
    found = []
    for share in (1.0, 0.95, 0.2):
        torch._dynamo.reset()
        model = make_model()
        compile_blocks(model, backend="aot_eager_decomp_partition", activation_memory=share)
        found.append(kept_and_gradients(model))
    exact = make_model()
    gradients = kept_and_gradients(exact)[1]
    assert found[0][0] > found[1][0] > found[2][0]
    for _, grads in found:
        for grad, expected in zip(grads, gradients, strict=True):
            assert_close(grad, expected.double(), limit=COMPILED_GRADIENT)


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_outside_of_its_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"activation_memory is .*; expected a share in \(0, 1\]"):
        compile_blocks(make_model(), activation_memory=share)


def test_the_share_reaches_no_other_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._functorch import config

    seen: list[float] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(config.activation_memory_budget)
        return graph.forward

    torch._dynamo.reset()
    model = make_model()
    compile_blocks(model, backend=backend, activation_memory=0.5)
    with torch.no_grad():
        model(make_ids(1, 8))
    assert set(seen) == {0.5}
    assert config.activation_memory_budget == 1.0
