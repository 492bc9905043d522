"""Facts about the processes of a run; the only room that may use collectives."""

from transnormer.parallel.world import World, current_world

__all__ = ["World", "current_world"]
