"""What stands before every route: who may ask, how much may be sent, and in what time."""

import asyncio
import secrets
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from transnormer.serve.errors import ApiError
from transnormer.serve.metrics import Metrics
from transnormer.serve.serve_config import LOOPBACK, ServeConfig

_OPEN = ("/", "/health")
# A body that is too large is read so far and thrown away: its sender then sees the answer instead
# of a connection that breaks while he writes.
_THROWN_AWAY = 64 << 20


class HeadAsGet:
    """Answers HEAD as GET, without the body: FastAPI's routes know the methods they name alone.

    Args:
        app: what comes after.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def bare(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self._app({**scope, "method": "GET"}, receive, bare)


class Guard:
    """Asks for the key and the host, and reads the body within its bounds of size and time.

    Args:
        app: what comes after.
        config: the bounds.
        metrics: where requests are counted.
        limit: bytes that the body of a path may have.
    """

    def __init__(
        self, app: ASGIApp, config: ServeConfig, metrics: Metrics, limit: Callable[[str], int]
    ) -> None:
        self._app, self._config, self._metrics, self._limit = app, config, metrics, limit
        self._key = None if config.api_key is None else f"Bearer {config.api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                receive = await self._checked(scope, receive)
            except ApiError as error:
                response = error.response()
                # What is left of the body is not read.
                response.headers["Connection"] = "close"
                await response(scope, receive, counted)
                return
            await self._app(scope, receive, counted)
        finally:
            # Paths that are no route would make as many labels as somebody likes.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status or "none")).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - began)

    async def _checked(self, scope: Scope, receive: Receive) -> Receive:
        """A ``receive`` that gives the body, which has arrived by then, and what follows it."""
        headers = Headers(scope=scope)
        self._check_host(headers.get("host", ""))
        if scope["path"] not in _OPEN:
            self._check_key(headers.get("authorization", ""))
        body: bytes | None = await self._body(receive, self._limit(scope["path"]))

        async def replayed() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            data, body = body, None
            return {"type": "http.request", "body": data, "more_body": False}

        return replayed

    async def _body(self, receive: Receive, limit: int) -> bytes:
        parts, size, more = [], 0, True
        try:
            async with asyncio.timeout(self._config.body_seconds):
                while more and size <= limit + _THROWN_AWAY:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the request ended before its body")
                    part = message.get("body", b"")
                    size, more = size + len(part), message.get("more_body", False)
                    if size <= limit:
                        parts.append(part)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive in {self._config.body_seconds:g} seconds"
            ) from None
        if size > limit:
            raise ApiError(
                413,
                f"the body has more than {limit} bytes; expected at most so many; send less",
                code="body_too_large",
            )
        return b"".join(parts)

    def _check_host(self, host: str) -> None:
        if not self._config.local:
            return
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        names = (*LOOPBACK, *self._config.hosts)
        # Names of hosts have no case.
        if name.lower() not in map(str.lower, names):
            raise ApiError(
                403,
                f"the Host header is {host[:80]!r}; expected the name of this machine; start the "
                "server with --allow-host for another",
                code="wrong_host",
            )

    def _check_key(self, given: str) -> None:
        if self._key is None:
            return
        if not secrets.compare_digest(given.encode("utf-8", "replace"), self._key):
            raise ApiError(
                401,
                "the API key is missing or wrong; expected the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
