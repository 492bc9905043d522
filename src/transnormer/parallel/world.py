"""Facts about this process among its peers; the only reader of the launcher's variables."""

import os
from typing import NamedTuple


class World(NamedTuple):
    """Where this process stands: rank of world_size, local_rank on its host.

    ``attempt`` counts how often the launcher has started all processes again.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    attempt: int = 0


def current_world() -> World:
    """Return what torchrun says about this process; one process alone where it says nothing.

    Raises RuntimeError where only some of RANK, WORLD_SIZE and LOCAL_RANK are set, or where they
    are not numbers of a process in a world.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if not found:
        return World()
    values = [found.get(name, "").strip() for name in names]
    if not all(value.isdigit() for value in values) or int(values[0]) >= int(values[1]):
        shown = ", ".join(f"{name}={found.get(name)}" for name in names)
        raise RuntimeError(
            f"the launcher set {shown}; expected three numbers with RANK < WORLD_SIZE; "
            "start with torchrun, or unset them"
        )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return World(*(int(value) for value in values), attempt=int(attempt))
