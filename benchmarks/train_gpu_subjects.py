"""What ``train_gpu`` times: rows of one subject, length and settings each, and how one is run.

Ours run in the trainer's own update, on random tokens: gradients, the guard's look at loss and
norm, clipping, the optimizer. transformers' LLaMA and the released code (``train_gpu_released``) run
in the plain loop that their users write.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from transnormer.config import apply_overrides
from transnormer.data import Batch
from transnormer.models import zoo
from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.models.segments import backward_in_segments
from transnormer.nn.token_mixers.lightning import Lightning
from transnormer.train.checkpoints import Counters
from transnormer.train.guard import Guard, GuardConfig
from transnormer.train.model_setup import set_up
from transnormer.train.objectives.base import Counts, Objective
from transnormer.train.recipe import RunConfig
from transnormer.train.sync import OneProcess
from transnormer.train.update import Updater

SIZES = {
    "385m": {"model_dim": 1_024, "num_layers": 24, "heads": 8, "glu_dim": 2_816},
    "1b": {"model_dim": 2_048, "num_layers": 16, "heads": 16, "glu_dim": 5_632},
    "7b": {"model_dim": 4_096, "num_layers": 30, "heads": 32, "glu_dim": 11_008},
    "toy": {"model_dim": 64, "num_layers": 2, "heads": 2, "glu_dim": 96},
}
VOCAB_SIZE, TOY_VOCAB_SIZE = 64_000, 512
WARMUP = 4
# Steps of more tokens than this are timed from the first on, once.
_LONG = 1 << 20
# A dry run's tokens are so many times fewer; its shortest row has the 16 that float8 needs.
_DRY = 128


class Row(NamedTuple):
    """One row of the result.

    Attributes:
        subject: tnl, llama, hf_llama, hf_llama_compiled or released.
        seq: tokens of a row.
        tokens: of a step.
        variant: what the row is for; "" is the recipe as it is meant.
        size: of ``SIZES``.
        settings: overrides of the run, as on the command line.
        packed: documents of about 512 tokens in one row.
        split: what lies between a mixer's projections as ops of its own, which the compiler fuses.
    """

    subject: str
    seq: int
    tokens: int = 32_768
    variant: str = ""
    size: str = "385m"
    settings: tuple[str, ...] = ()
    packed: bool = False
    split: bool = False

    @property
    def name(self) -> str:
        """What the row is called on the command line and in the result."""
        size = "" if self.size == "385m" else f"_{self.size}"
        variant = f"_{self.variant}" if self.variant else ""
        return f"{self.subject}{size}{variant}@{self.seq}"


class MakeUpdate(Protocol):
    """Builds a row's update, which returns the loss and the gradient's norm."""

    def __call__(self, row: Row, *, dry: bool, layers: int | None) -> Callable[[], list[float]]: ...


class Tokens(Objective[Decoder, Batch]):
    """The causal objective on random tokens, with a decoder that is given."""

    def __init__(self, config: RunConfig, decoder: DecoderConfig, row: Row) -> None:
        self._config, self._decoder = config, decoder
        self._packed, self._split = row.packed, row.split

    @property
    def has_heldout(self) -> bool:
        return False

    def facts(self) -> dict[str, Any]:
        return {}

    def build_model(self) -> Decoder:
        # Where it will train: initial values of billions of weights take a CPU minutes.
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = Decoder(self._decoder)
        for module in model.modules():
            if isinstance(module, Lightning) and self._split:
                module._is_released = False
        return model

    def batch(self, index: int) -> Batch:
        rows, seq = self._config.micro_batch, self._config.data.seq
        generator = torch.Generator().manual_seed(1)
        shape = (1, rows * seq) if self._packed else (rows, seq)
        ids = torch.randint(self._decoder.vocab_size, (2, *shape), generator=generator)
        bounds = None
        if self._packed:
            cuts = torch.randint(1, rows * seq, (rows * seq // 512,), generator=generator)
            bounds = torch.tensor(sorted({0, rows * seq, *cuts.tolist()}), dtype=torch.int32)
        return Batch(ids[0], ids[1], bounds)

    def counts(self, batch: Batch) -> Counts:
        return Counts(batch.labels.numel(), batch.labels.numel(), 0)

    def loss(self, model: Decoder, batch: Batch) -> Tensor:
        return model.loss(
            batch.input_ids, batch.labels, reduction="sum", cu_seqlens=batch.cu_seqlens
        )

    def evaluate(self, model: Decoder, check: Callable[[int], None]) -> dict[str, Any]:
        raise NotImplementedError("random tokens have no held-out part")


def decoder_of(row: Row, *, dry: bool, layers: int | None) -> DecoderConfig:
    """The model of a row of ours; ``layers`` of its blocks, the first ones, where given."""
    sizes = dict(SIZES["toy" if dry else row.size])
    sizes["num_layers"] = layers or sizes["num_layers"]
    sizes["vocab_size"] = TOY_VOCAB_SIZE if dry else VOCAB_SIZE
    if row.subject == "llama":
        return zoo.llama_custom(**sizes, tie_embeddings=True)
    return zoo.tnl_custom(**sizes)


def config_of(row: Row, *, dry: bool) -> RunConfig:
    """The run of a row of ours."""
    seq, tokens = (row.seq // _DRY, row.tokens // _DRY) if dry else (row.seq, row.tokens)
    data: dict[str, Any] = {
        "model": {"name": "tnl-385m"},
        "data": {"seq": seq, "packing": "documents" if row.packed else "stream"},
        "train": {"steps": 1_000_000, "tokens_per_step": tokens, "precision": "bfloat16"},
        "optimizer": {"lr": 3e-4, "warmup": 100_000},
        "output": {"dir": "unused"},
    }
    settings = [x for x in row.settings if not (dry and x.startswith("train.c"))]
    if dry:
        # Compilation and graphs are of the GPU.
        settings = [x for x in settings if not x.startswith("train.activation_memory")]
        settings = [_shorter(x) for x in settings]
    return RunConfig.model_validate(apply_overrides(data, settings))


def _shorter(setting: str) -> str:
    key, _, value = setting.partition("=")
    return f"{key}={int(value) // _DRY}" if key == "train.segment_tokens" else setting


def our_update(row: Row, *, dry: bool, layers: int | None) -> Callable[[], list[float]]:
    """An update of ours; returns the loss and the gradient's norm."""
    config = config_of(row, dry=dry)
    device = torch.device("cpu" if dry else "cuda")
    torch.manual_seed(0)
    objective = Tokens(config, decoder_of(row, dry=dry, layers=layers), row)
    sync = OneProcess()
    model, optimizer = set_up(config, objective, None, device, sync)
    guard = Guard(GuardConfig(), Path())
    updater = Updater(config, objective, model, optimizer, guard, sync, "bfloat16")
    done = Counters(step=0, next_sample=0, tokens=0, seconds=0.0, precision="bfloat16")
    if config.train.segment_tokens is not None:
        _warm_segments(model, config, device)

    def run() -> list[float]:
        nonlocal done
        made = updater.update(done)
        done = done.model_copy(update={"next_sample": made.next_sample})
        return [made.loss, made.grad_norm]

    return run


def _warm_segments(model: Any, config: RunConfig, device: torch.device) -> None:
    """Compile for whole segments on two of them: a whole row takes half a minute."""
    length = config.train.segment_tokens
    assert length is not None
    ids = torch.randint(model.config.vocab_size, (1, 2 * length), device=device)
    model.train()
    backward_in_segments(
        model,
        ids,
        ids,
        segment_tokens=length,
        context=lambda: torch.autocast(device.type, torch.bfloat16),
    )
    model.zero_grad()


def hugging_face_update(row: Row, *, dry: bool, layers: int | None) -> Callable[[], list[float]]:
    """transformers' LLaMA with SDPA, weights and states in bfloat16, which is its fastest."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes, device = SIZES["toy" if dry else row.size], "cpu" if dry else "cuda"
    vocab_size = TOY_VOCAB_SIZE if dry else VOCAB_SIZE
    make: Any = LlamaConfig
    config = make(
        vocab_size=vocab_size,
        hidden_size=sizes["model_dim"],
        intermediate_size=sizes["glu_dim"],
        num_hidden_layers=layers or sizes["num_layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["heads"],
        tie_word_embeddings=True,
        max_position_embeddings=row.seq,
        attn_implementation="sdpa",
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlamaForCausalLM(config)
    return plain_loop(
        model, row, dry=dry, compiled=row.subject.endswith("compiled"), vocab_size=vocab_size
    )


def plain_loop(
    model: Any, row: Row, *, dry: bool, compiled: bool, vocab_size: int
) -> Callable[[], list[float]]:
    """An update of a model of transformers' kind as its users write it, all in bfloat16."""
    model = model.to(torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-6, fused=True)
    called: Any = torch.compile(model) if compiled and not dry else model
    seq = row.seq // _DRY if dry else row.seq
    rows, device = max(row.tokens // row.seq, 1), "cpu" if dry else "cuda"
    generator = torch.Generator(device).manual_seed(1)
    ids = torch.randint(vocab_size, (rows, seq), device=device, generator=generator)

    def run() -> list[float]:
        loss = called(input_ids=ids, labels=ids).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return [float(loss), float(norm)]

    return run


def maker_of(row: Row) -> MakeUpdate:
    """What builds the update of a row of ours or of transformers'."""
    return hugging_face_update if row.subject.startswith("hf") else our_update


def attention_by(row: Row, *, dry: bool) -> AbstractContextManager[Any]:
    """cuDNN's attention for our LLaMA; torch's choice for the others."""
    if row.subject != "llama" or dry:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION])


def measure(
    row: Row, make: MakeUpdate, *, steps: int, kernels: int, dry: bool, layers: int | None
) -> dict[str, Any]:
    """Seconds of the first update, the median after the warm-up, tokens a second, peak memory.

    ``make`` builds the row's update (``maker_of`` names those that stand here). An update ends when its loss is read, so that updates follow each other as in a run: the host
    prepares the next one while the device is at the optimizer.
    """
    wait = (lambda: None) if dry else torch.cuda.synchronize
    started = time.perf_counter()
    run, times, losses = make(row, dry=dry, layers=layers), [], []
    if row.tokens > _LONG:
        # To compile, the segments before the first update are enough.
        steps = min(steps, 1)
        if not steps:
            return {"first_step_s": time.perf_counter() - started}
    warmup = 0 if row.tokens > _LONG else WARMUP
    with attention_by(row, dry=dry):
        for _ in range(warmup + steps):
            began = time.perf_counter()
            losses.append(run()[0])
            if len(losses) <= warmup:
                wait()
            times.append(time.perf_counter() - began)
        found: dict[str, Any] = {"first_step_s": times[0], "losses": [losses[0], losses[-1]]}
        if steps:
            median = statistics.median(times[warmup:])
            found["step_ms"] = 1e3 * median
            found["slowest_ms"] = 1e3 * max(times[warmup:])
            tokens = config_of(row, dry=dry).train.tokens_per_step
            found["tokens_per_second"] = tokens / median
        if not dry:
            # The graph's own memory is in no other figure; what the allocator holds bounds it.
            found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            found["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        if kernels and not dry:
            found["kernels"], found["kernels_ms"] = kernels_of(run, kernels)
    return found


def kernels_of(call: Callable[[], Sequence[float]], top: int) -> tuple[list[dict[str, Any]], float]:
    """The costliest kernels of one call, and the milliseconds of all of them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as record:
        call()
        torch.cuda.synchronize()
    events = sorted(record.key_averages(), key=lambda e: -e.self_device_time_total)
    rows = [
        {"name": e.key[:110], "count": e.count, "ms": e.self_device_time_total / 1e3}
        for e in events[:top]
    ]
    return rows, sum(e.self_device_time_total for e in events) / 1e3
