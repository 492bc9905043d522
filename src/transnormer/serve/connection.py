"""Connections that end where no request comes."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

# What a connection is told to remember while a request is answered.
_BUSY = object()


def closes_idle(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, but a client who sends no whole head of a request loses the connection.

    uvicorn waits for ever for the first request, and for the rest of a head that has begun, so that
    a few silent clients could hold all the connections that the server has. Bodies have a time of
    their own, see ``Guard``.

    Args:
        seconds: after so many without a request a connection ends, after twice as many at most.
    """

    class Connection(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._clock = self.loop.call_later(seconds, self._look, None)

        def connection_lost(self, exc: Exception | None) -> None:
            self._clock.cancel()
            super().connection_lost(exc)

        def _look(self, before: object) -> None:
            """Close where nothing has come since the last look, which found ``before``."""
            waits = self.cycle is None or self.cycle.response_complete
            if waits and self.cycle is before:
                self.transport.close()
                return
            found = self.cycle if waits else _BUSY
            self._clock = self.loop.call_later(seconds, self._look, found)

    return Connection
