"""The training loop: one process's part of a run, from a configuration to a trained model."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from transnormer.models import checkpoint
from transnormer.optim import build_optimizer
from transnormer.parallel import current_world
from transnormer.train import checkpoints
from transnormer.train.allocator import keep_freed_memory
from transnormer.train.checkpoints import Counters
from transnormer.train.divergence import check_finite, check_parameters
from transnormer.train.evaluation import Evaluate, evaluate_until
from transnormer.train.metrics import (
    EVALUATIONS,
    HeldoutReport,
    Progress,
    Quiet,
    Records,
    StepReport,
    draw_loss,
    figures,
    read_records,
)
from transnormer.train.objectives import OBJECTIVES, Objective, Setting
from transnormer.train.objectives.base import to_device
from transnormer.train.objectives.causal import bits_per_byte
from transnormer.train.precision import autocast_for, choose_device, choose_precision
from transnormer.train.recipe import RunConfig
from transnormer.train.run_directory import (
    DATA,
    disk_errors_in_one_line,
    open_run,
    preparation,
    write_config,
)
from transnormer.train.signals import SignalName, Stop, stop_requests, termination_raises
from transnormer.train.sync import GradSync, OneProcess

StoppedBy = Literal["steps", "max_minutes"] | SignalName


class TrainResult(NamedTuple):
    """How a run ended.

    Attributes:
        run_dir: the run directory.
        step: updates done in all.
        stopped_by: "steps" where all were done.
        checkpoint: the last one.
        first, last: the first and the newest evaluation of the run, None without evaluations.
        seconds: the run's own time over all resumptions.
    """

    run_dir: Path
    step: int
    stopped_by: StoppedBy
    checkpoint: Path
    first: HeldoutReport | None
    last: HeldoutReport | None
    seconds: float


def run_training(
    config: RunConfig,
    *,
    resume: bool = False,
    evaluate: Evaluate | None = None,
    progress: Progress | None = None,
    sync: GradSync | None = None,
) -> TrainResult:
    """Train as the configuration says, in a new run directory or (resume) in the one it names.

    A resumed run continues bit for bit on a CPU: weights, optimizer, random state and data. SIGINT
    and SIGTERM end it after the step or within an evaluation, with a checkpoint; a second one ends
    it at once. Before the first step there is nothing to keep: they raise KeyboardInterrupt and
    SystemExit, and a new run directory is removed again, as it is after any other error there.

    Args:
        config: the run.
        resume: continue from the newest whole checkpoint; at step 0 where there is none.
        evaluate: scores held-out texts with a causal model (in eval mode); None never does. The
            other objectives score their held-out part themselves.
        progress: is told of every step and evaluation, and what the run is about to do.
        sync: how this process works with others; None is alone.

    Raises:
        ValueError, FileNotFoundError: configuration, corpus or checkpoint is not usable.
        NotImplementedError: more than one device without a sync that does it.
        TrainingDiverged: a loss (held-out ones too), a gradient or a parameter is NaN or infinite;
            names the last good checkpoint.
        RuntimeError: the disk refuses a write (names the last good checkpoint), the device is not
            there, another process is training in the directory, or the launcher's variables are
            wrong.
    """
    config.parallel.refuse_more_than_one()
    if sync is None and (found := current_world()).world_size > 1:
        raise NotImplementedError(
            f"the launcher started {found.world_size} processes; expected 1: training on several "
            "devices is not available; start one"
        )
    progress = progress or Quiet()
    device = choose_device(config.train.device)
    run_dir = Path(config.output.dir)
    with (
        termination_raises(progress.message),
        disk_errors_in_one_line(run_dir),
        open_run(config, resume=resume) as run,
    ):
        with preparation(run, config):
            sync = sync or OneProcess()
            objective = OBJECTIVES[config.objective.kind](
                Setting(
                    config,
                    run_dir / DATA,
                    progress.message,
                    evaluate,
                    sync.rank,
                    sync.world_size,
                )
            )
            trainer = Trainer(config, run_dir, objective, device, progress, sync)
            trainer.start(resume=resume)
        try:
            return trainer.run()
        finally:
            trainer.close()


class Trainer:
    """One run in memory: objective, model, optimizer and records."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        objective: Objective,
        device: torch.device,
        progress: Progress,
        sync: GradSync,
    ) -> None:
        train = config.train
        self.config, self.run_dir, self.objective = config, run_dir, objective
        self.progress, self.sync, self.device = progress, sync, device
        if self.device.type == "cpu":
            keep_freed_memory()
        precision = choose_precision(train.precision, device)
        self.counters = Counters(step=0, next_sample=0, tokens=0, seconds=0.0, precision=precision)
        self.parts = config.samples_per_step // config.micro_batch // sync.world_size
        torch.manual_seed(train.seed)
        found = checkpoints.find_checkpoint(run_dir).path
        # Of a run that goes on, model.init_from may be gone.
        model = objective.build_model() if found is None else checkpoint.new_like(found)
        self.model = sync.wrap(model.to(device))
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.records: Records | None = None

    def start(self, *, resume: bool) -> None:
        """Restore the newest whole checkpoint, or begin at step 0; say which."""
        found = checkpoints.find_checkpoint(self.run_dir)
        if found.path is None and found.damaged:
            raise ValueError(
                f"{self.run_dir} has no whole checkpoint: {found.damaged[0].reason}; expected one; "
                "remove the damaged ones to start at step 0"
            )
        for damaged in found.damaged:
            aside = checkpoints.set_aside(damaged.path)
            self.progress.message(f"damaged checkpoint: {damaged.reason}; moved to {aside}")
        if found.path is not None:
            self._restore(found.path)
        elif resume:
            self.progress.message(f"no checkpoint in {self.run_dir}: starting at step 0")
        resolved = {
            **checkpoint.describe(self.model),
            "parameters": self.model.num_parameters(),
            "precision": self.counters.precision,
            "device": str(self.device),
            "tokenizer": self.objective.tokenizer.fingerprint,
            **self.objective.facts(),
        }
        write_config(self.run_dir, self.config, resolved)
        self.progress.message(
            f"{self.model.num_parameters():,} parameters on {self.device} in "
            f"{self.counters.precision}"
        )
        # Last: nothing fails while its files are open and nobody closes them.
        self.records = Records(self.run_dir, self.counters.step)

    def _restore(self, path: Path) -> None:
        counters = checkpoints.read_counters(path)
        if counters.precision != self.counters.precision:
            raise ValueError(
                f"train.precision is {self.counters.precision} here; expected "
                f"{counters.precision}, as {path} was trained; set it"
            )
        # Copied into the fresh model: where a tensor lies in memory can change the last bit of a
        # product, and a run from step 0 has its weights in memory of this kind.
        self.model.load_state_dict(checkpoint.load_any(path, device=self.device).state_dict())
        checkpoints.restore_training_state(path, self.optimizer)
        self.counters = counters
        self.progress.message(f"continuing from {path}")

    def run(self) -> TrainResult:
        """Do the updates that are left; returns after a final checkpoint and evaluation."""
        train = self.config.train
        self.clock = time.perf_counter() - self.counters.seconds
        last: Path | None = checkpoints.find_checkpoint(self.run_dir).path
        with stop_requests() as stop:
            stopped_by = self._stopped_by(stop) if self._evaluate_if_due(stop) else stop()
            while stopped_by is None:
                self._update()
                step = self.counters.step
                stopped_by = self._stopped_by(stop)
                if stopped_by or (train.save_every and step % train.save_every == 0):
                    last = self._save()
                if self._evaluate_if_due(stop, final=stopped_by is not None):
                    stopped_by = stopped_by or self._stopped_by(stop)
                else:
                    stopped_by = stop()
            newest = checkpoints.step_path(self.run_dir, self.counters.step)
            if last != newest:
                self._save()
        assert self.records is not None
        self.records.sync()
        draw_loss(self.run_dir)
        evaluations = self._evaluations()
        return TrainResult(
            run_dir=self.run_dir,
            step=self.counters.step,
            stopped_by=stopped_by,
            checkpoint=newest,
            first=evaluations[0] if evaluations else None,
            last=evaluations[-1] if evaluations else None,
            seconds=self.counters.seconds,
        )

    def close(self) -> None:
        """Close the records."""
        if self.records is not None:
            # After a full disk the last lines cannot be written here either; a run that ends well
            # has brought them to the disk before.
            with suppress(OSError):
                self.records.close()

    def _stopped_by(self, stop: Stop) -> StoppedBy | None:
        train = self.config.train
        if self.counters.step >= train.steps:
            return "steps"
        if (name := stop()) is not None:
            return name
        if train.max_minutes is not None and self.counters.seconds >= 60 * train.max_minutes:
            return "max_minutes"
        return None

    def _update(self) -> None:
        """Make one update from `parts` forward passes, and record it."""
        began = time.perf_counter()
        config, done = self.config, self.counters
        batches = [self.objective.batch(done.step * self.parts + i) for i in range(self.parts)]
        labels, tokens, text_bytes = self.sync.total(self._counts(batches)).tolist()
        nats = self._backward(batches, labels)
        self.sync.after_backward(self.model)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = get_total_norm(gradients)
        loss = self.sync.total(nats.reshape(1)).item() / max(labels, 1.0)
        check_finite({"loss": loss, "grad_norm": norm.item()}, done.step + 1, self.run_dir)
        if config.optimizer.clip:
            clip_grads_with_norm_(self.model.parameters(), config.optimizer.clip, norm)
        lr = config.optimizer.lr_at(done.step, config.train.steps)
        self.optimizer.set_lr(lr)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.sync.after_step(self.model, done.step + 1)
        now = time.perf_counter()
        self.counters = Counters(
            step=done.step + 1,
            next_sample=done.next_sample + config.samples_per_step,
            tokens=done.tokens + int(tokens),
            seconds=now - self.clock,
            precision=done.precision,
        )
        report = StepReport(
            step=self.counters.step,
            loss=loss,
            bits_per_byte=(
                bits_per_byte(loss * labels, text_bytes) if self.objective.scores_text else None
            ),
            grad_norm=norm.item(),
            lr=lr,
            tokens=self.counters.tokens,
            tokens_per_second=tokens / (now - began),
            seconds=self.counters.seconds,
        )
        assert self.records is not None
        self.records.step(report)
        self.progress.step(report, config.train.steps)

    def _counts(self, batches: Sequence[Any]) -> Tensor:
        """Return the sums of the batches' Counts, float64 [3]."""
        counts = [self.objective.counts(batch) for batch in batches]
        return torch.tensor(counts, dtype=torch.float64).sum(0).to(self.device)

    def _backward(self, batches: Sequence[Any], labels: float) -> Tensor:
        """Add up the gradients of the batches; return their summed loss in nats, float64.

        Each batch is divided by the labels of all of them: a step's gradient is that of one large
        batch whatever the number of parts.
        """
        self.model.train()
        nats = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in batches:
            with self._autocast():
                loss = self.objective.loss(self.model, to_device(batch, self.device))
            (loss / max(labels, 1.0)).backward()
            nats += loss.detach()
        return nats

    def _autocast(self) -> AbstractContextManager[object]:
        return autocast_for(self.counters.precision, self.device) or nullcontext()

    def _save(self) -> Path:
        check_parameters(self.model, self.counters.step, self.run_dir)
        assert self.records is not None
        self.records.sync()
        return checkpoints.write_checkpoint(
            self.run_dir,
            self.model,
            self.optimizer,
            self.objective.tokenizer,
            self.counters,
            keep_last=self.config.train.keep_last,
        )

    def _evaluations(self) -> list[HeldoutReport]:
        rows = read_records(self.run_dir / EVALUATIONS)
        return [self.objective.report(**row) for row in rows]

    def _evaluate_if_due(self, stop: Stop, *, final: bool = False) -> bool:
        """Evaluate before the first step, every eval_every steps and after the last, once each.

        A signal ends it at once, and nothing of it is recorded: who sends it is waiting. Returns
        False where it was due and a signal came before its end.
        """
        step, every = self.counters.step, self.config.train.eval_every
        due = final or step in (0, self.config.train.steps) or (every and step % every == 0)
        if not self.objective.has_heldout or not due:
            return True
        if any(report.step == step for report in self._evaluations()):
            return True
        found = None
        if stop() is None:
            found = evaluate_until(stop, self.objective.evaluate, self.model)
        if found is None:
            return False
        seconds = time.perf_counter() - self.clock
        self.counters = self.counters.model_copy(update={"seconds": seconds})
        report = self.objective.report(step=step, seconds=seconds, **found)
        losses = {f"held-out {name.replace('_', ' ')}": x for name, x in figures(report).items()}
        check_finite(losses, step, self.run_dir)
        assert self.records is not None
        self.records.evaluation(report)
        self.progress.evaluation(report)
        return True
