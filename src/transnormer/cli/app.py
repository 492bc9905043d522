"""The commands: each parses its arguments and calls one function of the package.

Exit codes: 0 success, 2 a mistake in arguments, configuration or input, 1 a failure of the run,
130 an interrupt. An error is one line on stderr. Nothing heavy is imported before a command runs.
"""

import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from transnormer.cli import (
    INTERRUPTED,
    audit,
    bench,
    chat,
    clean,
    common,
    convert,
    evaluate,
    finetune,
    generate,
    info,
    plan,
    serve,
    tokenize,
    train,
)

USAGE, FAILURE = 2, 1
# What the caller got wrong; every other exception is a failure of the run.
_MISTAKES = (
    ValueError,
    TypeError,
    NotImplementedError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
# Errors whose message stands alone; of any other one the type is named too.
_SPEAKING = (*_MISTAKES, RuntimeError, OSError)

_HELP = """Train, sample, score and convert TransNormerLLM models.

First steps, from the folder of the project:

  transnormer train recipes/quickstart.toml

  transnormer generate runs/quickstart --prompt "import "

  transnormer chat runs/quickstart

  transnormer eval runs/quickstart --text README.md

The first trains a small model on text that ships with Python and writes runs/quickstart. CKPT is
such a run, one of its steps, a saved model, or a released TransNormerLLM checkpoint.
"""

app = typer.Typer(
    name="transnormer",
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("finetune")(finetune.finetune)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("eval")(evaluate.evaluate)
app.command("convert")(convert.convert)
app.command("clean")(clean.clean)
app.add_typer(tokenize.app, name="tokenize")
app.command("info")(info.info)
app.command("plan")(plan.plan)
app.command("audit")(audit.audit)
app.add_typer(bench.app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        from transnormer import __version__

        typer.echo(f"transnormer {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Show the version.", metavar=""
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.", metavar="")
    ] = False,
) -> None:
    """Options before the command; ``run`` looks for --debug itself, before anything can fail."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; errors become one line on stderr."""
    debug = "--debug" in arguments[:1]
    _accept_any_text()
    try:
        code = app(args=list(arguments), prog_name="transnormer", standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        # The reader of the output is gone (`| head`).
        _give_up_stdout()
        return FAILURE
    except Exception as error:
        if isinstance(error, OSError) and not _stdout_works():
            _give_up_stdout()
        if debug:
            raise
        return _report(error)
    if code == INTERRUPTED:
        sys.stderr.write("interrupted\n")
    return code if isinstance(code, int) else 0


def _accept_any_text() -> None:
    """Read UTF-8 whatever the locale, and write escapes for what the output's encoding lacks."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are no UTF-8 come as surrogates, which every tokenizer refuses by name.
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _stdout_works() -> bool:
    """Whether what is left in the buffer of the output can be written."""
    try:
        sys.stdout.flush()
    except OSError:
        return False
    return True


def _give_up_stdout() -> None:
    """Let what is left in the buffer vanish: Python must not fail on it again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(error: Exception) -> int:
    # typer's usage errors come from its own copy of click, which has no public name.
    code = getattr(error, "exit_code", None)
    if code is not None:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        if not message:
            # No command was given, and the help is on the screen.
            return code
        hint = "; see transnormer --help"
    else:
        code = USAGE if isinstance(error, _MISTAKES) else FAILURE
        message, hint = common.explain(error), ""
        if not isinstance(error, _SPEAKING) or not message:
            message, hint = (
                f"{type(error).__name__}: {message}",
                "; transnormer --debug COMMAND shows where",
            )
    sys.stderr.write(f"error: {' '.join(message.split()).rstrip('.')}{hint}\n")
    return code
