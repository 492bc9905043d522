"""`transnormer generate`: continue a prompt and stream the text."""

import secrets
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from transnormer.cli import common


def generate(
    checkpoint: common.Checkpoint,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The text to continue.", show_default=False)
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Continue the text of a file.", show_default=False)
    ] = None,
    max_new_tokens: common.MaxNewTokens = 256,
    temperature: common.Temperature = 0.8,
    top_k: common.TopK = None,
    top_p: common.TopP = None,
    seed: common.Seed = None,
    stop: common.Stop = None,
    tokenizer: common.TokenizerOption = None,
    device: common.Device = "auto",
    dtype: common.Dtype = None,
    as_json: common.Json = False,
) -> None:
    """Continue a prompt and stream the text.

    The prompt comes from --prompt, --prompt-file or, where neither is given, from standard input,
    which is read until its end; on a terminal, or from nothing, the model begins a text of its
    own. A byte order mark is no text. Only the continuation is printed; on a terminal the prompt
    stands before it.
    """
    text = _prompt(prompt, prompt_file)
    import torch

    from transnormer.infer.generate import generate as continue_prompts
    from transnormer.infer.text import TextStream, begin_id

    model = common.open_model(checkpoint, device, dtype)
    words = common.open_tokenizer(checkpoint, tokenizer, model)
    ids = [begin_id(model, words), *words.encode(text)]
    seed = secrets.randbelow(2**32) if seed is None else seed
    began = time.perf_counter()
    generation = continue_prompts(
        model,
        torch.tensor([ids]),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    prefilled = time.perf_counter()
    stream = TextStream(generation, words, stop=stop or (), from_start=not text)
    if sys.stdout.isatty() and not as_json:
        typer.secho(text, dim=True, nl=False)
    continuation = common.stream_out(stream, silent=as_json)
    if not as_json:
        common.write_piece("\n")
        return
    seconds = prefilled - began, time.perf_counter() - prefilled
    counted = len(ids), generation.token_ids[0]
    common.print_json(_facts(text, continuation, stream.finish_reason, counted, seed, seconds))


def _facts(
    prompt: str,
    text: str,
    finish_reason: str | None,
    ids: tuple[int, list[int]],
    seed: int,
    seconds: tuple[float, float],
) -> dict[str, Any]:
    """What --json prints, from the prompt's number of ids, the drawn ids, and both times."""
    prompt_tokens, token_ids = ids
    return {
        "prompt": prompt,
        "text": text,
        "finish_reason": finish_reason,
        "prompt_tokens": prompt_tokens,
        "tokens": len(token_ids),
        "token_ids": token_ids,
        "seed": seed,
        "prefill_seconds": seconds[0],
        "tokens_per_second": len(token_ids) / max(seconds[1], 1e-9),
    }


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None and prompt_file is not None:
        raise ValueError("--prompt and --prompt-file are both given; expected one of them")
    if prompt is not None:
        return prompt
    if prompt_file is not None:
        return common.read_text(prompt_file)
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    return common.decode(sys.stdin.buffer.read(), "standard input")
