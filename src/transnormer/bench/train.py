"""A recipe's training step on random tokens: speed, memory, and where the time goes."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from transnormer.bench.parts import PARTS, floors, time_by_part
from transnormer.data import Batch, bpe_size
from transnormer.models.decoder import Decoder
from transnormer.models.device_peaks import Peak, device_peak
from transnormer.train.checkpoints import Counters
from transnormer.train.guard import Guard, GuardConfig
from transnormer.train.model_setup import set_up
from transnormer.train.objectives.base import Counts, Objective, Setting
from transnormer.train.precision import choose_device, choose_precision
from transnormer.train.recipe import RunConfig
from transnormer.train.sync import OneProcess
from transnormer.train.training_data import given_tokenizer
from transnormer.train.update import Updater, adds_wide
from transnormer.train.utilisation import token_share

# Of the products and copies that measure a device whose peak is not known.
_PRODUCT, _COPY_BYTES, _TRIALS = 1024, 1 << 26, 3
# Mean length of the documents of packed rows.
_DOCUMENT = 512


class PartTime(NamedTuple):
    """One part of a step: milliseconds, and the least that it needs."""

    part: str
    milliseconds: float
    floor: float


class StepTimes(NamedTuple):
    """What a benchmark of training found.

    Attributes:
        device: its name.
        precision: of the forward pass.
        tokens: of a step.
        first_step: seconds, compilation and first allocations included.
        milliseconds: of a step, median.
        tokens_per_second: tokens over that.
        mfu: model FLOPs utilisation against `peak`.
        peak: of the device.
        peak_measured: whether it is measured here; else it is from the maker's data sheet.
        memory: largest allocation in bytes; None on a CPU.
        parts: where a profiled step's time went.
    """

    device: str
    precision: str
    tokens: int
    first_step: float
    milliseconds: float
    tokens_per_second: float
    mfu: float | None
    peak: Peak
    peak_measured: bool
    memory: int | None
    parts: tuple[PartTime, ...]


class _RandomTokens(Objective[Decoder, Batch]):
    """The causal objective without a corpus: tokens at random, documents of about 512."""

    def __init__(self, setting: Setting) -> None:
        self._config = setting.config
        given = given_tokenizer(setting.config)
        size = bpe_size(setting.config.data.tokenizer or "") if given is None else given.vocab_size
        assert size is not None
        self._decoder = setting.config.model.build(size, pad=None, bos=None, eos=None)

    @property
    def has_heldout(self) -> bool:
        return False

    def facts(self) -> dict[str, Any]:
        return {}

    def build_model(self) -> Decoder:
        return Decoder(self._decoder)

    def batch(self, index: int) -> Batch:
        rows, seq = self._config.micro_batch, self._config.data.seq
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(self._decoder.vocab_size, (2, rows, seq), generator=generator)
        if self._config.data.packing == "stream":
            return Batch(ids[0], ids[1], None)
        length = rows * seq
        # Of a single token there is nothing to cut.
        cuts = torch.randint(
            1, max(length, 2), (length // _DOCUMENT,), generator=generator
        ).tolist()
        bounds = sorted({0, length, *range(0, length, seq), *cuts})
        return Batch(
            ids[0].view(1, -1), ids[1].view(1, -1), torch.tensor(bounds, dtype=torch.int32)
        )

    def counts(self, batch: Batch) -> Counts:
        return Counts(batch.labels.numel(), batch.labels.numel(), 0)

    def loss(self, model: Decoder, batch: Batch) -> Tensor:
        return model.loss(
            batch.input_ids, batch.labels, reduction="sum", cu_seqlens=batch.cu_seqlens
        )

    def evaluate(self, model: Decoder, check: Callable[[int], None]) -> dict[str, Any]:
        raise NotImplementedError("random tokens have no held-out part")


def _kept_in(config: RunConfig, *, wide_sums: bool) -> dict[str, str]:
    """Dtypes of what the optimizer reads and writes, as ``floors`` takes them."""
    return {
        "weights": config.train.weights,
        "gradients": "float32" if wide_sums else config.train.weights,
        "states": config.optimizer.states,
    }


def bench_train(config: RunConfig, *, steps: int = 10, warmup: int = 3) -> StepTimes:
    """Time the updates of a run as its recipe says, on random tokens, without a run directory.

    Args:
        config: of a causal run; its data is not read, its tokenizer (also that of a tokenised
            path) only for its vocabulary.
        steps: timed, and profiled once more after that.
        warmup: updates before.

    Raises:
        NotImplementedError: another objective, or a run of several processes.
        ValueError: fewer than one step or warm-up update; as ``given_tokenizer``.
    """
    if config.objective.kind != "causal":
        raise NotImplementedError(
            f"objective.kind is {config.objective.kind!r}; expected 'causal': the other "
            "objectives' data is not made at random"
        )
    for axis in ("dp_replicate", "dp_shard", "sp", "tp"):
        ranks = getattr(config.parallel, axis) or 1
        if ranks != 1:
            raise NotImplementedError(
                f"parallel.{axis} is {ranks}; expected 1: one process is timed; leave it out"
            )
    for name, value in (("steps", steps), ("warmup", warmup)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    device = choose_device(config.train.device)
    precision = choose_precision(config.train.precision, device)
    torch.manual_seed(config.train.seed)
    sync, folder = OneProcess(), Path()
    objective = _RandomTokens(Setting(config, folder, lambda text: None, None, 0, 1))
    model, optimizer = set_up(config, objective, None, device, sync)
    assert isinstance(model, Decoder)
    # Random tokens have no spikes; an update that is dropped would be timed too short.
    guard = Guard(GuardConfig(), folder)
    updater = Updater(config, objective, model, optimizer, guard, sync, precision)
    run = _Steps(updater, device, precision, config.samples_per_step)
    if device.type == "cuda":
        # Before the first step: a captured graph's memory shows while it is captured alone.
        torch.cuda.reset_peak_memory_stats(device)
    first_step = run.seconds(1)
    run.seconds(warmup - 1)
    seconds = median(run.seconds(1) for _ in range(steps))
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    known = device_peak(device)
    peak = known or measured_peak(device, precision)
    context = (config.data.seq + 1) // 2
    share = token_share(config, model, peak, precision)
    tokens = config.samples_per_step * config.data.seq
    wide = adds_wide(config, sync)
    least = floors(model, tokens, context, precision, **_kept_in(config, wide_sums=wide))
    times = run.profiled(steps)
    return StepTimes(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        precision=precision,
        tokens=tokens,
        first_step=first_step,
        milliseconds=1000 * seconds,
        tokens_per_second=tokens / seconds,
        mfu=None if share is None else share * tokens / seconds,
        peak=peak,
        peak_measured=known is None,
        memory=memory,
        parts=tuple(
            PartTime(part, times[part], least[part].milliseconds(peak, precision)) for part in PARTS
        ),
    )


class _Steps:
    """Updates one after the other."""

    def __init__(
        self, updater: Updater, device: torch.device, precision: str, samples: int
    ) -> None:
        self._updater, self._device, self._samples = updater, device, samples
        self._done = Counters(step=0, next_sample=0, tokens=0, seconds=0.0, precision=precision)

    def seconds(self, count: int) -> float:
        """Make some updates; return the seconds until the device has done them."""
        self._wait()
        began = time.perf_counter()
        for _ in range(count):
            made = self._updater.update(self._done)
            # The step number stays: a schedule that ends would end the run.
            self._done = self._done.model_copy(update={"next_sample": made.next_sample})
        self._wait()
        return time.perf_counter() - began

    def profiled(self, count: int) -> dict[str, float]:
        """Milliseconds of each part of a step."""
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities, acc_events=True) as found:
            wall = self.seconds(count)
        times = time_by_part(found.events() or [], 1000 * wall, self._device)
        return {part: time / count for part, time in times.items()}

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def measured_peak(device: torch.device, precision: str) -> Peak:
    """The rates that a device reaches here, in a large product and a large copy, as its peak."""

    def best(function: Callable[[], Tensor]) -> float:
        times = []
        for _ in range(_TRIALS):
            began = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
        return min(times)

    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    x = torch.randn(_PRODUCT, _PRODUCT, device=device).to(dtype)
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    flops = 2.0 * _PRODUCT**3 / best(lambda: x @ x)
    return Peak(flops, flops, 2.0 * _COPY_BYTES / best(lambda: target.copy_(source)))
