"""`transnormer convert`: write a model in another layout."""

from pathlib import Path
from typing import Annotated

import typer

from transnormer.cli import common


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Run, step, model or hub id.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Directory to write.")],
    to: Annotated[str, typer.Option("--to", help="released, hf, onnx or transnormer.")],
    dtype: common.Dtype = None,
    as_json: common.Json = False,
) -> None:
    """Write a model in the released TransNormerLLM layout, for transformers, as ONNX, or in our own.

    hf is this package's layout with a file of code, so that transformers loads it without this package
    (trust_remote_code=True). A directory in Hugging Face's LLaMA layout is read like any other.
    onnx is one decoding step in float32, token and state in, logits and state out, for models whose
    states have a constant size. The tokenizer beside the weights goes along, and a card (README.md)
    says what the model is and, where SRC is a run, what it read, how, and how well it does. What a
    layout cannot express is refused by name.
    """
    if to == "gguf":
        raise NotImplementedError(
            "--to is 'gguf'; expected released, hf, onnx or transnormer: llama.cpp has no model of "
            "this kind that could read the file; take --to onnx"
        )
    if to not in ("released", "hf", "onnx", "transnormer"):
        raise ValueError(f"--to is {to!r}; expected released, hf, onnx or transnormer")
    if to == "onnx" and dtype not in (None, "float32"):
        raise ValueError(f"--dtype is {dtype!r}; expected float32, the one of an ONNX step")
    from transnormer.data.tokenizers import load_tokenizer
    from transnormer.export.model_card import card_for, write_card
    from transnormer.models import checkpoint

    model = checkpoint.load(source, dtype=common.resolve_dtype(dtype))
    tokenizer_file = checkpoint.find_tokenizer(source)
    tokenizer = None if tokenizer_file is None else load_tokenizer(tokenizer_file)
    card = card_for(target, model, source, to)
    if to == "hf":
        try:
            from transnormer.hf.export import export
        except ModuleNotFoundError as error:
            raise RuntimeError(
                "--to hf needs transformers; run: pip install 'transnormer[hf]'"
            ) from error
        export(model, target, tokenizer=tokenizer)
    elif to == "onnx":
        from transnormer.export.onnx_step import write_onnx

        write_onnx(model, target, tokenizer=tokenizer)
    else:
        checkpoint.save(model, target, layout="released" if to == "released" else "transnormer")
        if tokenizer is not None:
            tokenizer.save(target)
    write_card(target, card)
    if as_json:
        common.print_json(
            {
                "target": str(target),
                "layout": to,
                "parameters": model.num_parameters(),
                "tokenizer": tokenizer is not None,
            }
        )
        return
    common.write_line(f"{model.num_parameters():,} parameters are in {target} ({to} layout)")
    if tokenizer is None:
        common.write_line(f"{source} holds no tokenizer: none was written")
