"""Compiled blocks on several ranks compute what one process does, and are compiled."""

from typing import Any

import pytest
import torch
from compiled_cases import compiled_on_ranks
from nn.mixer_cases import CASES, ids_of
from ranks import Ranks
from segment_cases import whole
from tolerances import SEQUENCE_PARALLEL, assert_close

from transnormer.parallel.mesh import Axes


def compare(
    ranks: Ranks, count: int, name: str, segment_tokens: int | None, axes: Axes | None
) -> None:
    case = next(case for case in CASES if case.name == name)
    model = case.model(torch.float64).train()
    batch: dict[str, Any] = {
        "input_ids": ids_of(1, 41),
        "labels": ids_of(1, 41, 7),
        "cu_seqlens": torch.tensor([0, 5, 30, 41], dtype=torch.int32),
    }
    exact = whole(model, batch)
    args = (model, batch, segment_tokens, axes)
    for found, products in ranks.run(count, compiled_on_ranks, *args):
        for tensor, expected in exact.items():
            assert_close(found[tensor], expected, limit=SEQUENCE_PARALLEL, name=tensor)
        # Every projection of one block at least.
        linear = [m for m in model.blocks[0].modules() if isinstance(m, torch.nn.Linear)]
        assert products >= len(linear)


def test_messages_stay_out_of_graphs(ranks: Ranks) -> None:
    compare(ranks, 2, "lightning", None, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "segment_tokens"),
    [("hgrn1", None), ("hgrn1", 6), ("lightning", None), ("lightning", 6), ("softmax", None)],
)
def test_any_layer_and_shared_parameters(
    ranks: Ranks, name: str, segment_tokens: int | None
) -> None:
    compare(ranks, 4, name, segment_tokens, Axes(sp=4))
