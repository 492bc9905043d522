"""A model behind a socket: the engine, the service and the application put together, and run."""

import asyncio
import math
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from transnormer.data.chat_template import ChatTemplate, template_for
from transnormer.data.tokenizers import Tokenizer
from transnormer.infer.engine import Engine
from transnormer.infer.engine_config import EngineConfig
from transnormer.infer.prefix_cache import PrefixCache
from transnormer.infer.sampling import SamplingConfig
from transnormer.infer.text import begin_id
from transnormer.models.decoder import Decoder
from transnormer.serve.app import create_app
from transnormer.serve.connection import closes_idle
from transnormer.serve.metrics import Metrics
from transnormer.serve.serve_config import ServeConfig
from transnormer.serve.service import Service
from transnormer.serve.worker import Worker

# Tokens from one snapshot of a prompt's state to the next.
_BLOCK_TOKENS = 512


def find_template(given: Path | None, tokenizer: Tokenizer) -> tuple[ChatTemplate, str]:
    """The chat template of a model, and where it comes from: "file", "tokenizer" or "plain".

    Args:
        given: a file that counts before all others.
        tokenizer: of the model, with the template that lay beside it.

    Raises:
        FileNotFoundError: the given file does not exist.
        ValueError: a template that jinja2 cannot read.
    """
    if given is not None:
        if not given.is_file():
            raise FileNotFoundError(f"chat template {given} is no file; expected jinja2 text")
        return ChatTemplate(given.read_text(encoding="utf-8"), tokenizer, name=str(given)), "file"
    source = "plain" if tokenizer.chat_template is None else "tokenizer"
    return template_for(tokenizer, "plain"), source


def build(
    model: Decoder,
    tokenizer: Tokenizer,
    *,
    name: str,
    template: tuple[ChatTemplate, str],
    engine_config: EngineConfig,
    config: ServeConfig,
    prefix_bytes: int = 0,
) -> FastAPI:
    """The application that serves a model.

    Args:
        model: a causal decoder.
        tokenizer: its tokenizer.
        name: what clients call it.
        template: as ``find_template`` gives it.
        engine_config: sizes of the engine.
        config: of the server.
        prefix_bytes: room for states after common beginnings of prompts; 0 keeps none.

    Raises:
        ValueError: a model that generates nothing, damaged weights among the reasons.
    """
    cache = PrefixCache(prefix_bytes, block_tokens=_BLOCK_TOKENS) if prefix_bytes else None
    engine = Engine(model, engine_config, prefix_cache=cache, draw_below=tokenizer.vocab_size)
    _warm_up(engine, begin_id(model, tokenizer))
    metrics = Metrics()
    metrics.watch(engine)
    service = Service(
        model,
        tokenizer,
        name=name,
        template=template,
        config=config,
        worker=Worker(engine),
        metrics=metrics,
    )
    return create_app(service)


def _warm_up(engine: Engine, first: int) -> None:
    """Generate a little, so that whatever is wrong with the model shows before a client comes.

    On a GPU at every batch size: a graph is captured for each, and while that goes on no other
    thread may use the device.
    """
    counts = [1]
    if engine.pool.device.type == "cuda":
        slots = engine.config.slots
        counts = [1 << i for i in range((slots - 1).bit_length())] + [slots]
    for count in counts:
        greedy = SamplingConfig(temperature=0.0)
        requests = [
            engine.submit([first], max_new_tokens=2, sampling=greedy, stop=[]) for _ in range(count)
        ]
        for request in requests:
            request.result()


class _Server(uvicorn.Server):
    """Says where it listens once it does, and tells the service when it is to stop."""

    def __init__(
        self, config: uvicorn.Config, service: Service, announce: Callable[[str], None]
    ) -> None:
        super().__init__(config)
        self._service, self._announce = service, announce
        self._loop: asyncio.AbstractEventLoop | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._service.stop)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            host = self.config.host
            port = self.servers[0].sockets[0].getsockname()[1]
            self._announce(f"http://{f'[{host}]' if ':' in host else host}:{port}")


def run(app: FastAPI, config: ServeConfig, announce: Callable[[str], None]) -> None:
    """Serve until a signal ends it; requests that run then have ``drain_seconds`` to end.

    Args:
        app: of ``build``.
        config: of the server.
        announce: told the address once the server listens.

    Raises:
        OSError: the address cannot be used.
        ValueError: the host has no address.
    """
    with _listening(config) as listener:
        server = _Server(
            uvicorn.Config(
                app,
                host=config.host,
                log_level="warning",
                http=closes_idle(config.body_seconds),
                access_log=False,
                ws="none",
                lifespan="on",
                server_header=False,
                limit_concurrency=config.max_connections,
                timeout_graceful_shutdown=math.ceil(config.drain_seconds) + 2,
            ),
            app.state.service,
            announce,
        )
        server.run(sockets=[listener])


def _listening(config: ServeConfig) -> socket.socket:
    """A socket at the address; bound here, where a failure is an error and not a line of a log."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
    except (socket.gaierror, UnicodeError) as error:
        listener.close()
        raise ValueError(
            f"host is {config.host!r}; expected a name or an address of this machine ({error})"
        ) from error
    except OSError as error:
        listener.close()
        error.filename = f"{config.host}:{config.port}"
        raise
    return listener
