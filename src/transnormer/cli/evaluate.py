"""`transnormer eval`: how well a model predicts a text, and how it does on tasks."""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from transnormer.cli import common
from transnormer.files import write_json

if TYPE_CHECKING:
    from transnormer.data.tokenizers import Tokenizer
    from transnormer.models.decoder import Decoder

Text = Annotated[
    str | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="A text; .jsonl has a document a line. Also .xz, .gz, .zst, a folder or a glob.",
        show_default=False,
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        metavar="NAMES",
        help="Names with commas between them: boolq,piqa,mqar; docs/evaluation.md lists them.",
        show_default=False,
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="DIR",
        help="Where the tasks' files lie; NAME=PATH is the file or folder of one; may be repeated.",
        show_default=False,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(help="Items of each task, at each length of a recall suite.", show_default=False),
]
NumFewshot = Annotated[
    int | None, typer.Option(help="Examples before each question.", show_default=False)
]
BatchSize = Annotated[int, typer.Option(help="States that a call works on.")]
Lengths = Annotated[
    str | None,
    typer.Option(
        "--lengths",
        metavar="TOKENS",
        help="Lengths of recall suites, with commas between them; default: 1024,4096,16384.",
        show_default=False,
    ),
]
Harness = Annotated[
    bool,
    typer.Option(
        "--harness",
        help="Run tasks of lm-evaluation-harness, and the local ones there, which begin with tnl_.",
        metavar="",
    ),
]
Seed = Annotated[
    int | None, typer.Option(help="Of the examples; default: 1234.", show_default=False)
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", metavar="FILE", help="Write the JSON object there too.", show_default=False
    ),
]


class _Settings(NamedTuple):
    """What the options of tasks ask for."""

    tasks: list[str]
    data: Path | None
    places: dict[str, Path]
    limit: int | None
    num_fewshot: int | None
    batch_size: int
    lengths: list[int] | None
    seed: int | None
    harness: bool


def evaluate(
    checkpoint: common.Checkpoint,
    text: Text = None,
    tasks: Tasks = None,
    data: Data = None,
    limit: Limit = None,
    num_fewshot: NumFewshot = None,
    batch_size: BatchSize = 8,
    lengths: Lengths = None,
    seed: Seed = None,
    harness: Harness = False,
    tokenizer: common.TokenizerOption = None,
    device: common.Device = "auto",
    dtype: common.Dtype = None,
    output: Output = None,
    as_json: common.Json = False,
) -> None:
    """Score a text (nats per token and bits per byte), or run tasks.

    With --text the model reads each document from its first byte to its last in one go, carrying
    its state: there is no window. A begin-of-text token precedes, so that every byte is scored; a
    byte order mark at the head of a file is no text.

    With --tasks it answers questions from local files or recall suites that are made here. A context
    is read once, and its state is forked for every choice. Nothing is downloaded without --harness.
    """
    if (text is None) == (tasks is None):
        given = "Missing option '--text' or '--tasks'" if text is None else "Both are given"
        raise typer.BadParameter(f"{given}; expected one of --text and --tasks")
    if output is not None and not output.parent.is_dir():
        raise FileNotFoundError(
            f"--output is {output}; expected a file in a directory that exists; make {output.parent}"
        )
    if output is not None and output.is_dir():
        raise ValueError(f"--output is {output}, a directory; expected a file; name one in it")
    if batch_size < 1:
        raise ValueError(f"--batch-size is {batch_size}; expected at least 1")
    if text is not None:
        options = {"data": data, "limit": limit, "num-fewshot": num_fewshot, "lengths": lengths}
        _check_alone({**options, "seed": seed, "harness": harness or None})
        _score_text(checkpoint, text, batch_size, tokenizer, device, dtype, output, as_json)
        return
    directory, places = _places(data or [])
    settings = _Settings(
        tasks=_names(tasks or ""),
        data=directory,
        places=places,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        lengths=_numbers(lengths),
        seed=seed,
        harness=harness,
    )
    _check(settings)
    model = common.open_model(checkpoint, device, dtype)
    words = common.open_tokenizer(checkpoint, tokenizer, model)
    run = _run_harness if harness else _run_tasks
    facts = {"checkpoint": checkpoint, **run(model, words, settings, as_json)}
    _finish(facts, output, as_json)


def _check_alone(options: dict[str, object]) -> None:
    """Raise ValueError for options of tasks beside a text."""
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)} stands beside --text; expected --tasks with it")


def _score_text(
    checkpoint: str,
    text: str,
    batch_size: int,
    tokenizer: str | None,
    device: str,
    dtype: str | None,
    output: Path | None,
    as_json: bool,
) -> None:
    from transnormer.data import read_documents
    from transnormer.eval.perplexity import NO_NUMBER, score_texts

    texts = [document.text for document in read_documents(text, name="--text")]
    model = common.open_model(checkpoint, device, dtype)
    words = common.open_tokenizer(checkpoint, tokenizer, model)
    with common.TokenProgress("scoring") as progress:
        score = score_texts(model, words, texts, rows=batch_size, progress=progress.advance)
    if math.isnan(score.nats_per_token):
        raise ValueError(NO_NUMBER)
    if not as_json:
        common.write_line(f"documents       {len(texts):,}")
        common.write_line(f"tokens          {score.tokens:,}")
        common.write_line(f"bytes           {score.bytes:,}")
        common.write_line(f"nats per token  {score.nats_per_token:.4f}")
        common.write_line(f"bits per byte   {score.bits_per_byte:.4f}")
    _finish(score._asdict(), output, as_json)


def _finish(facts: dict[str, Any], output: Path | None, as_json: bool) -> None:
    """Write the facts where they are wanted."""
    facts = _finite(facts)
    if output is not None:
        write_json(facts, output)
    if as_json:
        common.print_json(facts)


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON has not: an infinite perplexity, for one."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _names(tasks: str) -> list[str]:
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--tasks is {tasks!r}; expected names with commas between them")
    return list(dict.fromkeys(names))


def _numbers(lengths: str | None) -> list[int] | None:
    if lengths is None:
        return None
    try:
        return [int(number) for number in lengths.split(",")]
    except ValueError:
        raise ValueError(
            f"--lengths is {lengths!r}; expected numbers with commas between them, as 1024,4096"
        ) from None


def _places(data: list[str]) -> tuple[Path | None, dict[str, Path]]:
    """The directory of all tasks, and the paths of single ones."""
    from transnormer.eval.tasks import FILE_TASKS

    directory, places = None, {}
    for entry in data:
        name, equals, path = entry.partition("=")
        if equals and name in FILE_TASKS:
            places[name] = Path(path)
        elif directory is not None:
            raise ValueError(
                f"--data is {str(directory)!r} and {entry!r}; expected one directory, and NAME=PATH "
                f"for single tasks, a NAME of {', '.join(FILE_TASKS)}"
            )
        else:
            directory = Path(entry)
    return directory, places


def _check(settings: _Settings) -> None:
    """Raise ValueError or FileNotFoundError for what no task can use, before a model is loaded."""
    from transnormer.eval.recall import SUITES
    from transnormer.eval.tasks import FILE_TASKS, find_data

    if settings.limit is not None and settings.limit < 1:
        raise ValueError(f"--limit is {settings.limit}; expected at least 1")
    if settings.harness:
        if settings.lengths is not None:
            raise ValueError(
                "--lengths is given beside --harness; expected a recall suite without it"
            )
        return
    idle = [name for name in settings.places if name not in settings.tasks]
    if idle:
        raise ValueError(
            f"--data names {', '.join(idle)}; expected the tasks that are run: "
            f"{', '.join(settings.tasks)}"
        )
    unknown = [name for name in settings.tasks if name not in FILE_TASKS and name not in SUITES]
    if unknown:
        raise ValueError(
            f"--tasks names {', '.join(unknown)}; expected some of {', '.join(FILE_TASKS)}, "
            f"{', '.join(SUITES)}; --harness runs those of lm-evaluation-harness"
        )
    if settings.lengths is not None and not set(settings.tasks) & set(SUITES):
        raise ValueError(f"--lengths is given; expected a recall suite: {', '.join(SUITES)}")
    if settings.num_fewshot and set(settings.tasks) & set(SUITES):
        raise ValueError(
            f"--num-fewshot is {settings.num_fewshot}; expected none for recall suites; run them "
            "apart"
        )
    for name in settings.tasks:
        if name in FILE_TASKS:
            find_data(FILE_TASKS[name], settings.data, settings.places)


def _run_tasks(
    model: "Decoder", words: "Tokenizer", settings: _Settings, as_json: bool
) -> dict[str, Any]:
    from transnormer.eval import recall, report, scorer

    results: dict[str, scorer.TaskResult] = {}
    for name in settings.tasks:
        with common.TokenProgress(name, unit="requests") as progress:
            if name in recall.SUITES:
                results[name] = recall.evaluate_recall(
                    model,
                    words,
                    name,
                    lengths=settings.lengths or recall.LENGTHS,
                    samples=settings.limit or recall.SAMPLES,
                    seed=scorer.SHOT_SEED if settings.seed is None else settings.seed,
                    rows=settings.batch_size,
                    progress=progress.advance,
                )
            else:
                results[name] = scorer.evaluate_task(
                    model,
                    words,
                    name,
                    data=settings.data,
                    places=settings.places,
                    limit=settings.limit,
                    num_fewshot=settings.num_fewshot or 0,
                    rows=settings.batch_size,
                    seed=scorer.SHOT_SEED if settings.seed is None else settings.seed,
                    progress=progress.advance,
                )
        if not as_json:
            for row in report.rows_of({name: results[name]}):
                common.write_line("{:<24} {:>7}  {:<16} {}".format(*row))
    return {
        "model": report.subject_of(model, words),
        "versions": report.versions(),
        "settings": _plain(settings),
        "results": {name: result.as_json() for name, result in results.items()},
    }


def _run_harness(
    model: "Decoder", words: "Tokenizer", settings: _Settings, as_json: bool
) -> dict[str, Any]:
    if find_spec("lm_eval") is None:
        raise RuntimeError("--harness needs lm-eval; run: pip install 'transnormer[eval]'")
    from transnormer.eval import harness, report, scorer

    results = harness.run_harness(
        model,
        words,
        settings.tasks,
        data=settings.data,
        places=settings.places,
        limit=settings.limit,
        num_fewshot=settings.num_fewshot,
        rows=settings.batch_size,
        seed=scorer.SHOT_SEED if settings.seed is None else settings.seed,
    )
    if not as_json:
        for name, figures in results.items():
            for figure, value in figures.items():
                if isinstance(value, float):
                    common.write_line(f"{name:<24} {figure:<28} {value:.4f}")
    return {
        "model": report.subject_of(model, words),
        "versions": report.versions("lm_eval"),
        "settings": _plain(settings),
        "results": results,
    }


def _plain(settings: _Settings) -> dict[str, Any]:
    """The settings as JSON holds them; those that were left out are None."""
    return settings._asdict() | {
        "data": None if settings.data is None else str(settings.data),
        "places": {name: str(path) for name, path in settings.places.items()},
    }
