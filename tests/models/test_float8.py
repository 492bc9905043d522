"""Float8 products in training: rounded as the recipes say, in the blocks' projections alone."""

import sys
from collections.abc import Callable

import pytest
import torch
from compiled_cases import CompileCounterWithBackend
from tolerances import COMPILED_GRADIENT, FLOAT8_PRODUCT, assert_close
from torch import Tensor, nn

from transnormer.models import zoo
from transnormer.models.compilation import compile_blocks
from transnormer.models.decoder import Decoder
from transnormer.models.float8 import Float8, large_projections, use_float8
from transnormer.models.recompute import set_checkpointing

CPU = torch.device("cpu")
RECIPES: tuple[Float8, ...] = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
UP = "blocks.0.channel_mixer.up_proj"


def make(recipe: Float8 = "none", *, layers: int = 2, glu_dim: int = 96) -> Decoder:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "model_dim": 64, "num_layers": layers, "heads": 2}
    model = Decoder(zoo.tnl_custom(**sizes, glu_dim=glu_dim)).train()
    use_float8(model, recipe, CPU)
    return model


def rounded(x: Tensor, dtype: torch.dtype, over: int | None, powers: bool) -> Tensor:
    """x, float64, as numbers of 8 bits times a scale: one for all, or one along each row of a dim."""
    largest = x.abs().max() if over is None else x.abs().amax(over, keepdim=True)
    scale = (torch.finfo(dtype).max / largest).float()
    if powers:
        scale = 2.0 ** scale.log2().floor()
    return (x.float() * scale).to(dtype).double() / scale.double()


def products(recipe: Float8, x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y = x w^T, dx = dy w and dw = dy^T x of rounded factors, summed in float64."""
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    if recipe == "tensorwise":
        x, w = (rounded(t, e4m3, None, False) for t in (x, w))
        dy = rounded(dy, e5m2, None, False)
        return x @ w.T, dy @ w, dy.T @ x
    y = rounded(x, e4m3, 1, True) @ rounded(w, e4m3, 1, True).T
    kept = recipe == "rowwise_with_gw_hp"
    dx = rounded(dy, e4m3, 1, True) @ rounded(w, e4m3, None if kept else 0, True)
    if kept:
        return y, dx, dy.T @ x
    return y, dx, rounded(dy, e4m3, 0, True).T @ rounded(x, e4m3, 0, True)


def step(model: Decoder) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients on fixed tokens, under bfloat16 autocast."""
    ids = torch.arange(64).view(2, 32) * 7 % 32
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(ids, ids.roll(-1, 1))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recipe", RECIPES)
def test_products_are_those_of_rounded_factors(recipe: Float8) -> None:
    layer = make(recipe).get_submodule(UP)
    generator = torch.Generator().manual_seed(1)
    # Rows and columns of very different sizes: a wrong granularity or dim shows.
    x, dy = torch.randn(32, 64, generator=generator), torch.randn(32, 96, generator=generator)
    x, dy = (
        t * 2.0 ** torch.randint(-6, 6, t.shape[:1], generator=generator)[:, None] for t in (x, dy)
    )
    x = (x * torch.arange(1, 65)).requires_grad_()
    y = layer(x.view(2, 16, 64))
    y.backward(dy.view(2, 16, 96))
    exact = products(recipe, x.detach().double(), layer.weight.detach().double(), dy.double())
    for name, found, expected in zip(
        ("y", "dx", "dw"), (y.flatten(0, 1), x.grad, layer.weight.grad), exact, strict=True
    ):
        assert found.dtype == torch.float32
        assert_close(found, expected, limit=FLOAT8_PRODUCT, name=name)


def test_inputs_are_rounded_to_autocasts_dtype_before_8_bits() -> None:
    layer, x = make("tensorwise").get_submodule(UP), torch.randn(16, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    assert not torch.equal(y, layer(x).bfloat16())


def test_large_projections_of_blocks_alone_are_converted() -> None:
    config = zoo.tnl_scaling("70m").model_copy(update={"tie_embeddings": False})
    with torch.device("meta"):
        model = Decoder(config)
    before = {name: (id(p), p.dtype) for name, p in model.named_parameters()}
    found = set(large_projections(model))
    use_float8(model, "rowwise", CPU)
    assert {name: (id(p), p.dtype) for name, p in model.named_parameters()} == before
    changed = {n for n, m in model.named_modules() if "Float8" in type(m).__name__}
    assert changed == found
    assert {name.rsplit(".", 1)[1] for name in changed} == {
        "qkvu_proj", "out_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    # Beside the head and the low-rank gates' two products a layer.
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == len(changed) + 1 + 2 * len(config.blocks)


@pytest.mark.parametrize("name", ["tnl-385m", "tnl-1b", "tnl-7b"])
def test_four_fifths_of_the_work_are_in_float8(name: str) -> None:
    from transnormer.models.cost import ModelCost

    with torch.device("meta"):
        model = Decoder(zoo.get(name))
    inside = sum(2 * m.weight.numel() for m in large_projections(model).values())
    assert inside > 0.8 * ModelCost.of(model.config).flops(1024).total


@pytest.mark.parametrize("recipe", RECIPES)
def test_evaluation_multiplies_in_the_models_own_precision(recipe: Float8) -> None:
    ids = torch.arange(7)[None]
    assert torch.equal(make(recipe).eval()(ids).logits, make().eval()(ids).logits)
    ids = torch.arange(16)[None]
    assert not torch.equal(make(recipe)(ids).logits, make()(ids).logits)


@pytest.mark.parametrize("recipe", RECIPES)
def test_blocks_computed_again_give_the_same_gradients(recipe: Float8) -> None:
    loss, exact = step(make(recipe))
    assert all(grad.dtype == torch.float32 for grad in exact.values())
    for mode in ("selective", "full"):
        model = make(recipe)
        set_checkpointing(model, mode)
        again, found = step(model)
        assert torch.equal(again, loss)
        assert all(torch.equal(found[name], grad) for name, grad in exact.items())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "recipe",
    [RECIPES[0], *(pytest.param(recipe, marks=pytest.mark.slow) for recipe in RECIPES[1:])],
)
def test_compiled_blocks_are_whole_and_shared_by_layers(recipe: Float8) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager_decomp_partition")
    model = make(recipe, layers=4)
    compile_blocks(model, backend=counter, activation_memory=0.9)
    loss, found = step(model)
    # The first layer has LRPE, the others have not.
    assert counter.frame_count == 2
    plain, exact = step(make(recipe, layers=4))
    assert_close(loss, plain.double(), limit=COMPILED_GRADIENT)
    for name, grad in exact.items():
        assert_close(found[name], grad.double(), limit=COMPILED_GRADIENT, name=name)


def no_float8(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    return torch.device("cuda")


def no_torchao(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setitem(sys.modules, "torchao", None)
    return CPU


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            no_float8,
            "compute capability is 8.6; expected at least 8.9 .* set train.float8 to 'none'",
        ),
        (no_torchao, "float8 products need torchao; run: pip install"),
    ],
)
def test_a_machine_that_cannot_is_refused_before_anything_changes(
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable[[pytest.MonkeyPatch], torch.device],
    message: str,
) -> None:
    device, model = prepare(monkeypatch), make()
    with pytest.raises(RuntimeError, match=message):
        use_float8(model, "tensorwise", device)
    assert len(large_projections(model)) == 10
    assert all(type(m) is nn.Linear for m in large_projections(model).values())


def test_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"gate_proj has 64 inputs and 88 outputs; expected multiples of 16 for"
    ):
        make("rowwise", glu_dim=88)
    with pytest.raises(ValueError, match="the model has no large projection in a block"):
        use_float8(nn.Linear(16, 16), "rowwise", CPU)
    unknown: list = ["blockwise"]
    with pytest.raises(ValueError, match="float8 is 'blockwise'; expected one of none, tensorwise"):
        use_float8(make(), unknown[0], CPU)
