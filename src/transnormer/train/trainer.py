"""The training loop: one process's part of a run, from a configuration to a trained model."""

import time
from contextlib import suppress
from pathlib import Path

import torch

from transnormer.models import checkpoint
from transnormer.models.device_peaks import device_peak
from transnormer.models.random_state import random_state
from transnormer.parallel.host_copies import HostCopies
from transnormer.train import checkpoints
from transnormer.train.adapters import BASE, describe_size
from transnormer.train.allocator import keep_freed_memory
from transnormer.train.checkpoints import Contents, Counters
from transnormer.train.divergence import check_finite, check_parameters
from transnormer.train.evaluation import Evaluate, evaluate_until
from transnormer.train.guard import Guard
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
from transnormer.train.model_setup import set_up
from transnormer.train.objectives import OBJECTIVES, Objective, Setting
from transnormer.train.precision import choose_device, choose_precision
from transnormer.train.processes import (
    NoRecords,
    agreed,
    first_then_others,
    join_processes,
    open_together,
    prepare_together,
    seed_of,
)
from transnormer.train.profiling import ProfileConfig, StepProfiler
from transnormer.train.recipe import RunConfig
from transnormer.train.result import StoppedBy, TrainResult
from transnormer.train.run_directory import DATA, disk_errors_in_one_line, write_config
from transnormer.train.saving import Saver, wait_for_left_writing
from transnormer.train.signals import Stop, stop_requests, termination_raises
from transnormer.train.staging import read_step
from transnormer.train.sync import GradSync
from transnormer.train.update import Updater
from transnormer.train.utilisation import token_share


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
    device = choose_device(config.train.device)
    if sync is None:
        sync, device = join_processes(config, device)
    progress = (sync.is_first and progress) or Quiet()
    run_dir = Path(config.output.dir)
    wait_for_left_writing(run_dir, progress.message)
    with (
        termination_raises(progress.message),
        disk_errors_in_one_line(run_dir),
        open_together(config, sync, resume=resume) as run,
    ):
        with prepare_together(run, config, sync):
            tell, rank, ranks = progress.message, sync.rank, sync.world_size
            setting = Setting(config, run_dir / DATA, tell, evaluate, rank, ranks)
            objective = first_then_others(sync, lambda: OBJECTIVES[config.objective.kind](setting))
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
        self.guard = Guard(config.guard, run_dir)
        torch.manual_seed(train.seed)
        found = sync.from_first(lambda: checkpoints.find_checkpoint(run_dir).path)
        self.model, self.optimizer = set_up(config, objective, found, device, sync)
        # Parameters begin the same on all processes; dropout does not.
        if sync.process:
            torch.manual_seed(seed_of(train.seed, sync.process, 0))
        self.copies = HostCopies() if train.save_async else None
        self.updater = Updater(
            config, objective, self.model, self.optimizer, self.guard, sync, precision, self.copies
        )
        self.token_share = token_share(config, self.model, device_peak(device), precision)
        profile = config.profile if sync.is_first else ProfileConfig()
        self.profiler = StepProfiler(profile, run_dir, device, progress.message)
        self.records: Records | NoRecords | None = None
        self.saver = Saver(sync, progress.message, run_dir)

    def start(self, *, resume: bool) -> None:
        """Restore the newest whole checkpoint, or begin at step 0; say which."""
        path = self.sync.from_first(self._whole_checkpoint)
        if path is not None:
            self._restore(path)
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
        self.sync.from_first(lambda: write_config(self.run_dir, self.config, resolved))
        self.progress.message(
            f"{describe_size(self.model)} on {self.device} in {self.counters.precision}"
        )
        # Last: nothing fails while its files are open and nobody closes them.
        first = self.sync.is_first
        self.records = Records(self.run_dir, self.counters.step) if first else NoRecords()

    def _whole_checkpoint(self) -> Path | None:
        """The newest whole checkpoint; damaged newer ones are set aside."""
        found = checkpoints.find_checkpoint(self.run_dir)
        if found.path is None and found.damaged:
            raise ValueError(
                f"{self.run_dir} has no whole checkpoint: {found.damaged[0].reason}; expected one; "
                "remove the damaged ones to start at step 0"
            )
        for damaged in found.damaged:
            aside = checkpoints.set_aside(damaged.path)
            self.progress.message(f"damaged checkpoint: {damaged.reason}; moved to {aside}")
        return found.path

    def _restore(self, path: Path) -> None:
        counters = checkpoints.read_counters(path)
        if counters.precision != self.counters.precision:
            raise ValueError(
                f"train.precision is {self.counters.precision} here; expected "
                f"{counters.precision}, as {path} was trained; set it"
            )
        weights, states = read_step(
            path, self.run_dir / DATA / BASE, self.device, whole=self.sync.devices == 1
        )
        self.sync.load(self.model, self.optimizer, weights, states)
        checkpoints.restore_random_state(path)
        if self.sync.process:
            seed = self.config.train.seed
            torch.manual_seed(seed_of(seed, self.sync.process, counters.step))
        if self.config.guard.action != "off":
            alone = self.sync.devices == 1
            self.guard.load_state_tensors(checkpoints.read_guard(path), alone=alone)
        note = self.sync.read_own(self.model, self.optimizer, path)
        self.counters = counters
        if note is not None:
            self.progress.message(note)
        self.progress.message(f"continuing from {path}")

    def run(self) -> TrainResult:
        """Do the updates that are left; returns after a final checkpoint and evaluation."""
        train = self.config.train
        self.clock = time.perf_counter() - self.counters.seconds
        last = self.sync.from_first(lambda: checkpoints.find_checkpoint(self.run_dir).path)
        if self.guard.snapshot is None:
            self._snapshot()
        with stop_requests() as own:
            stop = agreed(own, self.sync)
            stopped_by = self._stopped_by(stop) if self._evaluate_if_due(stop) else stop()
            while stopped_by is None:
                self._update()
                self.saver.poll()
                if self.copies is not None and not self.copies.used:
                    # Optimizers have states now: get the memory before a checkpoint waits for it.
                    self.sync.stage(self.model, self.optimizer, self.copies)
                step = self.counters.step
                stopped_by = self._stopped_by(stop)
                scheduled = bool(train.save_every) and step % train.save_every == 0
                if scheduled or self.guard.due(step):
                    self._snapshot()
                if stopped_by or scheduled:
                    last = self._save()
                if self._evaluate_if_due(stop, final=stopped_by is not None):
                    stopped_by = stopped_by or self._stopped_by(stop)
                else:
                    stopped_by = stop()
            newest = checkpoints.step_path(self.run_dir, self.counters.step)
            if last != newest:
                self._save()
            self.saver.drain()
        assert self.records is not None
        self.records.sync()
        if self.sync.is_first:
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
        """Close the records, and a profile that was not finished; end the last checkpoint."""
        self.saver.close()
        self.profiler.close()
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
        if train.max_minutes is not None:
            over = self.counters.seconds >= 60 * train.max_minutes
            return "max_minutes" if self.sync.highest(over) else None
        return None

    def _update(self) -> None:
        """Make one update, or answer a spike, and record it."""
        began = time.perf_counter()
        done, steps = self.counters, self.config.train.steps
        self.profiler.before(done.step + 1)
        made = self.updater.update(done)
        self.profiler.after(done.step + 1)
        if made.spike is not None and self.guard.rolls_back:
            self._roll_back(made.spike, made.next_sample)
            return
        now = time.perf_counter()
        rate = made.tokens / (now - began)
        self.counters = Counters(
            step=done.step + 1,
            next_sample=made.next_sample,
            tokens=done.tokens + made.tokens,
            seconds=now - self.clock,
            precision=done.precision,
        )
        report = StepReport(
            step=self.counters.step,
            loss=made.loss,
            bits_per_byte=made.bits_per_byte,
            grad_norm=made.grad_norm,
            lr=made.lr,
            tokens=self.counters.tokens,
            tokens_per_second=rate,
            seconds=self.counters.seconds,
            mfu=None if self.token_share is None else rate * self.token_share / self.sync.devices,
        )
        if made.outer is not None and made.outer.note is not None:
            self.progress.message(made.outer.note)
        assert self.records is not None
        self.records.step(report, skipped=made.spike, outer=made.outer)
        if made.spike is not None:
            self.progress.message(f"step {report.step}: {made.spike}; its update is skipped")
        self.progress.step(report, steps)

    def _snapshot(self) -> None:
        done = self.counters
        self.guard.take(done.step, done.tokens, self.model, self.optimizer)

    def _roll_back(self, spike: str, next_sample: int) -> None:
        """Go on from the last snapshot with the data behind the spike."""
        from_step = self.counters.step + 1
        kept = self.guard.roll_back(self.model, self.optimizer)
        self.counters = self.counters.model_copy(
            update={
                "step": kept.step,
                "tokens": kept.tokens,
                "next_sample": next_sample,
                "seconds": time.perf_counter() - self.clock,
            }
        )
        assert self.records is not None
        self.records.rollback(kept.step, from_step=from_step, reason=spike, next_sample=next_sample)
        self.progress.message(f"step {from_step}: {spike}; back to step {kept.step}")
        # At once, so that no checkpoint of the steps given up is continued; never without one.
        self.saver.drain()
        self._save(keep_last=0)
        self.saver.drain()
        self.sync.from_first(lambda: checkpoints.remove_after(self.run_dir, kept.step))

    def _save(self, **keep: int) -> Path:
        """Write a checkpoint, beside the training where the run says so; return where."""
        self.saver.make_room(self.counters.step, self.config.train.save_every)
        if self.sync.devices > 1:
            # A checkpoint holds no snapshot of shares: the run goes on from one of its own step.
            self._snapshot()
        done, train = self.counters, self.config.train
        check_parameters(self.model, done.step, self.run_dir, self.sync.highest)
        assert self.records is not None
        self.records.sync()
        folder = self.run_dir / checkpoints.CHECKPOINTS
        with checkpoints.refused_in_one_line(self.run_dir, done.step):
            own = self.sync.write_own(self.model, self.optimizer, folder)
        contents = Contents(
            counters=done,
            tokenizer=self.objective.tokenizer,
            random=random_state(),
            guard=self.guard.state_tensors(done.step),
            own=own,
        )
        keep = {"keep_last": train.keep_last, **keep}
        with self.sync.agreed(self.model):
            staged = self.sync.stage(self.model, self.optimizer, self.copies)
            self.saver.start(
                lambda: checkpoints.write_checkpoint(self.run_dir, staged, contents, **keep)
            )
            if self.copies is None:
                self.saver.drain()
        return checkpoints.step_path(self.run_dir, done.step)

    def _evaluations(self) -> list[HeldoutReport]:
        rows = self.sync.from_first(lambda: read_records(self.run_dir / EVALUATIONS))
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
            evaluate, compiled = self.objective.evaluate, self.config.train.compile
            # Processes gather their parameters in the precision of the run.
            own = self.counters.precision if self.sync.devices > 1 else "float32"
            with self.sync.agreed(self.model):
                found = evaluate_until(stop, evaluate, self.model, compiled=compiled, precision=own)
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
