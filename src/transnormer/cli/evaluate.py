"""`transnormer eval`: how well a model predicts a text."""

from typing import Annotated

import typer

from transnormer.cli import common


def evaluate(
    checkpoint: common.Checkpoint,
    text: Annotated[
        str,
        typer.Option(
            "--text",
            metavar="FILE",
            help="A text; .jsonl has a document a line. Also .xz, .gz, .zst, a folder or a glob.",
        ),
    ],
    tokenizer: common.TokenizerOption = None,
    device: common.Device = "auto",
    dtype: common.Dtype = None,
    as_json: common.Json = False,
) -> None:
    """Score a text: nats per token and bits per byte.

    The model reads each document from its first byte to its last in one go, carrying its state:
    there is no window. A begin-of-text token precedes, so that every byte is scored; a byte order
    mark at the head of a file is no text.
    """
    from transnormer.data import read_documents
    from transnormer.eval.perplexity import score_texts

    texts = [document.text for document in read_documents(text, name="--text")]
    model = common.open_model(checkpoint, device, dtype)
    words = common.open_tokenizer(checkpoint, tokenizer, model)
    with common.TokenProgress("scoring") as progress:
        score = score_texts(model, words, texts, progress=progress.advance)
    if as_json:
        common.print_json(score._asdict())
        return
    common.write_line(f"documents       {len(texts):,}")
    common.write_line(f"tokens          {score.tokens:,}")
    common.write_line(f"bytes           {score.bytes:,}")
    common.write_line(f"nats per token  {score.nats_per_token:.4f}")
    common.write_line(f"bits per byte   {score.bits_per_byte:.4f}")
