"""Segments, checkpointing and compiled blocks in a run: the same updates."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import COMPILED_LOSS, RESIDUAL_LOSS, SEGMENTS
from torch._dynamo.testing import CompileCounterWithBackend
from train_cases import Found, Notes, constant_evaluation, tiny_run

from transnormer.models.compilation import compile_blocks
from transnormer.models.decoder import Decoder
from transnormer.train import OneProcess, RunConfig, model_setup, run_training

MakeConfig = Callable[..., RunConfig]


class Keep(OneProcess):
    """One process in float64 that keeps the last gradient."""

    def wrap(self, model: Decoder, values: None = None) -> Decoder:
        return model.double()

    def after_backward(self, model: Decoder) -> None:
        self.grad = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_segments_change_no_gradient(make_config: MakeConfig, tmp_path: Path, packing: str) -> None:
    grads = []
    for name, override in (("whole", "seed=0"), ("parts", "segment_tokens=7")):
        config = make_config(
            "train.steps=1",
            "train.micro_batch=2",
            "model.dropout=0",
            f"data.packing={packing}",
            f"train.{override}",
            f"output.dir={tmp_path / name}",
        )
        run_training(config, sync=(keep := Keep()))
        grads.append(keep.grad)
    assert (grads[0] - grads[1]).norm() <= SEGMENTS * grads[0].norm()


def test_a_model_with_a_growing_state_is_refused_before_the_run(make_config: MakeConfig) -> None:
    config = make_config("train.segment_tokens=8")
    block = {"token_mixer": {"kind": "softmax", "heads": 2}, "channel_mixer": None}
    data = config.model_dump() | {"model": {"model_dim": 16, "blocks": [block]}}
    with pytest.raises(NotImplementedError, match="kind is 'softmax', whose state holds every"):
        run_training(RunConfig.model_validate(data))
    assert not Path(config.output.dir).exists()


def test_segments_are_for_the_causal_objective(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match="train.segment_tokens is 8; expected it unset for"):
        make_config("train.segment_tokens=8", "objective.kind=masked", "model.causal=false")


def test_checkpointing_changes_no_bit(make_config: MakeConfig, tmp_path: Path) -> None:
    losses = []
    for mode in ("none", "selective", "full"):
        config = make_config(f"train.checkpointing={mode}", f"output.dir={tmp_path / mode}")
        run_training(config, progress=(notes := Notes()))
        losses.append([report.loss for report in notes.steps])
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_follow_the_plain_run(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(model_setup, "compile_blocks", partial(compile_blocks, backend=counter))
    losses = {}
    for compiled in ("false", "true"):
        config = make_config(
            f"train.compile={compiled}",
            "train.eval_every=2",
            "model.dropout=0",
            f"output.dir={tmp_path / compiled}",
        )
        run_training(config, evaluate=reading, progress=(notes := Notes()))
        losses[compiled] = [report.loss for report in notes.steps]
    assert losses["true"] == pytest.approx(losses["false"], rel=COMPILED_LOSS)
    # Two kinds of blocks, and nothing for the lengths that evaluations read.
    assert counter.frame_count == 2


WEIGHTS = "train.weights=bfloat16"


def losses_in_bfloat16(folder: Path, *settings: str) -> list[float]:
    """The losses of 200 steps."""
    config = tiny_run(
        folder,
        *settings,
        "train.precision=bfloat16",
        "train.steps=200",
        "model.dropout=0",
        # The rate of the recipe: at larger ones both curves leave any third one too.
        "optimizer.lr=3e-4",
    )
    run_training(config, progress=(notes := Notes()))
    return [report.loss for report in notes.steps]


@pytest.fixture(scope="module")
def plain_losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Those of float32 weights and a float32 stream."""
    return losses_in_bfloat16(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    "settings",
    [
        ("train.residual=bfloat16",),
        (WEIGHTS,),
        pytest.param((WEIGHTS, "train.micro_batch=1"), marks=pytest.mark.slow),
        pytest.param(
            (WEIGHTS, "train.segment_tokens=8", "train.residual=bfloat16"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["residual", "weights", "weights-parts", "weights-segments"],
)
def test_a_bfloat16_stream_or_weights_follow_float32_ones(
    plain_losses: list[float], tmp_path: Path, settings: tuple[str, ...]
) -> None:
    losses = losses_in_bfloat16(tmp_path, *settings)
    assert losses == pytest.approx(plain_losses, rel=RESIDUAL_LOSS)
    assert losses != plain_losses


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ((), torch.bfloat16),
        (("train.micro_batch=1",), torch.float32),
        (("train.segment_tokens=8",), torch.float32),
        (("train.micro_batch=1", "optimizer.states=bfloat16"), torch.bfloat16),
    ],
)
def test_gradients_of_bfloat16_weights_add_up_in_float32(
    make_config: MakeConfig, settings: tuple[str, ...], dtype: torch.dtype
) -> None:
    seen = set()

    class Look(OneProcess):
        """Sees the gradients of a step."""

        def after_backward(self, model: Decoder) -> None:
            held = [p for p in model.parameters() if p.dtype == torch.bfloat16]
            seen.update(p.grad.dtype for p in held if p.grad is not None)

    config = make_config(WEIGHTS, "train.precision=bfloat16", "train.steps=2", *settings)
    run_training(config, sync=Look())
    assert seen == {dtype}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.residual=bfloat16"], "residual is 'bfloat16' beside precision 'float32'"),
        (["train.activation_memory=0.5"], "activation_memory is 0.5 with compile False"),
        (
            ["train.activation_memory=0.5", "train.compile=true", "train.checkpointing=full"],
            "activation_memory is 0.5 with compile True and checkpointing 'full'",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    make_config: MakeConfig, overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(*overrides)


def reading(model: Decoder, *arguments: Any, progress: object) -> Found:
    """An evaluation that reads lengths of its own."""
    for seq in (3, 5, 9):
        model(torch.zeros(1, seq, dtype=torch.int64))
    return constant_evaluation(model, *arguments)
