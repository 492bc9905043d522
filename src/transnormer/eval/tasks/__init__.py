"""Tasks of evaluation: what is asked, and where the questions lie."""

from collections.abc import Mapping
from pathlib import Path

from transnormer.eval.tasks import commonsense, exams, language, scrolls
from transnormer.eval.tasks.items import Answer, Choices, Ending, Item, Items, Page, Schema, Task
from transnormer.eval.tasks.records import find_file

__all__ = [
    "FILE_TASKS",
    "Answer",
    "Choices",
    "Ending",
    "Item",
    "Items",
    "Page",
    "Schema",
    "Task",
    "find_data",
]

FILE_TASKS: dict[str, Task] = {
    task.name: task
    for group in (commonsense.TASKS, language.TASKS, exams.TASKS, scrolls.TASKS)
    for task in group
}


def find_data(task: Task, data: Path | None, places: Mapping[str, Path] | None = None) -> Path:
    """Where the questions of a task lie.

    Args:
        task: one of ``FILE_TASKS``.
        data: a directory that holds files under the task's names.
        places: files or directories of single tasks, by their names; they come first.

    Raises:
        FileNotFoundError: no such file.
    """
    place = (places or {}).get(task.name)
    if place is not None:
        if not place.exists():
            raise FileNotFoundError(
                f"the data of {task.name} is {place}, which does not exist; check the path"
            )
        return place
    names = " or ".join(task.files)
    if data is None:
        raise FileNotFoundError(
            f"{task.name} reads {names}; expected to know where; pass --data DIR, or "
            f"--data {task.name}=PATH"
        )
    found = find_file(data, task.files)
    if found is None:
        raise FileNotFoundError(
            f"{data} holds no {names}, plain or compressed; expected the questions of {task.name}; "
            f"put them there, or pass --data {task.name}=PATH"
        )
    return found
