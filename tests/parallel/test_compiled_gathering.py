"""Compiled blocks whose parameters are gathered in bfloat16, but for norms and angles."""

import pytest
from gathered_cases import gathered_in_bfloat16
from ranks import Ranks
from tolerances import COMPILED_GRADIENT, assert_close

from transnormer.models import zoo
from transnormer.parallel.mesh import Axes

SIZES = {"vocab_size": 23, "model_dim": 16, "num_layers": 2, "heads": 4, "glu_dim": 12}


@pytest.mark.slow
def test_parts_that_are_gathered_on_their_own_part_the_graphs(ranks: Ranks) -> None:
    for config, products in ((zoo.tnl_custom(**SIZES), 5), (zoo.llama_custom(**SIZES), 7)):
        plain = ranks.run(4, gathered_in_bfloat16, config, Axes(dp_shard=4), None)
        compiled = ranks.run(4, gathered_in_bfloat16, config, Axes(dp_shard=4), False)
        for (exact, none), (found, seen) in zip(plain, compiled, strict=True):
            # Of one block at least.
            assert seen >= products > none
            for name, expected in exact.items():
                assert_close(found[name], expected.double(), limit=COMPILED_GRADIENT, name=name)
