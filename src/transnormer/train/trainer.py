"""The training loop: one process's part of a run, from a configuration to a trained model."""

import errno
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from transnormer.data import Batch, Loader, Tokenizer, label_bytes, token_lengths
from transnormer.models import checkpoint
from transnormer.models.decoder import Decoder
from transnormer.optim import build_optimizer
from transnormer.parallel import current_world
from transnormer.train import checkpoints
from transnormer.train.allocator import keep_freed_memory
from transnormer.train.checkpoints import Counters
from transnormer.train.corpus import Corpus, open_corpus, sample_texts
from transnormer.train.metrics import (
    EVALUATIONS,
    EvaluationReport,
    Progress,
    Quiet,
    Records,
    StepReport,
    draw_loss,
    read_records,
)
from transnormer.train.precision import autocast_for, choose_device, choose_precision
from transnormer.train.recipe import RunConfig
from transnormer.train.run_directory import DATA, open_run, removed_on_failure, write_config
from transnormer.train.signals import stop_requests
from transnormer.train.sync import GradSync, OneProcess

StoppedBy = Literal["steps", "max_minutes", "SIGINT", "SIGTERM"]


class Evaluation(Protocol):
    """What an evaluation finds: sums over the text, and means in nats and in bits."""

    @property
    def tokens(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def nats_per_token(self) -> float: ...
    @property
    def bits_per_byte(self) -> float: ...


Evaluate = Callable[[Decoder, Tokenizer, Sequence[str]], Evaluation]


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
    first: EvaluationReport | None
    last: EvaluationReport | None
    seconds: float


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is not finite; no parameter was touched by that step."""


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
    and SIGTERM end it after the step, with a checkpoint.

    Args:
        config: the run.
        resume: continue from the newest whole checkpoint; at step 0 where there is none.
        evaluate: scores held-out texts with the model (in eval mode); None never evaluates.
        progress: is told of every step.
        sync: how this process works with others; None is alone.

    Raises:
        ValueError, FileNotFoundError: configuration, corpus or checkpoint is not usable.
        NotImplementedError: more than one device without a sync that does it.
        TrainingDiverged: loss or gradient is NaN or infinite; names the last good checkpoint.
        RuntimeError: the disk refuses a write; names the last good checkpoint.
    """
    config.parallel.refuse_more_than_one()
    if sync is None and (found := current_world()).world_size > 1:
        raise NotImplementedError(
            f"the launcher started {found.world_size} processes; expected 1: training on several "
            "devices is not available; start one"
        )
    progress = progress or Quiet()
    with open_run(config, resume=resume) as run:
        with removed_on_failure(run):
            corpus = open_corpus(config.data, run.path / DATA, progress.message)
            trainer = Trainer(config, run.path, corpus, evaluate, progress, sync or OneProcess())
            trainer.start(resume=resume)
        try:
            return trainer.run()
        except (OSError, SafetensorError) as error:
            if not isinstance(error, SafetensorError) and error.errno not in _DISK_ERRORS:
                raise
            last = checkpoints.find_checkpoint(run.path).path
            raise RuntimeError(
                f"{run.path} cannot be written: {error}; expected free space; the last good "
                f"checkpoint is {last or 'none'}; free space and continue with --resume"
            ) from error
        finally:
            trainer.close()


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


class Trainer:
    """One run in memory: model, optimizer, data and records."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        corpus: Corpus,
        evaluate: Evaluate | None,
        progress: Progress,
        sync: GradSync,
    ) -> None:
        train = config.train
        self.config, self.run_dir, self.corpus = config, run_dir, corpus
        self.progress, self.sync, self.evaluate = progress, sync, evaluate
        self.device = choose_device(train.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        precision = choose_precision(train.precision, self.device)
        self.counters = Counters(step=0, next_sample=0, tokens=0, seconds=0.0, precision=precision)
        self.parts = config.samples_per_step // config.micro_batch // sync.world_size
        self.loader = Loader(
            corpus.sources,
            seq=config.data.seq,
            batch=config.micro_batch * sync.world_size,
            seed=train.seed,
            packing=config.data.packing,
        ).for_rank(sync.rank, sync.world_size)
        self.lengths = token_lengths(corpus.tokenizer)
        self.heldout = sample_texts(corpus.heldout, train.eval_bytes)
        torch.manual_seed(train.seed)
        tokenizer = corpus.tokenizer
        decoder = config.model.build(
            tokenizer.vocab_size,
            pad=tokenizer.pad_id,
            bos=tokenizer.bos_id,
            eos=tokenizer.eos_id,
        )
        self.model = sync.wrap(Decoder(decoder).to(self.device))
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
            "decoder": self.model.config.model_dump(mode="json"),
            "parameters": self.model.num_parameters(),
            "precision": self.counters.precision,
            "device": str(self.device),
            "tokenizer": self.corpus.tokenizer.fingerprint,
            "training_tokens": [len(source) for source, _ in self.corpus.sources],
        }
        write_config(self.run_dir, self.config, resolved)
        self.records = Records(self.run_dir, self.counters.step)
        self.progress.message(
            f"{self.model.num_parameters():,} parameters on {self.device} in "
            f"{self.counters.precision}"
        )

    def _restore(self, path: Path) -> None:
        counters = checkpoints.read_counters(path)
        if counters.precision != self.counters.precision:
            raise ValueError(
                f"train.precision is {self.counters.precision} here; expected "
                f"{counters.precision}, as {path} was trained; set it"
            )
        # Copied into the fresh model: where a tensor lies in memory can change the last bit of a
        # product, and a run from step 0 has its weights in memory of this kind.
        self.model.load_state_dict(checkpoint.load(path, device=self.device).state_dict())
        checkpoints.restore_training_state(path, self.optimizer)
        self.counters = counters
        self.progress.message(f"continuing from {path}")

    def run(self) -> TrainResult:
        """Do the updates that are left; returns after a final checkpoint and evaluation."""
        train = self.config.train
        self.clock = time.perf_counter() - self.counters.seconds
        last: Path | None = checkpoints.find_checkpoint(self.run_dir).path
        with stop_requests() as stop:
            self._evaluate_if_due(stop)
            stopped_by = self._stopped_by(stop)
            while stopped_by is None:
                self._update()
                step = self.counters.step
                stopped_by = self._stopped_by(stop)
                if stopped_by or (train.save_every and step % train.save_every == 0):
                    last = self._save()
                self._evaluate_if_due(stop, final=stopped_by is not None)
        if last is None:
            last = self._save()
        assert self.records is not None
        self.records.sync()
        draw_loss(self.run_dir)
        evaluations = self._evaluations()
        return TrainResult(
            run_dir=self.run_dir,
            step=self.counters.step,
            stopped_by=stopped_by,
            checkpoint=last,
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

    def _stopped_by(self, stop: Callable[[], str | None]) -> StoppedBy | None:
        train, name = self.config.train, stop()
        if self.counters.step >= train.steps:
            return "steps"
        if name is not None:
            return "SIGINT" if name == "SIGINT" else "SIGTERM"
        if train.max_minutes is not None and self.counters.seconds >= 60 * train.max_minutes:
            return "max_minutes"
        return None

    def _update(self) -> None:
        """Make one update from `parts` forward passes, and record it."""
        began = time.perf_counter()
        config, done = self.config, self.counters
        batches = [self.loader.batch(done.step * self.parts + i) for i in range(self.parts)]
        valid, text_bytes = self.sync.total(self._counts(batches)).tolist()
        nats = self._backward(batches, valid)
        self.sync.after_backward(self.model)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = get_total_norm(gradients)
        loss = self.sync.total(nats.reshape(1)).item() / max(valid, 1.0)
        self._check_finite(loss, norm.item(), done.step + 1)
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
            tokens=done.tokens + config.train.tokens_per_step,
            seconds=now - self.clock,
            precision=done.precision,
        )
        report = StepReport(
            step=self.counters.step,
            loss=loss,
            bits_per_byte=loss * valid / math.log(2) / max(text_bytes, 1.0),
            grad_norm=norm.item(),
            lr=lr,
            tokens=self.counters.tokens,
            tokens_per_second=config.train.tokens_per_step / (now - began),
            seconds=self.counters.seconds,
        )
        assert self.records is not None
        self.records.step(report)
        self.progress.step(report, config.train.steps)

    def _counts(self, batches: Sequence[Batch]) -> Tensor:
        """Return the valid labels and their bytes, float64 [2]."""
        valid = sum(int((batch.labels >= 0).sum()) for batch in batches)
        text_bytes = sum(label_bytes(batch.labels, self.lengths) for batch in batches)
        return torch.tensor([valid, text_bytes], dtype=torch.float64, device=self.device)

    def _backward(self, batches: Sequence[Batch], valid: float) -> Tensor:
        """Add up the gradients of the batches; return their summed loss in nats, float64.

        Each batch is divided by the valid labels of all of them: a step's gradient is that of one
        large batch whatever the number of parts.
        """
        self.model.train()
        nats = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in batches:
            input_ids, labels, cu_seqlens = (
                None if part is None else part.to(self.device, non_blocking=True) for part in batch
            )
            assert input_ids is not None
            assert labels is not None
            with self._autocast():
                loss = self.model.loss(input_ids, labels, reduction="sum", cu_seqlens=cu_seqlens)
            (loss / max(valid, 1.0)).backward()
            nats += loss.detach()
        return nats

    def _autocast(self) -> AbstractContextManager[object]:
        return autocast_for(self.counters.precision, self.device) or nullcontext()

    def _check_finite(self, loss: float, norm: float, step: int) -> None:
        for name, value in (("loss", loss), ("grad_norm", norm)):
            if not math.isfinite(value):
                last = checkpoints.find_checkpoint(self.run_dir).path
                raise TrainingDiverged(
                    f"{name} is {value} at step {step}; expected a finite number; the last good "
                    f"checkpoint is {last or 'none'}; lower optimizer.lr or lengthen the warm-up"
                )

    def _save(self) -> Path:
        assert self.records is not None
        self.records.sync()
        return checkpoints.write_checkpoint(
            self.run_dir,
            self.model,
            self.optimizer,
            self.corpus.tokenizer,
            self.counters,
            keep_last=self.config.train.keep_last,
        )

    def _evaluations(self) -> list[EvaluationReport]:
        return [EvaluationReport(**row) for row in read_records(self.run_dir / EVALUATIONS)]

    def _evaluate_if_due(self, stop: Callable[[], str | None], *, final: bool = False) -> None:
        """Evaluate before the first step, every eval_every steps and after the last, once each.

        A signal ends the run without another evaluation: who sends it is waiting.
        """
        step, every = self.counters.step, self.config.train.eval_every
        due = final or step in (0, self.config.train.steps) or (every and step % every == 0)
        if self.evaluate is None or not self.heldout or not due or stop() is not None:
            return
        if any(report.step == step for report in self._evaluations()):
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            found = self.evaluate(self.model.eval(), self.corpus.tokenizer, self.heldout)
        self.counters = self.counters.model_copy(
            update={"seconds": time.perf_counter() - self.clock}
        )
        report = EvaluationReport(
            step=step,
            loss=found.nats_per_token,
            bits_per_byte=found.bits_per_byte,
            tokens=found.tokens,
            bytes=found.bytes,
            seconds=self.counters.seconds,
        )
        assert self.records is not None
        self.records.evaluation(report)
        self.progress.evaluation(report)
