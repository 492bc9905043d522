"""`transnormer tokenize`: train a tokenizer, and turn text into token shards."""

from pathlib import Path
from typing import Annotated

import typer

from transnormer.cli import common

app = typer.Typer(
    help="Train a tokenizer, or turn a corpus into token shards that `train` reads.",
    no_args_is_help=True,
)

_NAME = "TEXT"
Corpus = Annotated[
    str,
    typer.Argument(metavar=_NAME, help="A text or .jsonl file, a glob, a folder, or embedded."),
]


HeldOut = Annotated[
    str | None,
    typer.Option(
        "--heldout",
        metavar="SHARE|TEXT",
        help="Kept out of training: a share, or another text; default: a tenth, and for embedded "
        "its own split.",
        show_default=False,
    ),
]


def _heldout(given: str | None) -> float | str | None:
    """A share where the option is a number, else the path of a text."""
    try:
        return None if given is None else float(given)
    except ValueError:
        return given


@app.command("train")
def train_tokenizer(
    corpus: Corpus,
    target: Annotated[Path, typer.Argument(metavar="DST", help="New directory for the tokenizer.")],
    vocab_size: Annotated[int, typer.Option(help="Number of ids, special ones included.")] = 4096,
    heldout: HeldOut = None,
    han: Annotated[
        int, typer.Option(help="3755 or 6763 common Chinese characters become a token each.")
    ] = 0,
    as_json: common.Json = False,
) -> None:
    """Train a byte-level BPE on the training part of a corpus."""
    from transnormer import data

    tokenizer = data.train_tokenizer(
        corpus, vocab_size, target, heldout=_heldout(heldout), han=han, name=_NAME
    )
    if as_json:
        common.print_json(
            {
                "target": str(target),
                "vocab_size": tokenizer.vocab_size,
                "fingerprint": tokenizer.fingerprint,
            }
        )
    else:
        common.write_line(f"a tokenizer of {tokenizer.vocab_size:,} ids is in {target}")


@app.command("encode")
def encode(
    corpus: Corpus,
    target: Annotated[Path, typer.Argument(metavar="DST", help="New directory for the shards.")],
    tokenizer: Annotated[
        str,
        typer.Option("--tokenizer", metavar="PATH", help="bytes, bpe:N, a file or its directory."),
    ] = "bytes",
    heldout: HeldOut = None,
    shard_tokens: Annotated[int, typer.Option(help="Tokens of one shard.")] = 2**27,
    as_json: common.Json = False,
) -> None:
    """Encode a corpus into token shards; data.path in a run's TOML may name their directory.

    DST then holds train, heldout and tokenizer.
    """
    from transnormer import data

    made = data.tokenize_corpus(
        corpus,
        tokenizer,
        target,
        heldout=_heldout(heldout),
        shard_tokens=shard_tokens,
        name=_NAME,
    )
    if as_json:
        held = None if made.heldout is None else made.heldout.model_dump(mode="json")
        train = made.train.model_dump(mode="json")
        common.print_json({"target": str(target), "train": train, "heldout": held})
        return
    held_tokens = 0 if made.heldout is None else made.heldout.num_tokens
    common.write_line(
        f"{made.train.num_tokens:,} training and {held_tokens:,} held-out tokens are in {target}"
    )
