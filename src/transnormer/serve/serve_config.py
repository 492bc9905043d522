"""Where the server listens, and what it refuses."""

from typing import Self

from pydantic import Field, model_validator

from transnormer.config import Config

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ServeConfig(Config):
    """Where the server listens, and what it refuses."""

    host: str = "127.0.0.1"
    """Address to listen at; the default is reached from this machine alone."""
    port: int = Field(default=8000, ge=0, lt=65536)
    """Port to listen at; 0 takes a free one."""
    api_key: str | None = Field(default=None, repr=False)
    """What a client has to send as a bearer token; None asks for nothing."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may read answers; none by default. "*" is all of them."""
    hosts: tuple[str, ...] = ()
    """Further names that a request's Host header may have where the server listens at a loopback
    address, for a proxy before it. Any other name is refused, so that no page of a foreign site can
    reach the server through a name of its own."""
    max_body_bytes: int = Field(default=4 << 20, ge=1)
    """Size of a request; a larger one is refused before it is read to its end."""
    body_seconds: float = Field(default=30.0, gt=0)
    """Time for a request to arrive, its head and its body each."""
    request_seconds: float = Field(default=600.0, gt=0)
    """Time for an answer, the wait for a slot included."""
    send_seconds: float = Field(default=30.0, gt=0)
    """Time for a reader to take a piece of a stream that does not fit into the socket's buffers."""
    stream_tokens: int = Field(default=16384, ge=1)
    """Tokens of a stream that wait for a slow reader; with more its request ends."""
    drain_seconds: float = Field(default=10.0, ge=0)
    """Time for running requests to end when the server is told to stop."""
    max_new_tokens: int = Field(default=16384, ge=1)
    """Largest number of tokens that a request may ask for."""
    max_choices: int = Field(default=128, ge=1)
    """Largest number of answers of one request: prompts times n."""
    max_state_bytes: int = Field(default=1 << 30, ge=0)
    """Room for the states of conversations; those used least recently leave. Also the size of a
    state that is sent."""
    max_connections: int = Field(default=1000, ge=1)
    """Connections at once; one more is told to come again. Each is an open file, of which a process
    has 1,024 on many systems."""

    @model_validator(mode="after")
    def _key(self) -> Self:
        key = self.api_key
        # Other characters, line ends among them, are in no header: nobody could send the key.
        if key is not None and not (key and key.isascii() and key.isprintable()):
            raise ValueError(
                "api_key is empty, not ASCII or several lines; expected one line of ASCII characters"
            )
        return self

    @property
    def local(self) -> bool:
        """Whether the server listens to this machine alone."""
        return self.host in LOOPBACK
