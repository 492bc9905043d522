"""torchtitan's adapter: a step of its trainer's pieces is one process's step."""

import pytest
import torch
from decoder_cases import tnl_config
from titan_cases import step_in_titan
from tolerances import RELAID_LOSS

from transnormer.models.decoder import Decoder
from transnormer.parallel.launch import call_on_ranks

pytest.importorskip("torchtitan.protocols.train_spec", reason="torchtitan is not installed")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("degrees", [{"dp_shard": 2}, {"dp_shard": 2, "dp_replicate": 2}])
def test_loss_and_gradient_norm_are_those_of_one_process(degrees: dict[str, int]) -> None:
    config = tnl_config(vocab_size=61)
    ranks = degrees["dp_shard"] * degrees.get("dp_replicate", 1)
    found = call_on_ranks(ranks, step_in_titan, config.model_dump(mode="json"), degrees)
    torch.manual_seed(3)
    model = Decoder(config)
    ids = torch.randint(61, (8, 12), generator=torch.Generator().manual_seed(5))
    loss = model.loss(ids, ids.roll(-1, 1))
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert found["loss"] == pytest.approx(loss.item(), rel=RELAID_LOSS)
    assert found["norm"] == pytest.approx(norm.item(), rel=RELAID_LOSS)


def test_every_causal_size_is_a_flavor() -> None:
    from torchtitan.protocols.train_spec import get_train_spec

    import transnormer.integrations.torchtitan as adapter

    args = get_train_spec(adapter.NAME).model_args["tnl-385m"]
    with torch.device("meta"):
        model = get_train_spec(adapter.NAME).model_cls(args)
    parameters, flops = args.get_nparams_and_flops(model, 2048)
    assert parameters == sum(x.numel() for x in model.parameters())
    assert flops > 6 * (parameters - model.decoder.embedding.weight.numel())
