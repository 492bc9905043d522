"""Scores of labels: those of all logits, for the labels that count alone."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import OUTPUT, assert_close

from transnormer.models import label_scores, zoo
from transnormer.models.decoder import Decoder


@pytest.mark.parametrize("held", [2**24, 46], ids=["at_once", "two_at_a_time"])
def test_labels_are_scored_as_by_all_logits(monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    torch.manual_seed(0)
    config = zoo.tnl_custom(vocab_size=23, model_dim=16, num_layers=2, heads=2, glu_dim=12)
    model = Decoder(config).double().eval()
    ids, labels = torch.randint(23, (2, 1, 20))
    labels[0, ::3] = -100
    bounds = torch.tensor([0, 7, 20], dtype=torch.int32)
    monkeypatch.setattr(label_scores, "_LOGITS", held)
    with torch.no_grad():
        found = model.label_scores(ids, labels, cu_seqlens=bounds)
        logits = model(ids, cu_seqlens=bounds).logits[labels != -100]
    wanted = labels[labels != -100]
    exact = F.cross_entropy(logits, wanted, reduction="none")
    assert_close(found.nats, exact, limit=OUTPUT[torch.float64])
    assert torch.equal(found.right, logits.argmax(1) == wanted)
    with torch.no_grad():
        sure = model.label_scores(ids, logits.new_full(ids.shape, -100).long())
    assert sure.nats.shape == sure.right.shape == (0,)
