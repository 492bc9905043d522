"""A model whose sequences are cut among ranks has the loss and the gradients of one process."""

from typing import Any

import pytest
import torch
from nn.mixer_cases import CASES, MixerCase, ids_of
from parallel_cases import earlier_hidden, model_in_parts, model_whole
from ranks import Ranks
from tolerances import SEQUENCE_PARALLEL, assert_close

from transnormer.models import zoo
from transnormer.models.decoder import Decoder
from transnormer.parallel.sequence import apply_sequence_parallel, why_not_in_parts

LENGTHS = (12, 3, 20, 6)
# One form a kind, and the hybrids; the others differ in what lies outside of the exchange.
NAMES = {
    "cosformer", "diag_attention-transnormer", "eos", "eos-phase", "gau", "hgrn1", "hgrn2-hybrid",
    "lightnet", "lightning", "retention", "softmax", "softmax-hybrid", "tpe",
}  # fmt: skip
SHOWN = [case for case in CASES if case.name in NAMES]


def batch_of(kind: str) -> dict[str, Any]:
    """Rows, packed documents, or rows with pads; the first rank has no valid label."""
    ids, labels = ids_of(2, sum(LENGTHS)), ids_of(2, sum(LENGTHS), 7)
    labels[:, : LENGTHS[0]] = -100
    if kind == "packed":
        bounds = torch.tensor([0, 4, 18, 19, sum(LENGTHS)])
        return {"input_ids": ids[:1], "labels": labels[:1], "cu_seqlens": bounds}
    batch: dict[str, Any] = {"input_ids": ids, "labels": labels}
    if kind == "pads":
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[0, :3], mask[1, 20:26] = False, False
        batch["mask"] = mask
    return batch


def compare(ranks: Ranks, model: Decoder, kind: str, *args: Any) -> None:
    batch = batch_of(kind)
    exact = model_whole(model, batch)
    for result in ranks.run(4, model_in_parts, model, batch, LENGTHS, *args):
        for name, expected in exact.items():
            assert_close(result[name], expected, limit=SEQUENCE_PARALLEL, name=name)


@pytest.mark.parametrize("kind", ["rows", "packed", "pads"])
@pytest.mark.parametrize("case", SHOWN, ids=lambda case: case.name)
def test_loss_and_gradients_are_those_of_one_process(
    ranks: Ranks, case: MixerCase, kind: str
) -> None:
    compare(ranks, case.model(torch.float64).train(), kind, {})


@pytest.mark.parametrize("kind", ["rows", "packed"])
@pytest.mark.parametrize("name", ["hgrn2", "lightning", "softmax"])
def test_bidirectional_models_equal_one_process(ranks: Ranks, name: str, kind: str) -> None:
    case = next(case for case in CASES if case.name == name)
    compare(ranks, case.model(torch.float64, causal=False).train(), kind, {})


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("options", [{"overlap": True}, {"exchange": "ring"}], ids=str)
def test_recomputed_blocks_exchange_again(
    ranks: Ranks, options: dict[str, Any], checkpointing: str
) -> None:
    case = next(case for case in CASES if case.name == "hgrn2-hybrid")
    compare(ranks, case.model(torch.float64).train(), "packed", options, checkpointing)


def test_later_tokens_do_not_reach_earlier_ranks(ranks: Ranks) -> None:
    case = next(case for case in CASES if case.name == "softmax-hybrid")
    for before, after in ranks.run(4, earlier_hidden, case.model(torch.float64), LENGTHS):
        assert torch.equal(before, after)


def test_every_mixer_is_supported_or_says_why_not() -> None:
    for case in CASES:
        for causal in (True, False):
            if not causal and case.bidirectional is None:
                continue
            model = case.model(causal=causal)
            reasons = [why_not_in_parts(model, i) for i in range(len(model.blocks))]
            grows = causal and case.name == "gau-quad"
            assert any(reasons) == (grows or (not causal and not _by_core(case))), case.name


def _by_core(case: MixerCase) -> bool:
    kinds = {"cosformer", "hgrn2", "lightning", "retention", "softmax"}
    return all(block.token_mixer.kind in kinds for block in case.blocks)


def test_wrong_arguments_are_named() -> None:
    model = Decoder(zoo.tnl_custom(vocab_size=9, model_dim=8, num_layers=1, heads=1, glu_dim=8))
    with pytest.raises(ValueError, match="exchange is 'star'; expected one of gather, ring, scan"):
        apply_sequence_parallel(model, exchange="star")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model is a Linear; expected a Decoder"):
        apply_sequence_parallel(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
