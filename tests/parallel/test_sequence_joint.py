"""Released layers over parts of sequences: one op with an exchange in its middle, and when."""

from typing import Any

import pytest
import sequence_joint_cases as cases
import torch
from compiled_cases import compiled_on_ranks
from kernel_cases import needs_interpreter
from nn.mixer_cases import MixerCase, ids_of, twice
from ranks import Ranks
from segment_cases import whole
from tolerances import JOINT_ATTENTION, assert_close

from transnormer.models.decoder import Decoder
from transnormer.nn.core import LinearAttentionCore
from transnormer.nn.token_mixers.lightning import LightningConfig
from transnormer.parallel.sequence_cores import SequenceLinearCore
from transnormer.parallel.sequence_part import SequenceAxis, cut
from transnormer.parallel.state_exchange import Chain

# In the middle a part of six tokens, the fewest of those that states pass through, and one of one.
LENGTHS = {1: (9,), 2: (7, 4), 3: (3, 6, 5), 4: (3, 1, 6, 2)}


def compare(ranks: Ranks, lengths: tuple[int, ...], exchange: str) -> None:
    found = ranks.run(len(lengths), cases.in_parts, lengths, exchange)
    assert [calls for _, calls in found] == [1] * len(lengths)
    for name, expected in cases.whole(sum(lengths)).items():
        parts = [result[name] for result, _ in found]
        actual = torch.cat(parts, 1) if name in ("x", "y") else parts[0]
        assert_close(actual, expected, limit=JOINT_ATTENTION[torch.float32], name=name)


@needs_interpreter
@pytest.mark.parametrize("exchange", ["gather", "ring", "scan"])
def test_the_joint_layer_in_parts_is_the_layer(ranks: Ranks, exchange: str) -> None:
    # Three ranks: the first head's states go to neighbours alone.
    compare(ranks, LENGTHS[3], exchange)


@needs_interpreter
@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_ranks_and_parts_of_any_length(ranks: Ranks, count: int) -> None:
    compare(ranks, LENGTHS[count], "gather")


@needs_interpreter
def test_compiled_blocks_leave_their_graphs_for_it(ranks: Ranks) -> None:
    def model(implementation: str, dtype: torch.dtype) -> Decoder:
        mixer = LightningConfig(heads=2, implementation=implementation)
        return MixerCase("joint", twice(mixer)[:1]).model(dtype).train()

    batch = {"input_ids": ids_of(1, 11), "labels": ids_of(1, 11, 7)}
    exact = whole(model("auto", torch.float64), batch)
    args = (model("triton", torch.float32), batch, None)
    for found, products in ranks.run(2, compiled_on_ranks, *args):
        for name, expected in exact.items():
            assert_close(found[name], expected, limit=JOINT_ATTENTION[torch.float32], name=name)
        # Both projections of the mixer and those of the channel mixer.
        assert products >= 4


def core_of(rank: int = 0, lengths: tuple[int, ...] = (4, 1, 3), **options: Any) -> Any:
    """A core whose op in parts only says that it was asked."""
    axis = SequenceAxis(Chain(None, rank, len(lengths)), **options)
    axis.part, _ = cut(sum(lengths), rank, lengths)
    core = SequenceLinearCore(LinearAttentionCore(), axis)
    core.joint_in_parts = lambda *_, **__: "in parts"
    return core


def ask(core: Any, *, seq: int = 4, **changes: Any) -> Any:
    # Shapes and dtypes alone are asked: no GPU needs to be there.
    given = {"projected": torch.empty(2, seq, 4 * 32, device="meta"), "log_decay": None}
    options = {"head_dim": 16, "eps": 1e-6, "cu_seqlens": None, "implementation": "auto"}
    return core.joint(**(given | options | changes))


def test_all_ranks_take_the_joint_op_whatever_their_part() -> None:
    for lengths in ((4, 1, 3), (1, 1), (8,)):
        for rank, seq in enumerate(lengths):
            assert ask(core_of(rank, lengths), seq=seq) == "in parts"


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"overlap": True}, {}),
        ({}, {"cu_seqlens": torch.tensor([0, 4])}),
        ({}, {"projected": torch.empty(2, 4, 128)}),
        ({}, {"projected": torch.empty(2, 4, 128, dtype=torch.float64, device="meta")}),
        ({}, {"log_decay": torch.zeros(2, device="meta", requires_grad=True)}),
    ],
    ids=["overlap", "packed", "cpu", "float64", "trained_decay"],
)
def test_what_the_op_cannot_do_takes_the_way_by_parts(
    options: dict[str, Any], changes: dict[str, Any]
) -> None:
    assert ask(core_of(**options), **changes) is None


def test_pads_in_one_part_take_all_parts_the_same_way() -> None:
    for rank in range(3):
        core = core_of(rank)
        core.axis.part = core.axis.part._replace(mask=torch.ones(2, 8, dtype=torch.bool))
        # Most parts have no pads, and are called without a mask.
        assert ask(core) is None


def test_a_core_without_a_part_runs_the_plain_op() -> None:
    core, plain = core_of(), LinearAttentionCore()
    core.axis.part = None
    given = {"projected": torch.randn(1, 3, 128), "log_decay": torch.tensor([-0.1, -0.2])}
    assert torch.equal(ask(core, **given), ask(plain, **given))


def test_other_cores_say_for_themselves() -> None:
    class Elsewhere(LinearAttentionCore):
        """A core that keeps its states elsewhere."""

    assert ask(Elsewhere()) is None


@pytest.mark.parametrize("given", ["state", "mask", "keep_state"])
def test_layers_with_states_or_pads_are_not_joint(given: str) -> None:
    mixer, x = cases.layer("auto"), torch.randn(2, 3, cases.DIM)
    asked = []
    mixer.core.joint = lambda *args, **_: asked.append(args)
    changes = {
        "state": {"state": mixer.empty_state(2)},
        "mask": {"mask": torch.ones(2, 3, dtype=torch.bool)},
        "keep_state": {"keep_state": True},
    }
    positions = torch.arange(3).expand(2, -1)
    mixer(x, positions=positions, **({"keep_state": False} | changes[given]))
    assert not asked
    mixer(x, positions=positions, keep_state=False)
    assert len(asked) == 1
