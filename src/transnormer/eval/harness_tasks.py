"""Local tasks for lm-evaluation-harness: what its task files of ``lm_eval_tasks`` call."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from transnormer.eval.scorer import count_words, nearness
from transnormer.eval.tasks import FILE_TASKS, Answer, Item, Page, find_data


def load(*, task: str, data: str | None = None, **metadata: Any) -> dict[str, datasets.Dataset]:
    """The questions of a task as the harness's splits: test, and dev where it has examples.

    Args:
        task: of ``FILE_TASKS``.
        data: the directory of the files.
        metadata: of the run, which the harness passes to every loader. A path under the task's own
            name is that of its file or directory; nothing else is read.
    """
    found = FILE_TASKS[task]
    places = {task: Path(metadata[task])} if task in metadata else None
    items = found.read(find_data(found, None if data is None else Path(data), places))
    splits = {"test": items.test, "dev": items.shots}
    return {
        name: datasets.Dataset.from_list([_document(task, item) for item in part])
        for name, part in splits.items()
        if part is not None
    }


def _document(task: str, item: Item) -> dict[str, Any]:
    fields = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in item._asdict().items()
    }
    return fields | {"description": FILE_TASKS[task].describe(getattr(item, "subject", ""))}


def page_results(document: dict[str, Any], results: Sequence[float]) -> dict[str, Any]:
    """Log-likelihood with the words and the bytes of the original."""
    page = Page(document["text"], document["original"])
    words, num_bytes = count_words(page), len(page.original.encode())
    return {
        "word_perplexity": (results[0], words),
        "byte_perplexity": (results[0], num_bytes),
        "bits_per_byte": (results[0], num_bytes),
    }


def answer_results(document: dict[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """F1 or ROUGE of a generated answer, or of the likelier of yes and no."""
    item = Answer(
        document["context"],
        tuple(document["references"]),
        document["metric"],
        tuple(document["choices"]),
        document["empty"],
    )
    text = results[0]
    if item.choices:
        logprobs = [score[0] for score in results]
        text = item.choices[logprobs.index(max(logprobs))]
    return {item.metric: nearness(item, text)}


class _NamedTask(ConfigurableTask):
    """A task whose file names its class, which the harness then hands over with the rest."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={name: x for name, x in config.items() if name != "class"})


class ExamTask(_NamedTask):
    """A task whose examples are of the question's own subject."""

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, **options: Any) -> Any:
        """As the harness's, after its sampler has been given the subject's examples."""
        subject = doc["subject"]
        self.sampler.replace_df([x for x in self.fewshot_docs() if x["subject"] == subject])
        return super().fewshot_context(doc, num_fewshot=num_fewshot, **options)


class QuestionTask(_NamedTask):
    """A task of generated answers, but for questions that are answered by choosing."""

    def construct_requests(self, doc: dict[str, Any], ctx: Any, **options: Any) -> Any:
        """As the harness's; a request for each choice where there are some."""
        if not doc["choices"]:
            return super().construct_requests(doc, ctx, **options)
        options.pop("apply_chat_template", None)
        options.pop("chat_template", None)
        return [
            Instance(
                request_type="loglikelihood",
                doc=doc,
                arguments=(ctx, f" {choice}"),
                idx=index,
                **options,
            )
            for index, choice in enumerate(doc["choices"])
        ]
