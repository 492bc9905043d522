"""The application: routes, and the life of the engine's thread around them."""

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Path, Query, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, Response
from starlette.concurrency import run_in_threadpool

from transnormer import __version__
from transnormer.serve.errors import ApiError, ErrorBody, Reply, add_handlers
from transnormer.serve.forms import ChatForm, CompletionForm
from transnormer.serve.guard import Guard, HeadAsGet
from transnormer.serve.metrics import CONTENT_TYPE
from transnormer.serve.replies import ChatCompletion, Completion, ModelCard, ModelList
from transnormer.serve.respond import respond
from transnormer.serve.schema import ChatRequest, CompletionRequest
from transnormer.serve.service import Service
from transnormer.serve.states import StateDeleted, StateInfo

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is wrong."},
    "5XX": {"model": ErrorBody, "description": "The server could not answer."},
}
_STREAM = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_STATE_FILE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": _BINARY}}
}
_UPLOAD = {"requestBody": {"required": True, "content": {"application/octet-stream": _BINARY}}}
Id = Annotated[str, Path(max_length=200)]


class Health(Reply):
    """Whether the server works, and how busy it is."""

    status: Literal["ok", "stopping", "broken"]
    model: str
    running: int
    waiting: int


class Ended(Reply):
    """The answer to the end of a request."""

    id: str
    ended: bool


def create_app(service: Service) -> FastAPI:
    """The application around a service.

    Args:
        service: what answers.
    """

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start(asyncio.get_running_loop())
        yield
        service.stop()
        await run_in_threadpool(service.worker.stop, service.config.drain_seconds)

    app = FastAPI(
        title="transnormer",
        version=__version__,
        description="OpenAI's interface around a language model with a state of constant size.",
        lifespan=life,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    add_handlers(app)
    _add_answers(app, service)
    _add_models(app, service)
    _add_states(app, service)
    _add_rest(app, service)
    cost, body = service.cost, service.config.max_body_bytes
    state_bytes = service.config.max_state_bytes
    if not cost.state_bytes_per_token:
        # Twice: names and hashes, and whatever dtype the state has.
        state_bytes = min(state_bytes, 2 * cost.constant_state_bytes)

    def limit(path: str) -> int:
        return state_bytes + body if path == "/v1/states" else body

    app.add_middleware(Guard, config=service.config, metrics=service.metrics, limit=limit)
    app.add_middleware(HeadAsGet)
    if service.config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.config.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/completions",
        responses={200: {"model": Completion, **_STREAM}, **_ERRORS},
        summary="Continue a text",
    )
    async def completions(request: Request, body: CompletionRequest) -> Response:
        asked = service.completions(body)
        return await respond(request, service, body, asked, CompletionForm(service, body))

    @app.post(
        "/v1/chat/completions",
        responses={200: {"model": ChatCompletion, **_STREAM}, **_ERRORS},
        summary="Answer in a conversation",
    )
    async def chat(request: Request, body: ChatRequest) -> Response:
        asked = service.chat(body)
        return await respond(request, service, body, asked, ChatForm(service, body))

    @app.post("/v1/requests/{name}/end", responses=_ERRORS, summary="End a stream where it is")
    async def end(name: Id) -> Ended:
        if not service.end(name):
            raise ApiError(404, f"no request {name[:80]!r} is running", code="request_not_found")
        return Ended(id=name, ended=True)


def _add_models(app: FastAPI, service: Service) -> None:
    cost = service.cost
    card = ModelCard(
        id=service.name,
        object="model",
        created=service.created,
        owned_by="transnormer",
        parameters=service.model.num_parameters(),
        state_bytes=cost.constant_state_bytes,
        state_bytes_per_token=cost.state_bytes_per_token,
        chat_template=service.template_from,
    )

    @app.get("/v1/models", responses=_ERRORS, summary="The model that is served")
    async def models() -> ModelList:
        return ModelList(object="list", data=[card])

    @app.get("/v1/models/{name:path}", responses=_ERRORS, summary="One model")
    async def model(name: Id) -> ModelCard:
        service.check_model(name)
        return card


def _add_states(app: FastAPI, service: Service) -> None:
    @app.post("/v1/states", responses=_ERRORS, openapi_extra=_UPLOAD, summary="Load a state")
    async def load(
        request: Request, last_token: Annotated[int | None, Query(ge=0, lt=2**31)] = None
    ) -> StateInfo:
        if request.headers.get("content-type", "").partition(";")[0] != "application/octet-stream":
            raise ApiError(415, "the content type is wrong; expected application/octet-stream")
        data = await request.body()
        return service.states.put(await run_in_threadpool(service.files.read, data, last_token))

    @app.get("/v1/states/{name}", responses=_ERRORS, summary="What a state is")
    async def info(name: Id) -> StateInfo:
        return service.states.info(name)

    @app.get("/v1/states/{name}/file", responses=_STATE_FILE | _ERRORS, summary="Save a state")
    async def save(name: Id) -> Response:
        data = await run_in_threadpool(service.files.write, service.states.get(name))
        return Response(data, media_type="application/octet-stream")

    @app.delete("/v1/states/{name}", responses=_ERRORS, summary="Forget a state")
    async def delete(name: Id) -> StateDeleted:
        return service.states.delete(name)


def _add_rest(app: FastAPI, service: Service) -> None:
    page = files("transnormer.serve").joinpath("page.html").read_text(encoding="utf-8")
    headers = _page_headers(page)

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    @app.get("/health", responses=_ERRORS, summary="Whether the server works")
    async def health(response: Response) -> Health:
        status: Literal["ok", "stopping", "broken"] = "ok"
        if not service.worker.alive:
            status = "broken"
        if service.stopping:
            status = "stopping"
        response.status_code = 200 if status == "ok" else 503
        engine = service.worker.engine
        return Health(
            status=status, model=service.name, running=engine.running, waiting=engine.waiting
        )

    @app.get(
        "/metrics",
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **_ERRORS},
        response_class=Response,
        summary="Figures for Prometheus",
    )
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)


def _page_headers(page: str) -> dict[str, str]:
    """The page runs its own script and reaches its own server, and nothing else."""
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    hashes = [base64.b64encode(hashlib.sha256(x.encode()).digest()).decode() for x in scripts]
    allowed = " ".join(f"'sha256-{found}'" for found in hashes)
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
