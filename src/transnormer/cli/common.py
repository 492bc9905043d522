"""What several commands share: options, loading a model with its tokenizer, output."""

import errno
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from transnormer.files import naming

if TYPE_CHECKING:
    import torch

    from transnormer.data.tokenizers import Tokenizer
    from transnormer.models.decoder import Decoder

DTYPES = ("float64", "float32", "bfloat16", "float16")

Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CKPT", help="Run, step, saved model or released checkpoint; or a hub id."
    ),
]
Device = Annotated[
    str, typer.Option(help="auto (the first GPU, else the CPU), cpu, cuda, cuda:1, ...")
]
Dtype = Annotated[
    str | None,
    typer.Option(help=f"One of {', '.join(DTYPES)}; default: as stored.", show_default=False),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="PATH",
        help="bytes, a tokenizer file or its directory; default: the one beside the weights.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object last.", metavar="")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Stop after so many.")]
Temperature = Annotated[
    float, typer.Option("--temperature", "-t", help="0 always takes the likeliest token.")
]
TopK = Annotated[
    int | None, typer.Option(help="Draw from the K likeliest tokens.", show_default=False)
]
TopP = Annotated[
    float | None,
    typer.Option(help="Draw from the likeliest tokens of this probability.", show_default=False),
]
Seed = Annotated[
    int | None, typer.Option(help="The same seed draws the same text.", show_default=False)
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="End before this text; may be repeated.", show_default=False),
]


def resolve_device(name: str) -> "torch.device":
    """The device behind an option; raises ValueError or, where it is absent, RuntimeError."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wrong = f"device is {name!r}; expected auto, cpu, cuda or cuda:N; choose one of them"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(wrong) from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(wrong)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device is {name!r}; expected a GPU, there is none; take --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise RuntimeError(f"device is {name!r}; expected at most cuda:{last}, the last GPU")
    return device


def resolve_dtype(name: str | None) -> "torch.dtype | None":
    """The dtype behind an option."""
    import torch

    if name is not None and name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; expected one of {', '.join(DTYPES)}")
    return None if name is None else getattr(torch, name)


def open_model(checkpoint: str, device: str, dtype: str | None) -> "Decoder":
    """Load a model as the options say."""
    from transnormer.models import checkpoint as checkpoints

    return checkpoints.load(checkpoint, device=resolve_device(device), dtype=resolve_dtype(dtype))


def open_tokenizer(checkpoint: str, given: str | None, model: "Decoder") -> "Tokenizer":
    """The tokenizer beside a model, or the given one, checked against the model.

    Raises:
        FileNotFoundError: no tokenizer.
        ValueError: the model was trained with another, or has a smaller vocabulary.
    """
    from transnormer.data.tokenizers import load_tokenizer
    from transnormer.models import checkpoint as checkpoints

    source = given if given is not None else checkpoints.find_tokenizer(checkpoint)
    if source is None:
        raise FileNotFoundError(
            f"{checkpoint} holds no tokenizer; expected one beside the weights; pass --tokenizer"
        )
    tokenizer = load_tokenizer(source)
    trained_with = checkpoints.tokenizer_fingerprint(checkpoints.find_model(checkpoint))
    if trained_with is not None and trained_with != tokenizer.fingerprint:
        raise ValueError(
            f"tokenizer {source} has the fingerprint {tokenizer.fingerprint[:12]}; expected "
            f"{trained_with[:12]}, the one that {checkpoint} was trained with"
        )
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"tokenizer {source} has {tokenizer.vocab_size} ids; expected at most "
            f"{model.config.vocab_size}, the vocabulary of {checkpoint}; pass the one that belongs "
            "to it"
        )
    return tokenizer


# What was expected where the system refuses a file; anything else is a path to be checked.
_NO_ROOM = "room on the disk; free some, or choose another place"
_DIRECTORY = "a directory there; choose another path"
_EXPECTED = {
    errno.ENOSPC: _NO_ROOM,
    errno.EDQUOT: _NO_ROOM,
    errno.EFBIG: _NO_ROOM,
    errno.EROFS: "a disk that may be written; choose another place",
    errno.EACCES: "permission; change it, or choose another path",
    errno.EPERM: "permission; change it, or choose another path",
    errno.EADDRINUSE: "an address that nobody listens at; choose another port",
    errno.EADDRNOTAVAIL: "an address of this machine; choose another host",
    errno.EEXIST: _DIRECTORY,
    errno.ENOTDIR: _DIRECTORY,
}


def explain(error: Exception) -> str:
    """The message of an error; a refusal of the system names its file and says what to do."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    where = "" if error.filename is None else f"{error.filename}: "
    expected = _EXPECTED.get(error.errno or 0, "a path that can be used so; choose another")
    return f"{where}{error.strerror}; expected {expected}"


def decode(data: bytes, name: str) -> str:
    """Text as it is, line ends included, without a byte order mark; ValueError if not UTF-8."""
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 at byte {error.start}; expected UTF-8; convert it"
        ) from error


def read_text(path: Path) -> str:
    """Read a UTF-8 file; raises FileNotFoundError or ValueError with one clear line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; expected a text in UTF-8; check the path")
    return decode(path.read_bytes(), str(path))


def print_json(data: dict[str, Any]) -> None:
    """Print one JSON object on one line, in ASCII: no encoding of the output can break it."""
    write_line(json.dumps(data))


def write_line(text: str) -> None:
    """Print a line."""
    write_piece(text + "\n")


def write_piece(text: str) -> None:
    """Print streamed text at once; an OSError names the output."""
    with naming("standard output"):
        sys.stdout.write(text)
        sys.stdout.flush()


def stream_out(pieces: Iterable[str], *, silent: bool = False) -> str:
    """Print pieces of text as they come, unless silent; return all of it."""
    text = []
    for piece in pieces:
        text.append(piece)
        if not silent:
            write_piece(piece)
    return "".join(text)


class TokenProgress:
    """A count of tokens, or of other units, on a terminal's last line; nothing elsewhere."""

    def __init__(self, what: str, unit: str = "tokens") -> None:
        from rich.console import Console
        from rich.progress import Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            TextColumn("{task.completed:,.0f} " + unit),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(what, total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def advance(self, tokens: int) -> None:
        """Count tokens."""
        self._progress.advance(self._task, tokens)
