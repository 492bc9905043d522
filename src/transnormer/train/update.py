"""One update: batches, gradients, the guard's judgement, clipping, the optimizer."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transnormer.models.checkpoint import AnyModel
from transnormer.optim import Optimizer, clip_factor
from transnormer.parallel.host_copies import HostCopies
from transnormer.parallel.outer_config import OuterReport
from transnormer.train.backward import make_backward
from transnormer.train.batches import Batches
from transnormer.train.checkpoints import Counters
from transnormer.train.guard import Guard
from transnormer.train.objectives import Objective
from transnormer.train.objectives.causal import bits_per_byte
from transnormer.train.recipe import RunConfig
from transnormer.train.sync import GradSync


class Update(NamedTuple):
    """What an update found.

    Attributes:
        loss: nats, mean over the step's labels.
        bits_per_byte: None where the loss is not the likelihood of all text.
        grad_norm: before clipping.
        lr: of the update.
        tokens: read by the step.
        spike: why the guard dropped the update; None where it was made.
        next_sample: where the next step reads.
        outer: the outer step behind the update, where there was one.
    """

    loss: float
    bits_per_byte: float | None
    grad_norm: float
    lr: float
    tokens: int
    spike: str | None
    next_sample: int
    outer: OuterReport | None = None


class Updater:
    """Makes the updates of a run; the host waits for the device once in each."""

    def __init__(
        self,
        config: RunConfig,
        objective: Objective,
        model: AnyModel,
        optimizer: Optimizer,
        guard: Guard,
        sync: GradSync,
        precision: str,
        copies: HostCopies | None = None,
    ) -> None:
        """Prepare the updates of a run, whose checkpoints are written from the copies."""
        self._copies = copies
        self._config, self._objective, self._sync = config, objective, sync
        self._model, self._optimizer, self._guard = model, optimizer, guard
        self._device = next(model.parameters()).device
        train = config.train
        self._backward = make_backward(
            objective,
            model,
            self._device,
            precision,
            train.segment_tokens,
            cuda_graph=train.cuda_graph,
            wide_sums=adds_wide(config, sync),
        )
        self._batches = Batches(
            objective,
            config.samples_per_step,
            config.batch_over(sync.world_size),
            pinned=self._device.type == "cuda",
        )

    def update(self, done: Counters) -> Update:
        """Make the update after `done`, unless the guard finds a spike.

        Raises:
            TrainingDiverged: see ``Guard.judge``; the weights are those before the update.
        """
        config, sync = self._config, self._sync
        batches = self._batches.take(done.next_sample)
        counts = sync.total(batches.counts)
        labels, tokens, text_bytes = counts.tolist()
        divisor = sync.summed(batches.counts, counts)[0].item()
        nats = self._gradients(batches.parts, max(divisor, 1.0))
        sync.after_backward(self._model)
        norm = sync.total_norm(self._model)
        next_sample = done.next_sample + config.samples_per_step
        lr = config.optimizer.lr_at(done.step, config.train.steps)
        self._optimizer.set_lr(lr)
        # Before the figures are waited for: the device is still at work on this step.
        most = config.optimizer.clip
        make_step = self._optimizer.prepare(clip_factor(most, norm) if most else None)
        if done.step + 1 < config.train.steps:
            self._batches.prepare(next_sample)
        overall = sync.overall_norm(norm).reshape(1).to(nats.dtype)
        total, grad_norm = torch.cat([sync.total(nats.reshape(1)), overall]).tolist()
        loss = total / max(labels, 1.0)
        spike = self._guard.judge(loss, grad_norm, done.step + 1)
        if self._copies is not None:
            # They are made beside the passes above, which read the parameters alone.
            self._copies.hold()
        if spike is None:
            make_step()
        # It may hold the gradients, whose memory others need now.
        del make_step
        self._optimizer.zero_grad()
        outer = None
        if spike is None:
            sync.after_step(self._model, done.step + 1)
            outer = sync.outer_step(self._model, lr)
        return Update(
            loss=loss,
            bits_per_byte=(
                bits_per_byte(loss * labels, text_bytes) if self._objective.scores_text else None
            ),
            grad_norm=grad_norm,
            lr=lr,
            tokens=int(tokens),
            spike=spike,
            next_sample=next_sample,
            outer=outer,
        )

    def _gradients(self, parts: Sequence[Any], labels: float) -> Tensor:
        """Add up the gradients of the micro-batches; return their summed loss in nats, float64.

        Each is divided by the labels of all of them: a step's gradient is that of one large batch
        whatever the number of parts.
        """
        self._model.train()
        nats = torch.zeros((), dtype=torch.float64, device=self._device)
        for part in parts:
            nats += self._backward(self._model, part, labels)
        return nats


def adds_wide(config: RunConfig, sync: GradSync) -> bool:
    """Whether bfloat16 weights that are updated as float32 ones get gradients of several passes."""
    passes = config.micro_batch < config.samples_per_step or config.train.segment_tokens is not None
    return config.splits_weights and passes and sync.devices == 1
