"""The `[train]` table of a run: how long, how fast, in how much memory."""

from typing import Literal

from pydantic import Field, model_validator

from transnormer.config import Config
from transnormer.models.float8 import Float8
from transnormer.models.recompute import Checkpointing


class TrainConfig(Config):
    """The loop.

    Attributes:
        steps: updates in all; the schedule spans them.
        tokens_per_step: a multiple of data.seq: one update's samples times data.seq.
        seed: of initialisation, dropout and the order of samples.
        eval_every: steps between evaluations on the held-out part; 0 is only before and after.
        eval_bytes: evaluate on so many bytes, spread over the held-out part; 0 is all of it, and
            the one that classification takes.
        save_every: steps between checkpoints; 0 is only at the end.
        keep_last: checkpoints that are kept; 0 keeps all.
        save_async: write checkpoints beside the training, from a copy in the host's memory of what
            each process holds of weights and optimizer; false waits for them and needs no copy.
        precision: `auto` is bfloat16 autocast on a GPU and on a CPU with AMX, float32 elsewhere.
        weights: what parameters and their gradients are kept in. `bfloat16` halves both and wants
            `precision` to be bfloat16: no pass casts a weight. With float32 `optimizer.states` the
            optimizer keeps what they round away, so that updates are those of float32 weights; with
            bfloat16 ones they are rounded stochastically, so that none is lost.
        float8: recipe of the blocks' large products in training: each factor rounded to 8 bits by
            a scale (models/float8.py); `none` leaves them in `precision`. Weights, gradients and
            states keep their dtypes.
        residual: what the sum that runs through the blocks is kept in. `bfloat16` halves its bytes
            and wants `precision` to be bfloat16, under which all that is added to it is; `float32`
            leaves it in the embedding's dtype.
        micro_batch: samples in one forward pass, whose gradients add up; None is all of a step.
        segment_tokens: tokens of a row whose activations exist at once: the gradient of the whole
            row is made segment by segment, exactly (models/segments.py). None is all of them.
        checkpointing: what blocks keep for the backward pass: everything, what is dear to compute
            again, or their inputs alone (models/recompute.py).
        compile: compile the blocks, each kind once (models/compilation.py), and the update of
            bfloat16 moments; evaluations stay uncompiled.
        activation_memory: with `compile` and without `checkpointing`, the share of the activations
            that blocks keep; less is computed again, cheapest first (models/compilation.py).
        cuda_graph: capture the forward and backward pass of a micro-batch once and replay it, so
            that the host launches nothing in between; for a GPU alone, one process, rows of one
            length (train/graphs.py).
        max_minutes: stop after the step in which the run's own time exceeds it (over all its
            resumptions). The schedule is by steps and is cut off.
        device: `auto` is the first GPU, or the CPU where there is none.
    """

    steps: int = Field(ge=1)
    tokens_per_step: int = Field(ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    eval_every: int = Field(default=0, ge=0)
    eval_bytes: int = Field(default=0, ge=0)
    save_every: int = Field(default=0, ge=0)
    keep_last: int = Field(default=2, ge=0)
    save_async: bool = True
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    weights: Literal["float32", "bfloat16"] = "float32"
    float8: Float8 = "none"
    residual: Literal["float32", "bfloat16"] = "float32"
    micro_batch: int | None = Field(default=None, ge=1)
    segment_tokens: int | None = Field(default=None, ge=1)
    checkpointing: Checkpointing = "none"
    compile: bool = False
    activation_memory: float = Field(default=1.0, gt=0, le=1)
    cuda_graph: bool = False
    max_minutes: float | None = Field(default=None, gt=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.residual == "bfloat16" and self.precision != "bfloat16":
            raise ValueError(
                f"residual is 'bfloat16' beside precision {self.precision!r}; expected 'bfloat16' "
                "there too: autocast brings what is added to it into that dtype"
            )
        if self.activation_memory < 1 and (not self.compile or self.checkpointing != "none"):
            raise ValueError(
                f"activation_memory is {self.activation_memory} with compile {self.compile} and "
                f"checkpointing {self.checkpointing!r}; expected 1 unless compile is true and "
                "checkpointing 'none': the compiler's choice is one, checkpointing another"
            )
        if self.cuda_graph and self.segment_tokens is not None:
            raise ValueError(
                f"cuda_graph is true beside segment_tokens, {self.segment_tokens}; expected one of "
                "the two: segments are planned on the host; leave one out"
            )
        return self
