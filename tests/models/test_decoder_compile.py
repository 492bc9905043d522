"""The whole model under torch.compile(fullgraph=True), autocast and on meta."""

import pytest
import torch
from decoder_cases import assert_logits_agree, make_ids, make_model, tnl_config
from tolerances import DECODER_FLOAT32, assert_close

from transnormer.models.decoder import Decoder


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_forward_compiles_whole() -> None:
    model = make_model()
    ids = make_ids(2, 70)
    assert_logits_agree(compiled(model)(ids).logits, model(ids).logits, DECODER_FLOAT32)


def test_decoding_compiles_whole_and_once() -> None:
    model = make_model()
    ids = make_ids(2, 20)
    with torch.no_grad():
        state = model(ids[:, :10]).state
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    exact = state
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for t in range(10, 20):
            out, wanted = (
                step(ids[:, t : t + 1], state=state),
                model(ids[:, t : t + 1], state=exact),
            )
            assert_logits_agree(out.logits, wanted.logits, DECODER_FLOAT32)
            state, exact = out.state, wanted.state
    assert state.positions.tolist() == [20, 20]


def test_training_step_compiles_whole() -> None:
    plain, other = make_model(), make_model()
    ids = make_ids(2, 71)
    plain.loss(ids[:, :-1], ids[:, 1:]).backward()
    compiled(other.loss)(ids[:, :-1], ids[:, 1:]).backward()
    for (name, x), y in zip(other.named_parameters(), plain.parameters()):
        assert_close(x.grad, y.grad, limit=1e-5, name=name)


def test_packed_loss_compiles_whole() -> None:
    model = make_model()
    ids, bounds = make_ids(1, 70), torch.tensor([0, 30, 70])
    exact = model.loss(ids, ids, cu_seqlens=bounds)
    assert_close(compiled(model.loss)(ids, ids, cu_seqlens=bounds), exact.double())


@pytest.mark.slow
def test_inductor_gives_the_eager_logits() -> None:
    model = make_model()
    ids = make_ids(2, 70)
    out = torch.compile(model, fullgraph=True)(ids)
    assert_logits_agree(out.logits, model(ids).logits, DECODER_FLOAT32)


def test_meta_model_gives_shapes() -> None:
    with torch.device("meta"):
        model = Decoder(tnl_config())
    out = model(torch.zeros(2, 70, dtype=torch.long, device="meta"))
    assert out.logits.shape == (2, 70, 61)
    assert out.state.layers[0].shape == (2, 2, 32, 16)


def test_autocast_computes_in_bfloat16_and_keeps_float32_states() -> None:
    model = make_model()
    ids = make_ids(2, 70)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids)
        loss = model.loss(ids[:, :-1], ids[:, 1:])
    assert loss.dtype == torch.float32
    assert all(layer.dtype == torch.float32 for layer in out.state.layers)
    exact = model(ids)
    error = (out.logits.double() - exact.logits.double()).square().mean().sqrt()
    assert 0 < error / exact.logits.double().std() < 16 * torch.finfo(torch.bfloat16).eps
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.slow
def test_training_compiles_whole_at_symbolic_lengths() -> None:
    model = make_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for seq in (20, 13):
        ids = make_ids(2, seq)
        logits = compiled(ids).logits
        assert_close(logits, model(ids).logits.double())
        logits.sum().backward()
