"""`transnormer serve`: a model behind OpenAI's interface, and a page to talk to it."""

import math
from pathlib import Path
from typing import Annotated

import typer

from transnormer.cli import common

_Host = Annotated[str, typer.Option(help="Address; the default is this machine alone.")]
_Port = Annotated[int, typer.Option(help="Port; 0 takes a free one.")]
_Name = Annotated[
    str | None,
    typer.Option(help="What clients call the model; default: its folder.", show_default=False),
]
_Key = Annotated[
    Path | None, typer.Option(help="Ask for the key that this file holds.", show_default=False)
]
_Slots = Annotated[int, typer.Option(help="Requests that run at once.")]
_Queue = Annotated[int, typer.Option(help="Requests that wait; one more gets 429.")]
_Tokens = Annotated[int, typer.Option(help="Most that a request may ask for.")]
_Body = Annotated[float, typer.Option(help="Size of a request.")]
_Seconds = Annotated[float, typer.Option(help="Time for an answer, its wait included.")]
_Prefix = Annotated[
    int, typer.Option(help="Memory for states after common beginnings of prompts; 0: none.")
]
_States = Annotated[int, typer.Option(help="Memory for states of conversations; 0 keeps none.")]
_Invariant = Annotated[
    bool, typer.Option("--batch-invariant", help="The same bits whatever else runs.", metavar="")
]
_Compiled = Annotated[
    bool, typer.Option("--compile", help="Compile the model's blocks for decoding.", metavar="")
]
_Template = Annotated[
    Path | None, typer.Option(help="A jinja2 file; default: the tokenizer's.", show_default=False)
]
_Origins = Annotated[
    list[str] | None,
    typer.Option(help="Pages of this origin may ask; may be repeated.", show_default=False),
]
_Hosts = Annotated[
    list[str] | None,
    typer.Option(help="A further Host header, for a proxy; may be repeated.", show_default=False),
]


def _bytes(max_body_mb: float) -> int:
    if not math.isfinite(max_body_mb):
        raise ValueError(f"max_body_mb is {max_body_mb}; expected a finite number above 0")
    return round(max_body_mb * 2**20)


def serve(
    checkpoint: common.Checkpoint,
    host: _Host = "127.0.0.1",
    port: _Port = 8000,
    name: _Name = None,
    api_key_file: _Key = None,
    slots: _Slots = 16,
    queue: _Queue = 1024,
    max_new_tokens: _Tokens = 16384,
    max_body_mb: _Body = 4.0,
    request_seconds: _Seconds = 600.0,
    prefix_mb: _Prefix = 512,
    states_mb: _States = 1024,
    batch_invariant: _Invariant = False,
    compiled: _Compiled = False,
    chat_template: _Template = None,
    cors_origin: _Origins = None,
    allow_host: _Hosts = None,
    tokenizer: common.TokenizerOption = None,
    device: common.Device = "auto",
    dtype: common.Dtype = None,
) -> None:
    """Serve a model to programs and to the browser.

    Open the address that it prints for the page. Programs find /v1/chat/completions,
    /v1/completions, /v1/models, /health, /metrics and a description at /openapi.json. Ctrl-C ends
    it once running answers are out, or after ten seconds.
    """
    values = {
        "host": host,
        "port": port,
        "api_key": None if api_key_file is None else common.read_text(api_key_file).strip(),
        "cors_origins": tuple(cors_origin or ()),
        "hosts": tuple(allow_host or ()),
        "max_body_bytes": _bytes(max_body_mb),
        "request_seconds": request_seconds,
        "max_new_tokens": max_new_tokens,
        "max_state_bytes": states_mb * 2**20,
    }
    sizes = {"slots": slots, "queue": queue, "prefill_tokens": max(2048, slots)}
    sizes |= {"batch_invariant": batch_invariant, "compile": compiled}
    try:
        from transnormer.serve import server
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"serving needs {error.name}; run: pip install 'transnormer[serve]'"
        ) from error
    from transnormer.config import validate
    from transnormer.infer.engine_config import EngineConfig
    from transnormer.serve.serve_config import ServeConfig

    config = validate(ServeConfig, values, source="options of serve")
    engine_config = validate(EngineConfig, sizes, source="options of serve")
    model = common.open_model(checkpoint, device, dtype)
    words = common.open_tokenizer(checkpoint, tokenizer, model)
    app = server.build(
        model,
        words,
        name=name or Path(checkpoint).resolve().name,
        template=server.find_template(chat_template, words),
        engine_config=engine_config,
        config=config,
        prefix_bytes=prefix_mb * 2**20,
    )
    server.run(app, config, lambda url: common.write_line(f"serving {checkpoint} at {url}"))
