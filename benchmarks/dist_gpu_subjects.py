"""What ``dist_gpu`` times: rows of one layout each, and how one is run on a rank.

All run in the trainer's own update on random tokens, laid out by the trainer's own code from keys of
a run file: gradients, the guard's look at loss and norm, clipping, the optimizer.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dist_gpu_peers import apply_ulysses, ring_attention
from subjects import error_text
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_gpu_subjects import Row as TrainRow
from train_gpu_subjects import Tokens, config_of, decoder_of

from transnormer.data import Batch
from transnormer.models import zoo
from transnormer.models.decoder import DecoderConfig
from transnormer.parallel import current_world
from transnormer.train.checkpoints import Counters
from transnormer.train.guard import Guard, GuardConfig
from transnormer.train.model_setup import set_up
from transnormer.train.processes import join_processes
from transnormer.train.recipe import RunConfig
from transnormer.train.sync import GradSync, OneProcess
from transnormer.train.update import Update, Updater

Tell = Callable[..., None]
# Settings that only a model of full size needs.
_LARGE = ("train.compile", "train.activation_memory", "train.cuda_graph")
# Relative deviations of a small model's update on the ranks from that on one GPU, in bfloat16: of the
# loss, the gradient's norm, and all first moments, which are the gradient. A sum that is missing, or
# made twice, is off by a third at least.
LIMITS = {"loss": 2e-3, "grad_norm": 2e-2, "gradient": 4e-2}


class Row(NamedTuple):
    """One row of the result.

    Attributes:
        name: on the command line and in the result.
        kind: "updates", "lengths", "largest", "outer" or "link".
        lengths: tokens of a row; more than one for "lengths".
        tokens: of a step; 0 is one row.
        subject: tnl or llama.
        size: of the model.
        alone: each GPU trains a model of its own, none knows of the other.
        settings: overrides of the run, as on the command line.
        peer: who exchanges instead of the library, with ``parallel.sp``: ulysses or ring.
        warmup, steps: updates before those that are timed, and those.
        seconds: that the row may take.
        slow: over NCCL's sockets.
    """

    name: str
    kind: str = "updates"
    lengths: tuple[int, ...] = (8_192,)
    tokens: int = 0
    subject: str = "tnl"
    size: str = "1b"
    alone: bool = False
    settings: tuple[str, ...] = ()
    peer: str = ""
    warmup: int = 3
    steps: int = 8
    seconds: float = 120.0
    slow: bool = False


class Options(NamedTuple):
    """What all rows share: a dry run on CPUs, and how many kernels to list."""

    dry: bool = False
    kernels: int = 0


class Share(Tokens):
    """Random tokens of which each rank with batches of its own takes its rows."""

    def __init__(self, config: RunConfig, decoder: DecoderConfig, row: TrainRow, sync: GradSync):
        super().__init__(config, decoder, row)
        self._own = slice(sync.rank, None, sync.world_size)

    def batch(self, index: int) -> Batch:
        whole = super().batch(index)
        return Batch(whole.input_ids[self._own], whole.labels[self._own], whole.cu_seqlens)


class Run:
    """A row's model on this rank, in the trainer's own update."""

    def __init__(
        self, row: Row, options: Options, *, alone: bool = False, small: bool = False
    ) -> None:
        self.row, self._dry, self._small = row, options.dry, small
        alone = alone or row.alone
        self.settings = row.settings
        if small:
            kept = [x for x in row.settings if not x.startswith(_LARGE)]
            self.settings = tuple(_small_setting(x) for x in kept)
        if alone:
            self.settings = tuple(x for x in self.settings if not x.startswith("parallel."))
        seq = 1_024 if small else row.lengths[0]
        tokens = 2 * seq if small else (row.tokens or seq)
        config = self._config(seq, tokens)
        device = torch.device("cpu" if self._dry else "cuda")
        self.sync: GradSync = OneProcess()
        if alone and not self._dry:
            device = torch.device("cuda", current_world().local_rank)
        elif not alone:
            self.sync, device = join_processes(config, device)
        self.device = device
        torch.manual_seed(0)
        self._decoder = self._decoder_config()
        objective = Share(config, self._decoder, self._training(seq, tokens), self.sync)
        self.model, self.optimizer = set_up(config, objective, None, device, self.sync)
        self._peer = "" if alone else row.peer
        if self._peer == "ulysses":
            model: Any = self.model
            apply_ulysses(model, model.axis.chain.group)
        self._guard = Guard(GuardConfig(), Path())
        self.take(seq, tokens)

    def _training(self, seq: int, tokens: int) -> TrainRow:
        row = self.row
        return TrainRow(row.subject, seq, tokens, size=row.size, settings=self.settings)

    def _decoder_config(self) -> DecoderConfig:
        if not self._small:
            return decoder_of(self._training(0, 0), dry=self._dry, layers=None)
        sizes = {"vocab_size": 512, "model_dim": 256, "num_layers": 3, "heads": 2, "glu_dim": 512}
        make: Any = zoo.llama_custom if self.row.subject == "llama" else zoo.tnl_custom
        return make(**sizes)

    def _config(self, seq: int, tokens: int) -> RunConfig:
        return config_of(self._training(seq, tokens), dry=self._dry and not self._small)

    def take(self, seq: int, tokens: int) -> None:
        """Go on with rows of another length."""
        config = self._config(seq, tokens)
        objective = Share(config, self._decoder, self._training(seq, tokens), self.sync)
        self._updater = Updater(
            config, objective, self.model, self.optimizer, self._guard, self.sync, "bfloat16"
        )
        self.tokens, self.seq = config.train.tokens_per_step, config.data.seq
        self._done = Counters(step=0, next_sample=0, tokens=0, seconds=0.0, precision="bfloat16")

    def update(self) -> Update:
        """Make one update of the trainer."""
        made = self._updater.update(self._done)
        step = self._done.step + 1
        self._done = self._done.model_copy(update={"step": step, "next_sample": made.next_sample})
        return made

    @contextmanager
    def attention(self, backend: SDPBackend | None) -> Iterator[None]:
        """The peer's way of attention, for rows of ``seq``; backend: whose kernels it takes."""
        with ExitStack() as stack:
            if self._peer == "ring":
                model: Any = self.model
                stack.enter_context(ring_attention(model, model.axis.chain.group, self.seq))
            if backend is not None:
                stack.enter_context(sdpa_kernel([backend]))
            yield


def _small_setting(setting: str) -> str:
    """A setting of a row as the small model's check takes it."""
    key, _, value = setting.partition("=")
    return f"{key}={ {'train.segment_tokens': 128, 'parallel.outer.tau': 2}.get(key, value) }"


def wait(options: Options) -> None:
    """Until the device has done everything."""
    if not options.dry:
        torch.cuda.synchronize()


def backends(row: Row, options: Options) -> list[SDPBackend | None]:
    """Kernels of softmax attention to take, the fastest first; torch's ring may refuse some."""
    if options.dry or row.subject != "llama":
        return [None]
    return [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]


def deviation(row: Row, options: Options, backend: SDPBackend | None) -> dict[str, float]:
    """Of one update of a small model on the ranks from the same one on this GPU alone."""
    alone = Run(row, options, alone=True, small=True)
    with alone.attention(backend):
        one = alone.update()
    ranks = Run(row, options, small=True)
    with ranks.attention(backend):
        made = ranks.update()
    whole = ranks.sync.whole(ranks.model, ranks.optimizer)

    def compare() -> dict[str, float]:
        assert whole is not None
        states, off, size = alone.optimizer.state_tensors(), 0.0, 0.0
        for name, x in states.items():
            if name.endswith("/exp_avg"):
                x = x.double().cpu()
                off += float((whole[1][name].double().cpu() - x).square().sum())
                size += float(x.square().sum())
        return {
            "loss": abs(made.loss / one.loss - 1),
            "grad_norm": abs(made.grad_norm / one.grad_norm - 1),
            "gradient": (off / size) ** 0.5,
        }

    return ranks.sync.from_first(compare)


def check(tell: Tell, row: Row, options: Options) -> SDPBackend | None:
    """Show a row equal to one GPU; returns whose attention it then takes.

    Raises:
        RuntimeError: it is not equal.
    """
    said = ""
    for backend in backends(row, options):
        try:
            found = deviation(row, options, backend)
        except Exception as error:
            if row.peer != "ring" or options.dry:
                raise
            # Torch's ring does not take all kernels in all versions.
            said = f"{said} {backend}: {error_text(error)};"
            continue
        if all(found[name] <= most for name, most in LIMITS.items()):
            tell(check=found, attention=None if backend is None else backend.name)
            return backend
        said = f"{said} {backend}: {found};"
    raise RuntimeError(f"not equal to one GPU:{said} expected at most {LIMITS}")
