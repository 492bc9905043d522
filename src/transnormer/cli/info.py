"""`transnormer info`: what a checkpoint, or a published size, is."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from transnormer.cli import common

if TYPE_CHECKING:
    from transnormer.models.decoder import DecoderConfig


def info(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="[CKPT]", help="Checkpoint, or a published size; without it those are listed."
        ),
    ] = None,
    as_json: common.Json = False,
) -> None:
    """Show configuration, parameters, fingerprint and tokenizer of a checkpoint.

    The name of a published size, such as tnl-385m, shows its configuration; without an argument
    the names are listed.
    """
    from transnormer.models import zoo

    if checkpoint is None:
        names = zoo.names()
        if as_json:
            common.print_json({"names": names})
        else:
            common.write_line("\n".join(names))
        return
    facts = _of_size(checkpoint) if checkpoint in zoo.names() else _of_checkpoint(checkpoint)
    if as_json:
        common.print_json(facts)
        return
    for name, value in facts.items():
        if name != "config":
            text = f"{value:,}" if type(value) is int else str(value)
            common.write_line(f"{name.replace('_', ' '):<24} {text}")


def _of_size(name: str) -> dict[str, Any]:
    import torch

    from transnormer.models import zoo
    from transnormer.models.decoder import Decoder

    config = zoo.get(name)
    with torch.device("meta"):
        model = Decoder(config)
    return {
        "name": name,
        "parameters": model.num_parameters(),
        "without_embeddings": model.num_parameters(embeddings=False),
        **_sizes(config),
        "config": config.model_dump(mode="json"),
    }


def _of_checkpoint(path: str) -> dict[str, Any]:
    from transnormer.data.tokenizers import load_tokenizer
    from transnormer.models import checkpoint

    model = checkpoint.load(path)
    file = checkpoint.find_tokenizer(path)
    facts: dict[str, Any] = {
        "path": str(checkpoint.find_model(path)),
        "parameters": model.num_parameters(),
        "without_embeddings": model.num_parameters(embeddings=False),
        "dtype": str(model.head_weight.dtype).removeprefix("torch."),
        "fingerprint": model.fingerprint(),
        **_sizes(model.config),
        "tokenizer": "none" if file is None else file.name,
    }
    if file is not None:
        tokenizer = load_tokenizer(file)
        facts["tokenizer_ids"] = tokenizer.vocab_size
        facts["tokenizer_fingerprint"] = tokenizer.fingerprint
    return {**facts, "config": model.config.model_dump(mode="json")}


def _sizes(config: "DecoderConfig") -> dict[str, Any]:
    mixers = sorted({block.token_mixer.kind for block in config.blocks})
    return {
        "vocab_size": config.vocab_size,
        "model_dim": config.model_dim,
        "layers": len(config.blocks),
        "token_mixers": ", ".join(mixers),
        "tied_head": config.tie_embeddings,
    }
