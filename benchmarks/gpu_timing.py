"""Timing on a GPU: medians with a flushed L2, graphs, host time, peak memory; dry on a CPU.

A dry run exercises every path of a benchmark where no GPU is. Its numbers mean nothing.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import harness
import torch
from torch import Tensor


class Timing(NamedTuple):
    """Milliseconds: the median, and where 20 and 80 percent of the calls lie."""

    ms: float
    p20: float
    p80: float


class Clock:
    """How things are measured on one device.

    Args:
        device: "cuda" or "cpu" (dry).
        repeat_ms: how long one median is measured.
    """

    def __init__(self, device: str, repeat_ms: float = 100.0) -> None:
        self.device = device
        self.dry = device == "cpu"
        self._repeat_ms = repeat_ms

    def wait(self) -> None:
        """Until the device has done everything."""
        if not self.dry:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give memory of finished rows back, so that the next one starts alike."""
        gc.collect()
        if not self.dry:
            torch.cuda.empty_cache()

    def time(self, call: Callable[[], object]) -> Timing:
        """Median of the device time of one call, the L2 flushed before each."""
        if self.dry:
            ms = harness.seconds(call, repeats=1, budget=1.0) * 1e3
            return Timing(ms, ms, ms)
        from triton.testing import do_bench

        found: Any = do_bench(call, warmup=25, rep=self._repeat_ms, quantiles=[0.5, 0.2, 0.8])
        return Timing(*found)

    def first(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """The result and the seconds of one call, compilation and tuning included."""
        self.wait()
        start = time.perf_counter()
        result = call()
        self.wait()
        return result, time.perf_counter() - start

    def host_us(self, call: Callable[[], object], calls: int = 200) -> float:
        """Host microseconds of one call while the device has next to nothing to do."""
        times = []
        for _ in range(5):
            self.wait()
            start = time.perf_counter()
            for _ in range(2 if self.dry else calls):
                call()
            times.append((time.perf_counter() - start) / (2 if self.dry else calls) * 1e6)
        self.wait()
        return statistics.median(times)

    def peak_extra_mib(self, call: Callable[[], object]) -> float | None:
        """MiB that the call allocates at its peak beyond what was there before."""
        if self.dry:
            call()
            return None
        self.free()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def graph(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call captured in a CUDA graph: what is returned replays it. On a CPU the call."""
        if self.dry:
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay


def gradients(o: Tensor, leaves: Sequence[Tensor], do: Tensor) -> tuple[Tensor, ...]:
    """The backward pass alone; the graph stays for the next call."""
    return torch.autograd.grad(o, leaves, do, retain_graph=True)


def copy_gb_per_s(clock: Clock) -> float:
    """Bandwidth of a device-to-device copy of 1 GiB, bytes read plus bytes written."""
    size = 1 << (12 if clock.dry else 30)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * size / clock.time(lambda: target.copy_(source)).ms / 1e6


def matmul_tflop_per_s(clock: Clock) -> float:
    """Rate of a bfloat16 matrix product of 8192 cubed."""
    size = 64 if clock.dry else 8192
    a, b = (torch.randn(size, size, device=clock.device).bfloat16() for _ in range(2))
    return 2 * size**3 / clock.time(lambda: a @ b).ms / 1e9
