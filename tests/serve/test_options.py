"""Options that cannot be are refused before anything is served."""

import math

import pytest

from transnormer.cli.serve import serve
from transnormer.serve import server
from transnormer.serve.serve_config import ServeConfig


@pytest.mark.parametrize("size", [math.nan, math.inf])
def test_a_size_that_is_no_number_is_named(size: float) -> None:
    with pytest.raises(ValueError, match=f"max_body_mb is {size}; expected a finite number"):
        serve("no such model", max_body_mb=size)


@pytest.mark.parametrize("host", ["a..b", "300.1.1.1"])
def test_a_host_without_an_address_is_named(host: str) -> None:
    with pytest.raises(ValueError, match=f"host is '{host}'; expected a name or an address"):
        server._listening(ServeConfig(host=host))
