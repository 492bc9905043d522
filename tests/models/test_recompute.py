"""Activation checkpointing and compiled blocks: the same gradients for less memory or time."""

import copy
import weakref
from typing import Any

import pytest
import torch
from decoder_cases import adapted, make_ids, make_model, tnl_config
from nn.mixer_cases import CASES, MixerCase
from tolerances import COMPILED_LOSS, SEGMENTS
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from transnormer.models.compilation import compile_blocks
from transnormer.models.decoder import Decoder
from transnormer.models.recompute import set_checkpointing
from transnormer.models.segments import backward_in_segments

# The compiler looks at the field of every tensor that it is given.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
MODES = ("selective", "full")
BOUNDS = torch.tensor([0, 13, 41], dtype=torch.int32)
every_mode = pytest.mark.parametrize("mode", MODES)
every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def gradients(model: Decoder, **options: Any) -> list[Tensor]:
    ids = make_ids(1, 41) % model.config.vocab_size
    model.zero_grad()
    model.loss(ids, ids, **options).backward()
    return [x.grad.clone() for x in model.parameters() if x.grad is not None]


@every_mode
@every_case
def test_gradients_are_bit_equal(case: MixerCase, mode: str) -> None:
    model = case.model(torch.float64)
    exact = gradients(model, cu_seqlens=BOUNDS)
    set_checkpointing(model, mode)
    assert all(map(torch.equal, gradients(model, cu_seqlens=BOUNDS), exact))


@every_mode
def test_dropout_repeats_its_masks(mode: str) -> None:
    model = make_model(tnl_config(dropout=0.3)).train()
    torch.manual_seed(3)
    exact = gradients(model)
    set_checkpointing(model, mode)
    torch.manual_seed(3)
    assert all(map(torch.equal, gradients(model), exact))


@every_mode
def test_dropout_of_adapters_repeats_its_masks(mode: str) -> None:
    model = adapted()
    torch.manual_seed(3)
    exact = gradients(model)
    set_checkpointing(model, mode)
    torch.manual_seed(3)
    assert all(map(torch.equal, gradients(model), exact))


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self._seen = 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is not None and storage not in self._seen:
                self._seen.add(storage)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._drop, storage.nbytes())
        return out

    def _drop(self, size: int) -> None:
        self.bytes -= size


def test_less_is_kept_and_only_full_repeats_products() -> None:
    ids, kept, flops = make_ids(2, 64), {}, {}
    for mode in ("none", *MODES):
        model = make_model()
        set_checkpointing(model, mode)
        with Live() as live:
            loss = model.loss(ids, ids)
            kept[mode] = live.bytes
        with FlopCounterMode(display=False) as counter:
            model.loss(ids, ids).backward()
        flops[mode] = counter.get_total_flops()
        del loss
    assert kept["full"] < 0.5 * kept["selective"] < 0.4 * kept["none"]
    assert flops["selective"] == flops["none"] < flops["full"]


def test_a_mode_replaces_the_one_before_and_copies_keep_it() -> None:
    model = make_model()
    names, plain = list(model.state_dict()), type(model.blocks[0])
    set_checkpointing(model, "full")
    twin = copy.deepcopy(model)
    assert type(twin.blocks[0]) is type(model.blocks[0]) is not plain
    assert list(twin.state_dict()) == names
    set_checkpointing(model, "none")
    assert type(model.blocks[0]) is plain
    with pytest.raises(ValueError, match="checkpointing is 'some'; expected one of none, sel"):
        set_checkpointing(model, "some")


def deep(layers: int) -> Decoder:
    """A model of two kinds of blocks: with and without LRPE."""
    config = tnl_config()
    blocks = (config.blocks[0], *config.blocks[1:2] * (layers - 1))
    return make_model(config.model_copy(update={"blocks": blocks}), torch.float64)


@pytest.mark.parametrize("mode", ["none", *MODES])
def test_compiled_blocks_give_the_same_gradients(mode: str) -> None:
    model = deep(3)
    exact = gradients(model, cu_seqlens=BOUNDS)
    set_checkpointing(model, mode)
    torch._dynamo.reset()
    compile_blocks(model, backend="aot_eager")
    for found, wanted in zip(gradients(model, cu_seqlens=BOUNDS), exact, strict=True):
        assert (found - wanted).norm() <= SEGMENTS * wanted.norm()


def test_each_kind_of_block_is_compiled_once() -> None:
    for layers in (2, 6):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        model = deep(layers)
        compile_blocks(model, backend=counter)
        for _ in range(2):
            gradients(model)
        assert counter.frame_count == 2


@pytest.mark.slow
def test_compiled_blocks_train_in_segments() -> None:
    model = deep(3)
    exact = gradients(model, reduction="sum")
    torch._dynamo.reset()
    compile_blocks(model, backend=(counter := CompileCounterWithBackend("aot_eager")))
    ids = make_ids(1, 41)
    model.zero_grad()
    backward_in_segments(model, ids, ids, segment_tokens=8)
    for x, wanted in zip(model.parameters(), exact, strict=True):
        assert (x.grad - wanted).norm() <= SEGMENTS * wanted.norm()
    made = counter.frame_count
    backward_in_segments(model, ids, ids, segment_tokens=8)
    assert counter.frame_count == made <= 8


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", *MODES])
def test_losses_of_inductor_follow_the_plain_ones(mode: str) -> None:
    losses = {}
    for compiled in (False, True):
        model = make_model().train()
        set_checkpointing(model, mode if compiled else "none")
        if compiled:
            torch._dynamo.reset()
            compile_blocks(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[compiled] = []
        for step in range(10):
            ids = make_ids(2, 41, seed=step)
            loss = model.loss(ids[:, :-1], ids[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[compiled].append(loss.item())
    for found, wanted in zip(losses[True], losses[False], strict=True):
        assert abs(found - wanted) <= COMPILED_LOSS * wanted
