"""`transnormer info`: what a checkpoint, or a published size, is."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from transnormer.cli import common

if TYPE_CHECKING:
    import torch

    from transnormer.models.decoder import DecoderConfig


def info(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="[CKPT]", help="Checkpoint, or a published size; without it those are listed."
        ),
    ] = None,
    context: Annotated[
        int, typer.Option(min=1, help="Tokens behind and including the one that is counted.")
    ] = 2048,
    as_json: common.Json = False,
) -> None:
    """Show configuration, parameters, costs and tokenizer of a checkpoint.

    The state is of one sequence: a part of constant size, and what every token adds. Operations are
    of the forward pass of one token, 2 a multiply-add; training costs three times as many. The name
    of a published size, such as tnl-385m, shows its configuration in float32; without an argument
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
    facts = (
        _of_size(checkpoint, context)
        if checkpoint in zoo.names()
        else _of_checkpoint(checkpoint, context)
    )
    if as_json:
        common.print_json(facts)
        return
    for name, value in facts.items():
        if name != "config":
            text = f"{value:,}" if type(value) is int else str(value)
            common.write_line(f"{name.replace('_', ' '):<24} {text}")


def _of_size(name: str, context: int) -> dict[str, Any]:
    import torch

    from transnormer.models import zoo

    config = zoo.get(name)
    return {
        "name": name,
        **_costs(config, torch.float32, context),
        **_sizes(config),
        "config": config.model_dump(mode="json"),
    }


def _of_checkpoint(path: str, context: int) -> dict[str, Any]:
    from transnormer.data.tokenizers import load_tokenizer
    from transnormer.models import checkpoint

    model = checkpoint.load(path)
    file = checkpoint.find_tokenizer(path)
    facts: dict[str, Any] = {
        "path": str(checkpoint.find_model(path)),
        **_costs(model.config, model.head_weight.dtype, context),
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


def _costs(config: "DecoderConfig", dtype: "torch.dtype", context: int) -> dict[str, Any]:
    from transnormer.models.cost import ModelCost

    cost = ModelCost.of(config, dtype)
    flops = cost.flops(context)
    return {
        "parameters": cost.parameters,
        "without_embeddings": cost.without_embeddings,
        "state_bytes": cost.constant_state_bytes,
        "state_bytes_per_token": cost.state_bytes_per_token,
        "context": context,
        "flops_per_token": round(flops.total),
        "mixing_flops_per_token": round(flops.mixing),
        "head_flops_per_token": round(flops.head),
    }
