"""`transnormer tokenize`: train a tokenizer, and turn text into token shards."""

from pathlib import Path
from typing import Annotated

import typer

from transnormer.cli import common

app = typer.Typer(
    help="Train a tokenizer, or turn a corpus into token shards that `train` reads.",
    no_args_is_help=True,
)

Corpus = Annotated[
    str,
    typer.Argument(
        metavar="TEXT", help="A .txt, .md or .jsonl file, a glob, a folder, or embedded."
    ),
]


@app.command("train")
def train_tokenizer(
    corpus: Corpus,
    target: Annotated[Path, typer.Argument(metavar="DST", help="Directory for the tokenizer.")],
    vocab_size: Annotated[int, typer.Option(help="Number of ids, special ones included.")] = 4096,
    as_json: common.Json = False,
) -> None:
    """Train a byte-level BPE on a corpus."""
    from transnormer.data import read_documents, train_bpe

    tokenizer = train_bpe((document.text for document in read_documents(corpus)), vocab_size)
    tokenizer.save(target)
    if as_json:
        common.print_json(
            {
                "target": str(target),
                "vocab_size": tokenizer.vocab_size,
                "fingerprint": tokenizer.fingerprint,
            }
        )
    else:
        typer.echo(f"a tokenizer of {tokenizer.vocab_size:,} ids is in {target}")


@app.command("encode")
def encode(
    corpus: Corpus,
    target: Annotated[Path, typer.Argument(metavar="DST", help="New directory for the shards.")],
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", metavar="PATH", help="bytes, a file or its directory.")
    ] = "bytes",
    shard_tokens: Annotated[int, typer.Option(help="Tokens of one shard.")] = 2**27,
    as_json: common.Json = False,
) -> None:
    """Encode a corpus into token shards; data.path in a run's TOML may name their directory."""
    from transnormer.data import load_tokenizer, read_documents, write_shards

    words = load_tokenizer(tokenizer)
    manifest = write_shards(
        read_documents(corpus), words, target, source=corpus, shard_tokens=shard_tokens
    )
    facts = {"target": str(target), **manifest.model_dump(mode="json")}
    if as_json:
        common.print_json(facts)
    else:
        typer.echo(f"{manifest.num_tokens:,} tokens are in {target}")
