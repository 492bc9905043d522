"""The sequence classifier: pools are exact under padding, and its head is never lost."""

from pathlib import Path
from typing import Any

import pytest
import tolerances
import torch
import torch.nn.functional as F
from decoder_cases import assert_logits_agree, make_ids, make_model, tnl_config, variant_config

import transnormer
from transnormer import ClassifierConfig, SequenceClassifier
from transnormer.models import checkpoint
from transnormer.models.decoder import DecoderConfig

POOLINGS = [("mean", False), ("mean", True), ("last", False), ("last", True), ("first", False)]
by_pooling = pytest.mark.parametrize(("pooling", "causal"), POOLINGS)


def make_classifier(
    pooling: str = "mean",
    causal: bool = False,
    *,
    backbone: DecoderConfig | None = None,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> SequenceClassifier:
    """Three classes over the small decoder, in eval mode, with weights drawn from seed 1."""
    torch.manual_seed(1)
    backbone = backbone or tnl_config(causal=causal)
    config = ClassifierConfig(backbone=backbone, num_classes=3, pooling=pooling, **changes)
    return SequenceClassifier(config).to(dtype).eval()


def placed(lengths: list[int], where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids [rows, 9] and a mask whose pads are at the left, at the right or in the middle."""
    mask = torch.ones(len(lengths), 9, dtype=torch.bool)
    for row, length in enumerate(lengths):
        start = {"left": 0, "right": length, "middle": length // 2}[where]
        mask[row, start : start + 9 - length] = False
    return make_ids(len(lengths), 9), mask


@by_pooling
@pytest.mark.parametrize("where", ["left", "right", "middle"])
def test_pads_change_nothing(pooling: str, causal: bool, where: str) -> None:
    model = make_classifier(pooling, causal)
    ids, mask = placed([9, 5, 1, 2], where)
    alone = [model(ids[row : row + 1, mask[row]]) for row in range(4)]
    assert_logits_agree(model(ids, mask), torch.cat(alone), tolerances.SPLIT_CPU)


@by_pooling
def test_logits_are_the_head_of_the_pooled_hidden_states(pooling: str, causal: bool) -> None:
    model = make_classifier(pooling, causal, dtype=torch.float64)
    ids, mask = placed([9, 4], "middle")
    x, _ = model.backbone.hidden(ids, mask=mask)
    real = [x[row, mask[row]] for row in range(2)]
    pooled = [{"mean": r.mean(0), "last": r[-1], "first": r[0]}[pooling] for r in real]
    exact = torch.stack(pooled) @ model.head.weight.T + model.head.bias
    assert_logits_agree(model(ids, mask), exact, tolerances.SPLIT_FLOAT64)


def test_without_a_mask_every_token_is_real() -> None:
    model, ids = make_classifier(), make_ids(2, 7)
    assert torch.equal(model(ids), model(ids, torch.ones(2, 7, dtype=torch.bool)))


def test_only_a_bidirectional_backbone_lets_the_first_token_see_the_last() -> None:
    model, ids = make_classifier("first"), make_ids(1, 7)
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % 61
    assert not torch.equal(model(ids), model(other))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_is_the_cross_entropy_in_nats(reduction: str) -> None:
    model = make_classifier(dtype=torch.float64)
    ids, mask = placed([9, 4, 2], "right")
    labels = torch.tensor([2, 0, 1])
    loss = model.loss(ids, labels, reduction=reduction, mask=mask)
    exact = -F.log_softmax(model(ids, mask), 1)[torch.arange(3), labels]
    assert loss.item() == pytest.approx(getattr(exact, reduction)().item(), rel=1e-12)


def test_the_loss_of_a_half_precision_model_is_float32() -> None:
    model = make_classifier(dtype=torch.bfloat16)
    assert model(make_ids(2, 5)).dtype == torch.bfloat16
    assert model.loss(make_ids(2, 5), torch.tensor([0, 1])).dtype == torch.float32


def test_every_parameter_is_trained() -> None:
    model = make_classifier()
    model.loss(make_ids(2, 7), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_dropout_acts_on_the_pooled_vector_in_training_alone() -> None:
    model, ids = make_classifier(dropout=0.5), make_ids(2, 7)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_the_head_is_initialised_as_projections_are() -> None:
    model = make_classifier(backbone=tnl_config(causal=False, model_dim=512, init_std=0.3))
    assert model.head.weight.std().item() == pytest.approx(0.3, rel=0.1)
    assert not bool(model.head.bias.any())
    with torch.device("meta"):
        again = SequenceClassifier(model.config)
    again.to_empty(device="cpu").reset_parameters()
    assert again.head.weight.std().item() == pytest.approx(0.3, rel=0.1)


def test_parameters_are_counted_with_the_head() -> None:
    model = make_classifier()
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.num_parameters() - model.num_parameters(embeddings=False) == 61 * 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_loaded_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    backbone = variant_config({"gate": "low_rank"}, causal=False)
    model = make_classifier(
        "last", backbone=backbone, dropout=0.1, labels=("a", "b", "c"), dtype=dtype
    )
    transnormer.save(model, tmp_path / "model")
    loaded = transnormer.load_classifier(tmp_path / "model")
    assert loaded.config == model.config
    assert not loaded.training
    ids, mask = placed([9, 4], "right")
    assert torch.equal(loaded(ids, mask), model(ids, mask))


def test_neither_loader_takes_the_other_kind(tmp_path: Path) -> None:
    transnormer.save(make_classifier(), tmp_path / "classifier")
    transnormer.save(make_model(), tmp_path / "decoder")
    with pytest.raises(ValueError, match="is a sequence classifier; expected a decoder; load it"):
        transnormer.load(tmp_path / "classifier")
    with pytest.raises(ValueError, match="is a sequence classifier; expected a decoder"):
        checkpoint.read_config(tmp_path / "classifier")
    with pytest.raises(ValueError, match="is a decoder; expected a sequence classifier; load it"):
        transnormer.load_classifier(tmp_path / "decoder")


def test_the_released_layout_cannot_hold_it(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="model is a SequenceClassifier; expected"):
        transnormer.save(make_classifier(), tmp_path / "model", layout="released")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pooling": "first"}, "pooling is 'first' and the backbone is causal"),
        ({"backbone": tnl_config(tie_embeddings=False)}, "tie_embeddings is False; expected True"),
        ({"labels": ("a", "b")}, "labels has 2 names; expected 3"),
        ({"num_classes": 1}, "num_classes"),
    ],
    ids=["first", "untied", "labels", "one class"],
)
def test_configurations_that_mean_nothing_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassifierConfig(**{"backbone": tnl_config(), "num_classes": 3, **fields})


def test_wrong_inputs_are_refused() -> None:
    model, ids = make_classifier(), make_ids(2, 7)
    hidden = torch.ones(2, 7, dtype=torch.bool)
    hidden[1] = False
    with pytest.raises(ValueError, match=r"mask\[1\] hides every token; expected a real one"):
        model(ids, hidden)
    with pytest.raises(ValueError, match=r"labels has shape \[3\]; expected \[2\]"):
        model.loss(ids, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels holds 3; expected 0 to 2"):
        model.loss(ids, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="labels holds -1; expected 0 to 2"):
        model.loss(ids, torch.tensor([-1, 0]))
    with pytest.raises(ValueError, match="reduction is 'none'"):
        model.loss(ids, torch.tensor([0, 1]), reduction="none")
    with pytest.raises(ValueError, match="mask has shape"):
        model(ids, torch.ones(2, 6, dtype=torch.bool))
