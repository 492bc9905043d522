"""`transnormer eval`: how well a model predicts a text."""

from typing import Annotated

import typer

from transnormer.cli import common


def evaluate(
    checkpoint: common.Checkpoint,
    text: Annotated[
        str,
        typer.Option(
            "--text", metavar="FILE", help="A .txt, .md or .jsonl file (also .xz, .gz), or a glob."
        ),
    ],
    tokenizer: common.TokenizerOption = None,
    device: common.Device = "auto",
    dtype: common.Dtype = None,
    as_json: common.Json = False,
) -> None:
    """Score a text: nats per token and bits per byte.

    The model reads each document from its first byte to its last in one go, carrying its state:
    there is no window. A begin-of-text token precedes, so that every byte is scored.
    """
    from transnormer.data import read_documents
    from transnormer.eval.perplexity import score_texts

    texts = [document.text for document in read_documents(text)]
    model = common.open_model(checkpoint, device, dtype)
    words = common.open_tokenizer(checkpoint, tokenizer, model)
    with common.TokenProgress("scoring") as progress:
        score = score_texts(model, words, texts, progress=progress.advance)
    if as_json:
        common.print_json(score._asdict())
        return
    typer.echo(f"documents       {len(texts):,}")
    typer.echo(f"tokens          {score.tokens:,}")
    typer.echo(f"bytes           {score.bytes:,}")
    typer.echo(f"nats per token  {score.nats_per_token:.4f}")
    typer.echo(f"bits per byte   {score.bits_per_byte:.4f}")
