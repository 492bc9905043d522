"""The whole model against the float64 oracle, and what its two calls promise."""

import copy
import math
import pickle

import oracles
import pytest
import torch
import torch.nn.functional as F
from decoder_cases import (
    HEADS,
    LAYERS,
    VOCAB,
    assert_logits_agree,
    make_ids,
    make_model,
    tnl_config,
    variant_config,
)
from tolerances import DECODER_FLOAT32, FORMS_GRADIENT_FLOAT64, assert_close
from torch import Tensor

from transnormer.models.decoder import Decoder


def oracle_logits(weights: dict[str, Tensor], ids: Tensor, offset: int = 0) -> Tensor:
    return oracles.tnl_logits(weights, ids, num_layers=LAYERS, heads=HEADS, offset=offset)


def labels_of(ids: Tensor) -> Tensor:
    """Next tokens; the last position has none."""
    return F.pad(ids[:, 1:], (0, 1), value=-100)


@pytest.mark.parametrize("seq", [1, 70])
@pytest.mark.parametrize("lrpe", ["first", "all"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_match_the_oracle_in_float64(seq: int, lrpe: str, tied: bool) -> None:
    model = make_model(variant_config(lrpe=lrpe, tie_embeddings=tied), torch.float64)
    ids = make_ids(2, seq)
    out = model(ids)
    assert out.logits.dtype == torch.float64
    assert_close(out.logits, oracle_logits(model.state_dict(), ids), limit=1e-11)


def test_logits_match_the_oracle_in_float32() -> None:
    model = make_model()
    ids = make_ids(2, 200)
    exact = oracle_logits(model.state_dict(), ids)
    assert_logits_agree(model(ids).logits, exact, DECODER_FLOAT32)


def test_bfloat16_model_is_as_near_as_its_dtype() -> None:
    model = make_model(dtype=torch.bfloat16)
    ids = make_ids(2, 64)
    out = model(ids)
    assert out.logits.dtype == torch.bfloat16
    assert all(layer.dtype == torch.float32 for layer in out.state.layers)
    exact = oracle_logits(model.state_dict(), ids)
    error = (out.logits.double() - exact).square().mean().sqrt() / exact.std()
    assert error < 16 * torch.finfo(torch.bfloat16).eps


def test_loss_and_gradients_match_the_oracle() -> None:
    model = make_model(dtype=torch.float64)
    ids = make_ids(2, 70)
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    logits = oracle_logits(weights, ids)
    exact = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    exact.backward()
    loss = model.loss(ids, labels_of(ids))
    loss.backward()
    assert math.isclose(loss.item(), exact.item(), rel_tol=1e-12)
    for name, parameter in model.named_parameters():
        limit = FORMS_GRADIENT_FLOAT64
        assert_close(parameter.grad, weights[name].grad, limit=limit, name=name)


def test_parameter_names_are_the_documented_ones() -> None:
    names = set(make_model(tnl_config(tie_embeddings=False)).state_dict())
    block = {
        f"blocks.{i}.{name}.weight"
        for i in range(LAYERS)
        for name in (
            "token_mixer.qkvu_proj",
            "token_mixer.out_proj",
            "channel_mixer.gate_proj",
            "channel_mixer.up_proj",
            "channel_mixer.down_proj",
        )
    }
    others = {"embedding.weight", "blocks.0.token_mixer.lrpe.theta", "lm_head.weight"}
    assert names == block | others
    assert "lm_head.weight" not in make_model().state_dict()


def test_initialisation_follows_the_configuration() -> None:
    torch.manual_seed(0)
    model = Decoder(tnl_config(init_std=0.02, vocab_size=5000, pad_token_id=3))
    assert abs(model.embedding.weight.std().item() - 0.02) < 0.0005
    assert abs(model.blocks[1].token_mixer.qkvu_proj.weight.std().item() - 0.02) < 0.002
    assert bool((model.embedding.weight[3] == 0).all())
    assert_close(model.blocks[0].token_mixer.lrpe.theta, oracles.lrpe_theta(HEADS, 16))


def test_a_model_built_on_meta_becomes_a_new_one_in_place() -> None:
    direct = Decoder(tnl_config())
    torch.manual_seed(5)
    direct.reset_parameters()
    with torch.device("meta"):
        model = Decoder(tnl_config())
    model.to_empty(device="cpu")
    torch.manual_seed(5)
    model.reset_parameters()
    ids = make_ids(1, 20)
    assert torch.equal(model(ids).logits, direct(ids).logits)


def test_state_dict_round_trip_is_exact() -> None:
    model, other = make_model(), Decoder(tnl_config())
    ids = make_ids(1, 20)
    assert not torch.equal(other(ids).logits, model(ids).logits)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids).logits, model(ids).logits)


def test_loss_reductions_and_ignored_labels() -> None:
    model = make_model()
    ids = make_ids(2, 20)
    labels = labels_of(ids)
    labels[0, 3:9] = -100
    valid = int((labels != -100).sum())
    mean, total = model.loss(ids, labels), model.loss(ids, labels, reduction="sum")
    assert math.isclose(total.item(), mean.item() * valid, rel_tol=1e-5)
    logits = model(ids).logits.double().flatten(0, 1)
    exact = F.cross_entropy(logits, labels.flatten(), ignore_index=-100)
    assert math.isclose(mean.item(), exact.item(), rel_tol=1e-6)
    assert mean.dtype == torch.float32


def test_loss_of_no_valid_label_is_zero_not_nan() -> None:
    model = make_model()
    ids = make_ids(1, 5)
    loss = model.loss(ids, torch.full_like(ids, -100))
    assert loss.item() == 0.0
    loss.backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_is_float32_and_needs_an_eighth_of_the_logits(dtype: torch.dtype) -> None:
    vocab_size, seq = 64_000, 768
    model = make_model(tnl_config(vocab_size=vocab_size, model_dim=8), dtype)
    ids = torch.randint(vocab_size, (1, seq))
    loss = model.loss(ids, ids)
    assert loss.dtype == torch.float32
    loss.backward()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(
        activities=activities, profile_memory=True, acc_events=True
    ) as profile:
        model.loss(ids, ids).backward()
    allocations = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(allocations, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert 0 < peak <= vocab_size * seq * dtype.itemsize / 8


@pytest.mark.parametrize("count", [1, 5, 20, 99])
def test_logits_to_keep_are_the_last(count: int) -> None:
    model = make_model()
    ids = make_ids(2, 20)
    assert_close(model(ids, logits_to_keep=count).logits, model(ids).logits[:, -count:])


@pytest.mark.parametrize("position", [0, 1, 63, 64, 99])
def test_logits_depend_on_no_later_token(position: int) -> None:
    model = make_model()
    ids = make_ids(1, 100)
    changed = ids.clone()
    changed[0, position] = (changed[0, position] + 1) % VOCAB
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.equal(before[:, position:], after[:, position:])


def test_rows_of_a_batch_do_not_meet() -> None:
    model = make_model()
    ids = make_ids(3, 70)
    whole = model(ids).logits
    for i in range(3):
        assert_logits_agree(model(ids[i : i + 1]).logits, whole[i : i + 1], DECODER_FLOAT32)


def test_offset_of_positions_changes_nothing() -> None:
    # LRPE is relative; far positions lose no digits.
    model = make_model()
    ids = make_ids(1, 70)
    far = model(ids, positions=torch.arange(70) + 4_000_000)
    assert_logits_agree(far.logits, model(ids).logits, DECODER_FLOAT32)
    assert far.state.positions.tolist() == [4_000_070]


def test_bidirectional_model_has_no_state() -> None:
    model = make_model(tnl_config(causal=False))
    ids = make_ids(2, 40)
    out = model(ids)
    assert out.state is None
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCAB
    assert not torch.equal(model(changed).logits[:, 0], out.logits[:, 0])
    state = make_model()(ids).state
    with pytest.raises(NotImplementedError, match="causal"):
        model(ids, state=state)


WRONG = [
    ("rank", lambda m, i: m(i[0]), ValueError, "input_ids"),
    ("float", lambda m, i: m(i.float()), TypeError, "input_ids"),
    ("empty", lambda m, i: m(i[:, :0]), ValueError, "input_ids"),
    ("no-rows", lambda m, i: m(i[:0]), ValueError, "input_ids"),
    ("id-high", lambda m, i: m(i + VOCAB), ValueError, "vocabulary"),
    ("id-low", lambda m, i: m(i - VOCAB), ValueError, "vocabulary"),
    ("mask-shape", lambda m, i: m(i, mask=torch.ones(2, 9) > 0), ValueError, "mask"),
    ("mask-type", lambda m, i: m(i, mask=torch.ones(2, 10)), TypeError, "mask"),
    ("positions", lambda m, i: m(i, positions=torch.arange(9)), ValueError, "positions"),
    ("positions-type", lambda m, i: m(i, positions=torch.rand(2, 10)), TypeError, "positions"),
    ("pack-rows", lambda m, i: m(i, cu_seqlens=torch.tensor([0, 10])), ValueError, "batch"),
    ("pack-end", lambda m, i: m(i[:1], cu_seqlens=torch.tensor([0, 9])), ValueError, "cu_seqlens"),
    ("keep", lambda m, i: m(i, logits_to_keep=0), ValueError, "logits_to_keep"),
    ("labels", lambda m, i: m.loss(i, i[:, 1:]), ValueError, "labels"),
    ("label", lambda m, i: m.loss(i, i + VOCAB), ValueError, "labels"),
    ("reduction", lambda m, i: m.loss(i, i, reduction="none"), ValueError, "reduction"),
    ("state-rows", lambda m, i: m(i, state=m(i[:1]).state), ValueError, "state"),
    ("state-layers", lambda m, i: m(i, state=_short(m(i).state)), ValueError, "state"),
]


def _short(state):
    return state._replace(layers=state.layers[:-1])


@pytest.mark.parametrize(
    ("call", "error", "named"), [pytest.param(*row[1:], id=row[0]) for row in WRONG]
)
def test_wrong_argument_is_refused(call, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        call(make_model(), make_ids(2, 10))


def test_counts_and_fingerprint() -> None:
    model = make_model()
    total = sum(p.numel() for p in model.parameters())
    assert model.num_parameters() == total
    assert model.num_parameters(embeddings=False) == total - VOCAB * 32
    assert model.fingerprint() == make_model().fingerprint()
    before = model.fingerprint()
    with torch.no_grad():
        model.blocks[1].channel_mixer.up_proj.weight[3, 3] += 1
    assert model.fingerprint() != before


def test_a_model_is_pickled_and_copied() -> None:
    model, ids = make_model(), make_ids(1, 9)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(twin(ids).logits, model(ids).logits)


def test_theta_is_float32_under_a_default_dtype_of_bfloat16() -> None:
    torch.set_default_dtype(torch.bfloat16)
    theta = Decoder(tnl_config()).blocks[0].token_mixer.lrpe.theta
    assert theta.dtype == torch.float32


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_ids": [[1, 2]]},
        {"state": (1, 2)},
        {"mask": [[True]]},
        {"positions": [1]},
        {"cu_seqlens": [0, 3]},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_is_no_tensor_is_a_type_error(arguments: dict[str, object]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(arguments))} is"):
        make_model()(**{"input_ids": make_ids(1, 3), **arguments})
