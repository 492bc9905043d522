"""Training in segments on several ranks has the loss and the gradients of whole sequences."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_cases import adapted
from nn.mixer_cases import CASES, MixerCase, ids_of
from parallel_cases import run_in_layout
from ranks import Ranks
from segment_cases import DIVISOR, half, in_segments, laid_out, warned, whole
from tolerances import RELAID_LOSS, SEGMENTS, SEGMENTS_BFLOAT16, assert_close
from train_cases import tiny_run

from transnormer.models.decoder import Decoder
from transnormer.models.segments import backward_in_segments
from transnormer.parallel.mesh import Axes
from transnormer.train import run_training

# One form a kind whose state has a constant size.
NAMES = {
    "cosformer", "diag_attention-transnormer", "eos", "gau", "hgrn1", "hgrn2", "lightnet",
    "lightning", "retention", "tpe",
}  # fmt: skip
SHOWN = [case for case in CASES if case.name in NAMES]
# Documents of 1 to 39 tokens, one that ends where segments of 4 and 8 do.
BOUNDS = torch.tensor([0, 5, 6, 32, 71, 82], dtype=torch.int32)


def batch_of(packed: bool, rows: int = 2) -> dict[str, Any]:
    ids, labels = ids_of(rows, 41), ids_of(rows, 41, 7)
    labels[0, 3], labels[-1, 8:24] = -100, -100
    if packed:
        flat = {"input_ids": ids[:2].reshape(1, -1), "labels": labels[:2].reshape(1, -1)}
        return {**flat, "cu_seqlens": BOUNDS}
    return {"input_ids": ids, "labels": labels}


def compare(results: list[dict[str, Any]], exact: dict[str, Any]) -> None:
    for result in results:
        for name, expected in exact.items():
            assert_close(result[name], expected, limit=SEGMENTS, name=name)


def lightning() -> Decoder:
    case = next(case for case in CASES if case.name == "lightning")
    return case.model(torch.float64).train()


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("case", SHOWN, ids=lambda case: case.name)
def test_every_mixer_has_the_gradients_of_whole_sequences(
    ranks: Ranks, case: MixerCase, packed: bool
) -> None:
    model, batch = case.model(torch.float64).train(), batch_of(packed)
    compare(ranks.run(4, in_segments, model, batch, 4), whole(model, batch))


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize(("count", "tokens"), [(1, 8), (2, 1), (2, 1000), (3, 8)])
def test_any_number_of_ranks_and_segments(
    ranks: Ranks, count: int, tokens: int, packed: bool
) -> None:
    model, batch = lightning(), batch_of(packed)
    compare(ranks.run(count, in_segments, model, batch, tokens), whole(model, batch))


def test_blocks_that_are_computed_again_pass_their_states_once(ranks: Ranks) -> None:
    model, batch = lightning(), batch_of(packed=True)
    compare(ranks.run(2, in_segments, model, batch, 8, "full"), whole(model, batch))


def test_dropout_of_adapters_draws_as_on_one_process(ranks: Ranks) -> None:
    model, batch = adapted(), batch_of(packed=False)
    # As ranks begin.
    torch.manual_seed(0)
    loss = backward_in_segments(model, **batch, segment_tokens=8, divisor=DIVISOR)
    exact = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    compare(ranks.run(1, in_segments, adapted(), batch, 8), exact | {"loss": loss})


@pytest.mark.parametrize("name", ["diag_attention-transnormer", "gau"])
def test_states_of_16_bits_arrive_as_they_were_sent(ranks: Ranks, name: str) -> None:
    model = next(case for case in CASES if case.name == name).model(torch.float32).train()
    batch = batch_of(packed=False)
    one, two = (ranks.run(n, in_segments, model, batch, 8, "none", half)[0] for n in (1, 2))
    for key, expected in one.items():
        assert_close(two[key], expected, limit=SEGMENTS_BFLOAT16, name=key)


@pytest.mark.parametrize(
    "axes",
    [Axes(sp=4), Axes(dp_shard=2, sp=2), Axes(dp_shard=4), Axes(dp_replicate=2, sp=2)],
    ids=lambda axes: "-".join(f"{name}{n}" for name, n in axes._asdict().items() if n > 1),
)
def test_shared_parameters_get_the_gradients_of_one_process(ranks: Ranks, axes: Axes) -> None:
    model, batch = lightning(), batch_of(packed=False, rows=8)
    exact = whole(model, batch)
    results = ranks.run(4, laid_out, model, batch, axes, 8)
    compare(results, exact | {"again": exact["loss"]})


def test_states_that_are_views_are_not_warned_of(ranks: Ranks) -> None:
    batch = batch_of(packed=False)
    assert not any("view" in text for text in ranks.run(4, warned, lightning(), batch)[0])


def test_a_run_in_segments_is_that_of_one_process(ranks: Ranks, tmp_path: Path) -> None:
    losses = []
    for name in ("alone", "many"):
        config = tiny_run(
            tmp_path, "model.dropout=0.0", "train.eval_every=0", "train.segment_tokens=5",
            "data.packing=documents", f"output.dir={tmp_path / name}",
        )  # fmt: skip
        if name == "alone":
            run_training(config)
        else:
            ranks.run(4, run_in_layout, config, Axes(dp_shard=2, sp=2), False)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert len(losses[1]) == len(losses[0]) > 2
    for found, exact in zip(*losses, strict=True):
        assert abs(found - exact) <= RELAID_LOSS * abs(exact)
