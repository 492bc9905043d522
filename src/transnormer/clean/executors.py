"""datatrove's executors: this machine, Slurm, Ray."""

import contextlib
import io
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger
from multiprocess import context

from transnormer.clean.config import ExecutorConfig


class LocalExecutor(LocalPipelineExecutor):
    """Runs the tasks in processes of this machine; logs go to files and not to the terminal."""

    def run(self) -> None:
        """Run what is not done yet; raises what a task raises."""
        logger.remove()
        if self.workers == 1:
            self._run_here()
            return
        # One server imports the package; the processes of all stages are copies of it.
        context.ForkServerContext().set_forkserver_preload(["transnormer.clean.pipeline"])
        with _quiet():
            super().run()

    def _run_here(self) -> None:
        """One task after the other in this process, without the processes that share counters."""
        steps = self.pipeline
        for rank in self.get_incomplete_ranks():
            # A task fills its steps with counts of its own.
            self.pipeline = deepcopy(steps)
            self._run_for_rank(rank)
        self.pipeline = steps

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        # A logger of the task adds a handler for whatever the standard error is at that moment.
        with _quiet():
            return super()._run_for_rank(rank, local_rank, node_rank)


class _Silence(io.TextIOBase):
    """A stream that is never closed: datatrove's logger keeps it after the block."""

    def write(self, text: str) -> int:
        return len(text)


def _quiet() -> contextlib.redirect_stderr[_Silence]:
    return contextlib.redirect_stderr(_Silence())


def make_executor(
    config: ExecutorConfig,
    pipeline: list[PipelineStep | Callable[..., Any]],
    *,
    tasks: int,
    name: str,
    logs: Path,
    after: Any = None,
) -> PipelineExecutor:
    """The executor of one stage.

    Args:
        config: which one.
        pipeline: its steps.
        tasks: how many times they run, each with its own number.
        name: of the stage.
        logs: directory for logs and for the marks of tasks that are done.
        after: the executor of the stage before, which must have finished.

    Raises RuntimeError where Ray is asked for and not installed.
    """
    if config.kind == "local":
        return LocalExecutor(
            pipeline, tasks=tasks, workers=min(config.workers, tasks), logging_dir=str(logs)
        )
    if config.kind == "slurm":
        from datatrove.executor.slurm import SlurmPipelineExecutor

        return SlurmPipelineExecutor(
            pipeline,
            tasks=tasks,
            time=config.time,
            partition=config.partition,
            workers=config.workers,
            job_name=f"transnormer-clean-{name}",
            env_command=config.env_command,
            logging_dir=str(logs),
            slurm_logs_folder=str(logs / "slurm"),
            depends=after,
        )
    try:
        from datatrove.executor.ray import RayPipelineExecutor
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"executor.kind is 'ray', which needs {error.name}; install it"
        ) from error
    return RayPipelineExecutor(
        pipeline, tasks=tasks, workers=config.workers, logging_dir=str(logs), depends=after
    )
