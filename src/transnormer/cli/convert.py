"""`transnormer convert`: write a model in another layout."""

from pathlib import Path
from typing import Annotated

import typer

from transnormer.cli import common


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Run, step, model or hub id.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Directory to write.")],
    to: Annotated[str, typer.Option("--to", help="released, hf or transnormer.")],
    dtype: common.Dtype = None,
    as_json: common.Json = False,
) -> None:
    """Write a model in the released TransNormerLLM layout, for transformers, or in this package's own.

    hf is this package's layout with a file of code, so that transformers loads it without this package
    (trust_remote_code=True). A directory in Hugging Face's LLaMA layout is read like any other.
    The tokenizer beside the weights goes along. What the released layout cannot express is refused
    by name.
    """
    if to not in ("released", "hf", "transnormer"):
        raise ValueError(f"--to is {to!r}; expected released, hf or transnormer")
    from transnormer.data.tokenizers import load_tokenizer
    from transnormer.models import checkpoint

    model = checkpoint.load(source, dtype=common.resolve_dtype(dtype))
    tokenizer_file = checkpoint.find_tokenizer(source)
    tokenizer = None if tokenizer_file is None else load_tokenizer(tokenizer_file)
    if to == "hf":
        try:
            from transnormer.hf.export import export
        except ModuleNotFoundError as error:
            raise RuntimeError(
                "--to hf needs transformers; run: pip install 'transnormer[hf]'"
            ) from error
        export(model, target, tokenizer=tokenizer)
    else:
        checkpoint.save(model, target, layout="released" if to == "released" else "transnormer")
        if tokenizer is not None:
            tokenizer.save(target)
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
