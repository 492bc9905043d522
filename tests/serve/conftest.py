"""A real server in a process of its own, and real clients for it."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from decoder_cases import make_model, tnl_config
from openai import OpenAI
from serve_cases import Server, Start, start_server

from transnormer.data import ByteTokenizer
from transnormer.models import checkpoint

# An answer's turn ends with another token than a text.
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}"
    "{{ '<pad>' if m.role == 'assistant' else '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model for bytes."""
    folder = tmp_path_factory.mktemp("served") / "toy"
    checkpoint.save(make_model(tnl_config(vocab_size=259)), folder)
    ByteTokenizer().save(folder)
    return folder


@pytest.fixture(scope="session")
def server(toy: Path) -> Iterator[Server]:
    """A server whose outputs do not depend on what else runs."""
    (toy.parent / "chat.jinja").write_text(TEMPLATE, encoding="utf-8")
    served = start_server(
        toy,
        "--batch-invariant",
        "--slots=4",
        "--max-new-tokens=2000",
        "--max-body-mb=1",
        f"--chat-template={toy.parent / 'chat.jinja'}",
    )
    yield served
    served.stop()


@pytest.fixture(scope="session")
def plain(server: Server) -> Iterator[httpx.Client]:
    """A client without opinions."""
    with server.client() as client:
        yield client


@pytest.fixture(scope="session")
def judge(server: Server) -> OpenAI:
    """OpenAI's own client."""
    return server.openai()


@pytest.fixture
def start(toy: Path) -> Iterator[Start]:
    """Starts servers of the toy model that live as long as a test."""
    started: list[Server] = []

    def begin(*options: str) -> Server:
        started.append(start_server(toy, *options))
        return started[-1]

    yield begin
    for served in started:
        served.stop()
