"""TransNormer's layers on grids: blocks of neighbours, LRPE by coordinates."""

import itertools
import math

import oracles_transnormer as oracles
import pytest
import torch
from pydantic import ValidationError
from tolerances import GRADIENT_FLOAT64, assert_close
from torch import Tensor

from transnormer.models.zoo.transnormer import NORM, norm_attention
from transnormer.nn.block_attention import grid_block_attention
from transnormer.nn.grid import from_blocks, to_blocks
from transnormer.nn.rotary import Rotary
from transnormer.nn.token_mixers import DiagAttentionConfig, LightningConfig

DIM, HEADS = 20, 2
# Grid and block: whole blocks, ragged edges, blocks beyond the grid, three axes.
GRIDS = [
    ((4, 6), (2, 3)),
    ((5, 7), (4, 4)),
    ((3, 2), (4, 4)),
    ((1, 9), (1, 4)),
    ((3, 4, 2), (2, 3, 2)),
]


def random_weights(mixer):
    mixer = mixer.double()
    with torch.no_grad():
        for x in mixer.parameters():
            x.copy_(0.5 * torch.randn(x.shape))
    return mixer


def diag(weights: str = "softmax", block_shape: tuple[int, ...] = (4, 4), **changes: object):
    fields = {"norm": NORM} if weights == "relu" else {}
    fields |= {"heads": HEADS, "weights": weights, "block_shape": block_shape} | changes
    return random_weights(DiagAttentionConfig(**fields).build(DIM, 0, 2, causal=False))


def norm(variant: str = "t1", axes: int = 2, **changes: object):
    config = norm_attention(variant, HEADS, axes=axes).model_copy(update=changes)
    return random_weights(config.build(DIM, 1, 2, causal=False))


def tokens(shape: tuple[int, ...], batch: int = 2) -> Tensor:
    return torch.randn(batch, math.prod(shape), DIM, dtype=torch.float64)


def run(mixer, x: Tensor, shape: tuple[int, ...] | None, **inputs: object) -> Tensor:
    positions = torch.arange(x.shape[1]).expand(x.shape[:2])
    y, state = mixer(x, **({"positions": positions, "shape": shape} | inputs))
    assert state is None
    return y


def exact(mixer, x: Tensor, shape: tuple[int, ...], mask: Tensor | None = None) -> Tensor:
    """The layer by the formula, row by row."""
    is_diag = isinstance(mixer.config, DiagAttentionConfig)
    proj = mixer.qkv_proj if is_diag else mixer.qkvu_proj
    q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in proj(x).chunk(3, -1))
    rotary, rows = (mixer.lrpe.theta, mixer.lrpe.reflection), []
    mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    for row in zip(q, k, v, mask, strict=True):
        *parts, real = row
        if is_diag:
            block, weights = mixer.config.block_shape, mixer.config.weights
            o = oracles.diag_attention_grid(*parts, shape, block, weights, *rotary, real)
            rows.append(oracles.outer_srms(o) if mixer.config.norm else o)
        else:
            phi = mixer.config.qk_activation
            rows.append(oracles.norm_attention_grid(*parts, shape, phi, *rotary, real))
    return mixer.out_proj(torch.stack(rows))


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("weights", ["softmax", "relu"])
@pytest.mark.parametrize(("shape", "block"), GRIDS, ids=str)
def test_diag_attention_matches_the_formula(
    shape: tuple[int, ...], block: tuple[int, ...], weights: str, masked: bool
) -> None:
    mixer, x = diag(weights, block), tokens(shape)
    mask = torch.rand(x.shape[:2]) < 0.6 if masked else torch.ones(x.shape[:2], dtype=torch.bool)
    with torch.no_grad():
        y = run(mixer, x, shape, mask=mask if masked else None)
        assert_close(y[mask], exact(mixer, x, shape, mask)[mask])


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("variant", ["t1", "t2"])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 2)], ids=str)
def test_norm_attention_matches_the_formula(
    shape: tuple[int, ...], variant: str, masked: bool
) -> None:
    mixer, x = norm(variant, len(shape)), tokens(shape)
    mask = torch.rand(x.shape[:2]) < 0.6 if masked else torch.ones(x.shape[:2], dtype=torch.bool)
    with torch.no_grad():
        y = run(mixer, x, shape, mask=mask if masked else None)
        assert_close(y[mask], exact(mixer, x, shape, mask)[mask])


def test_gradients_are_those_of_the_formula() -> None:
    mixer, x = diag(block_shape=(2, 2)), tokens((3, 3), 1).requires_grad_()
    leaves = (x, *mixer.parameters())
    weights = torch.randn(1, 9, DIM, dtype=torch.float64)
    actual = torch.autograd.grad((run(mixer, x, (3, 3)) * weights).sum(), leaves)
    wanted = torch.autograd.grad((exact(mixer, x, (3, 3)) * weights).sum(), leaves)
    for mine, by_formula in zip(actual, wanted, strict=True):
        assert_close(mine, by_formula, limit=GRADIENT_FLOAT64)


@pytest.mark.parametrize(("shape", "block"), GRIDS, ids=str)
def test_blocks_come_apart_and_together(shape: tuple[int, ...], block: tuple[int, ...]) -> None:
    x = torch.randn(2, math.prod(shape), 3)
    blocks = to_blocks(x, shape, block)
    count = math.prod(-(-extent // size) for extent, size in zip(shape, block, strict=True))
    assert blocks.shape == (2, count, math.prod(block), 3)
    assert torch.equal(from_blocks(blocks, shape, block), x)


def test_a_token_sees_its_own_block_alone() -> None:
    mixer, x = diag(), tokens((6, 7), 1)
    changed = x.clone()
    changed[:, 1 * 7 + 5] += 1.0
    moved = (run(mixer, x, (6, 7)) != run(mixer, changed, (6, 7))).any(-1)[0].view(6, 7)
    block = torch.zeros(6, 7, dtype=torch.bool)
    block[:4, 4:] = True
    assert torch.equal(moved, block)


@pytest.mark.parametrize("weights", ["softmax", "relu"])
def test_a_block_of_pads_alone_has_finite_values_and_gradients(weights: str) -> None:
    mixer, x = diag(weights), tokens((6, 4)).requires_grad_()
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[0, :16] = False
    y = run(mixer, x, (6, 4), mask=mask)
    y[mask].square().sum().backward()
    assert bool(torch.isfinite(y).all())
    assert bool(torch.isfinite(x.grad).all())
    assert bool((x.grad[~mask] == 0).all())


def test_every_query_is_given_a_key_and_no_filled_place() -> None:
    # Softmax over nothing is not a number in every implementation of it.
    mask = torch.ones(1, 15, dtype=torch.bool)
    mask[0, [0, 1, 5, 6]] = False
    q = torch.ones(1, 15, 1, 1)

    def attend(q: Tensor, k: Tensor, v: Tensor, distance: Tensor, visible: Tensor) -> Tensor:
        assert visible.sum(-1).flatten().tolist() == [1, 4, 2, 2, 2, 1]
        return v

    grid_block_attention(q, q, q, attend, shape=(3, 5), block_shape=(2, 2), mask=mask)


def test_one_line_of_a_grid_is_a_sequence() -> None:
    mixer = diag(block_shape=(1, 4), lrpe=False)
    fields = {"heads": HEADS, "block_size": 4, "lrpe": False}
    line = DiagAttentionConfig(**fields).build(DIM, 0, 2, causal=False).double()
    line.load_state_dict(mixer.state_dict())
    x = tokens((1, 11))
    assert_close(run(mixer, x, (1, 11)), run(line, x, None).detach())


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_rotary_scores_depend_on_differences_of_coordinates(axes: int) -> None:
    rotary = Rotary(14, axes=axes, learned=True, reflect=True).double()
    assert rotary.theta.shape == (-(-7 // axes),)
    shape = (7, 5, 4)[:axes]
    places = list(itertools.product(*(range(extent) for extent in shape)))
    q, k = (torch.randn(14, dtype=torch.float64).expand(1, len(places), 1, 14) for _ in "qk")
    q, k = rotary((q, k), torch.arange(len(places))[None], shape)
    scores = torch.einsum("bthk,bshk->ts", q, k)
    by_difference: dict[tuple[int, ...], list[Tensor]] = {}
    for t, s in itertools.product(range(len(places)), repeat=2):
        key = tuple(a - b for a, b in zip(places[t], places[s], strict=True))
        by_difference.setdefault(key, []).append(scores[t, s])
    groups = [torch.stack(group) for group in by_difference.values()]
    means = torch.stack([group.mean() for group in groups])
    for group in groups:
        assert bool(((group - group.mean()).abs() < 1e-10).all())
    # Each axis is seen: other differences, other scores.
    assert means.detach().sort().values.diff().min() > 1e-9


def test_the_doubled_form_turns_by_coordinates_too() -> None:
    mixer = norm(lrpe_form="doubled")
    x = tokens((3, 4))
    q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in mixer.qkvu_proj(x).chunk(3, -1))
    q, k = torch.nn.functional.elu(q), torch.nn.functional.elu(k)
    theta = mixer.lrpe.theta[:, 0]
    row, column = torch.arange(12) // 4, torch.arange(12) % 4
    angles = torch.cat([where[:, None, None] * theta for where in (row, column)], -1)
    cosines = (angles[:, None] - angles).cos()
    o = torch.einsum("bthk,bshk,tshk,bshv->bthv", q, k, cosines, v).flatten(2)
    wanted = mixer.out_proj(oracles.outer_srms(o))
    assert_close(run(mixer, x, (3, 4)), wanted.detach())


def test_the_doubled_form_takes_the_frequencies_asked_for() -> None:
    changes = {"lrpe_form": "doubled", "lrpe_init": "half"}
    config = norm_attention("t1", HEADS, axes=2).model_copy(update=changes)
    theta = config.build(DIM, 1, 2, causal=False).lrpe.theta
    assert theta.shape == (HEADS, 1, 5)
    assert (theta == 0).flatten(1).tolist() == [[False] * 3 + [True] * 2] * HEADS


def test_without_axes_a_shape_changes_nothing() -> None:
    x = tokens((3, 4))
    fields = {"heads": HEADS, "block_size": 5}
    near = random_weights(DiagAttentionConfig(**fields).build(DIM, 0, 2, causal=False))
    for mixer in (near, norm(axes=1)):
        assert torch.equal(run(mixer, x, (3, 4)), run(mixer, x, None))


@pytest.mark.parametrize(
    "build", [diag, lambda: diag(lrpe=False), norm], ids=["diag", "diag-no-lrpe", "norm"]
)
def test_grids_that_do_not_fit_are_refused(build) -> None:
    mixer, x = build(), tokens((3, 4))
    for shape, message in (
        (None, "shape is None; expected 2 extents"),
        ((12,), r"shape is \(12,\); expected 2 extents"),
        ((3, 5), r"15 tokens; expected the 12"),
    ):
        with pytest.raises(ValueError, match=message):
            run(mixer, x, shape)
    with pytest.raises(NotImplementedError, match=r"cu_seqlens is given; expected None"):
        run(mixer, x[:1], (3, 4), cu_seqlens=torch.tensor([0, 12]))


def test_causal_grids_and_axes_of_nothing_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"block_shape is \(4, 4\).*causal=False"):
        DiagAttentionConfig(heads=2, block_shape=(4, 4)).build(DIM, 0, 2, causal=True)
    with pytest.raises(NotImplementedError, match=r"lrpe_axes is 2.*causal=False"):
        norm_attention("t1", 2, axes=2).build(DIM, 0, 2, causal=True)
    with pytest.raises(ValueError, match=r"lrpe_axes is 2.*lrpe is False"):
        LightningConfig(heads=2, lrpe_axes=2).build(DIM, 0, 2, causal=False)
    for block in ((4,), (4, 0)):
        with pytest.raises(ValidationError, match="block_shape"):
            DiagAttentionConfig(heads=2, block_shape=block)


def test_a_token_of_a_block_costs_its_block() -> None:
    assert diag().mixing_flops(1000) == 4.0 * 16 * DIM
