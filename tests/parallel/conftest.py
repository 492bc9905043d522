"""The processes that the tests of parallel/ talk to, started by the first test that needs them."""

from collections.abc import Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """A pool of four processes."""
    pool = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def many_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """A pool of eight, for slow tests."""
    pool = Ranks(8, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()
