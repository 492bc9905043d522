"""`transnormer info`: what a checkpoint, or a published size, is."""

from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from transnormer.cli import common

if TYPE_CHECKING:
    import torch

    from transnormer.models.cost import ModelCost
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
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Bounds of the speed on it, such as h100.", show_default=False
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Count in float32 or bfloat16; default: as stored, of a size float32.",
            show_default=False,
        ),
    ] = None,
    as_json: common.Json = False,
) -> None:
    """Show configuration, parameters, costs and tokenizer of a checkpoint.

    The state is of one sequence: a part of constant size, and what every token adds. Operations are
    of the forward pass of one token, 2 a multiply-add; training costs three times as many. Memory to
    serve is that of the weights and one state; to train, that of weights, gradients and AdamW's
    moments, to which activations come (of TransNormerLLM's: shown a token). --device names a GPU, here
    or elsewhere, and shows what it could do at most: decoding by its bandwidth, prompts and training by
    its products. The name of a published size, such as tnl-385m, shows its configuration in float32;
    without an argument the names are listed.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"--dtype is {dtype!r}; expected float32 or bfloat16")
    from transnormer.models import zoo

    if checkpoint is None:
        names = zoo.names()
        if as_json:
            common.print_json({"names": names})
        else:
            common.write_line("\n".join(names))
        return
    wanted = _Wanted(context, device, dtype)
    facts = (
        _of_size(checkpoint, wanted)
        if checkpoint in zoo.names()
        else _of_checkpoint(checkpoint, wanted)
    )
    if as_json:
        common.print_json(facts)
        return
    for name, value in facts.items():
        if name != "config":
            _write(name.replace("_", " "), value)


class _Wanted(NamedTuple):
    """What the options ask for."""

    context: int
    device: str | None
    dtype: str | None


def _write(name: str, value: Any) -> None:
    if isinstance(value, dict):
        for key, part in value.items():
            _write(f"{name}, {key}", part)
        return
    text = f"{value:,}" if type(value) is int else str(value)
    common.write_line(f"{name:<44} {text}")


def _of_size(name: str, wanted: _Wanted) -> dict[str, Any]:
    import torch

    from transnormer.models import zoo

    config = zoo.get(name)
    return {
        "name": name,
        **_costs(config, torch.float32, wanted),
        **_sizes(config),
        "config": config.model_dump(mode="json"),
    }


def _of_checkpoint(path: str, wanted: _Wanted) -> dict[str, Any]:
    from transnormer.data.tokenizers import load_tokenizer
    from transnormer.models import checkpoint

    model = checkpoint.load(path)
    file = checkpoint.find_tokenizer(path)
    facts: dict[str, Any] = {
        "path": str(checkpoint.find_model(path)),
        **_costs(model.config, model.head_weight.dtype, wanted),
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


def _costs(config: "DecoderConfig", stored: "torch.dtype", wanted: _Wanted) -> dict[str, Any]:
    from transnormer.models import limits
    from transnormer.models.cost import ModelCost

    context = wanted.context
    cost = ModelCost.of(config, common.resolve_dtype(wanted.dtype) or stored)
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
        "serving_bytes": limits.serving_bytes(config, context),
        "training_bytes": limits.training_bytes(cost.parameters),
        **_activations(config, context),
        **({} if wanted.device is None else _bounds(cost, stored, wanted)),
    }


def _activations(config: "DecoderConfig", context: int) -> dict[str, Any]:
    """Bytes that training keeps for a token without checkpointing, where a formula knows them."""
    from transnormer.parallel.mesh import Axes
    from transnormer.parallel.plan import has_formula, memory_of

    if not has_formula(config):
        return {}
    memory = memory_of(config, Axes(1, 1, 1, 1), context, "none")
    return {"activation_bytes_per_token": round(memory.activations / context)}


def _bounds(cost: "ModelCost", stored: "torch.dtype", wanted: _Wanted) -> dict[str, Any]:
    """What a device could do at most, tokens a second."""
    from transnormer.models import limits
    from transnormer.models.device_peaks import find_peak

    assert wanted.device is not None
    name, peak = find_peak(wanted.device)
    precision = wanted.dtype or str(stored).removeprefix("torch.")
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"the weights are {precision}; expected --dtype float32 or bfloat16")
    decode = limits.decode_bounds(cost, peak, precision, wanted.context)
    return {
        "device": name,
        "precision": precision,
        "most_decoded_tokens_per_second": {
            f"{rows}_rows": round(rate) for rows, rate in decode.items()
        },
        "most_prompt_tokens_per_second": round(
            limits.prefill_bound(cost, peak, precision, wanted.context)
        ),
        "most_training_tokens_per_second": round(
            limits.training_bound(cost, peak, precision, wanted.context)
        ),
    }
