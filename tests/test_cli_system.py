"""The command line against its surroundings: interrupts, full disks, encodings, odd files."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from decoder_cases import make_model, tnl_config
from train_cases import files_limited_to

from transnormer.cli.app import run
from transnormer.cli.common import resolve_device
from transnormer.data import ByteTokenizer
from transnormer.models import checkpoint


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model for bytes, and one whose vocabulary is padded."""
    folder = tmp_path_factory.mktemp("workshop")
    for name, vocab_size in (("model", 259), ("padded", 800)):
        checkpoint.save(make_model(tnl_config(vocab_size=vocab_size)), folder / name)
        ByteTokenizer().save(folder / name)
    return folder


@pytest.fixture
def inside(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workshop as the current folder."""
    monkeypatch.chdir(workshop)
    return workshop


def say(data: bytes, monkeypatch: pytest.MonkeyPatch, encoding: str = "utf-8") -> None:
    """Put bytes on standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding=encoding))


def only_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error."""
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    return error


# Interrupts the process while a module is imported, by an import that swallows exceptions or not.
INTERRUPT = """
import atexit, signal, sys
when, swallow, *sys.argv[1:] = sys.argv[1:]

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == when:
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                if swallow != "swallow":
                    raise

if when == "exit":
    atexit.register(signal.raise_signal, signal.SIGINT)
if when == "ignored":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    when = "typer"
sys.meta_path.insert(0, Finder())
from transnormer.cli import main
main()
"""


def interrupted(when: str, swallow: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process that interrupts itself."""
    command = [sys.executable, "-c", INTERRUPT, when, swallow, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(("when", "swallow"), [("typer", "no"), ("torch", "swallow")])
def test_an_interrupt_of_an_import_is_130(when: str, swallow: str) -> None:
    done = interrupted(when, swallow, "info", "tnl-385m")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("when", ["exit", "ignored"])
def test_an_interrupt_that_comes_too_late_or_is_ignored_shows_nothing(when: str) -> None:
    done = interrupted(when, "no", "--version")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_names_the_file_and_the_remedy(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for layout in ("released", "transnormer"):
        with files_limited_to(2048):
            assert run(["convert", "model", "out", "--to", layout]) == 1
        error = only_error(capsys)
        assert "model.safetensors" in error
        assert "too large" in error
        assert "expected room on the disk; free some" in error
        assert not list(inside.glob("*out*"))


def test_a_full_disk_does_not_end_a_chat(
    inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    say(b"hello\n/save talk\nmore\n/save talk\n", monkeypatch)
    with files_limited_to(2048):
        assert run(["chat", "model", "-n", "3"]) == 0
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all("talk: File too large; expected room on the disk" in line for line in errors)
    assert not (inside / "talk").exists()


@pytest.mark.parametrize("command", [["generate", "model", "-p", "a"], ["info", "model", "--json"]])
def test_an_output_that_is_full_is_named(
    inside: Path,
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Path("/dev/full").open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert run(command) == 1
    assert only_error(capsys).startswith(
        "error: standard output: No space left on device; expected"
    )


def test_a_chat_ends_when_its_output_is_full(
    inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    say(b"/help\nhello\n", monkeypatch)
    with Path("/dev/full").open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert run(["chat", "model", "-n", "3"]) == 1
    assert only_error(capsys).startswith(
        "error: standard output: No space left on device; expected"
    )


def test_every_refusal_of_the_system_says_what_was_expected(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (inside / "file").write_text("text")
    assert run(["convert", "model", "file/below", "--to", "released"]) == 2
    assert "file: File exists; expected a directory there; choose" in only_error(capsys)
    assert run(["convert", "model", "/proc/out", "--to", "released"]) == 2
    assert "; expected a path that can be used so; choose another" in only_error(capsys)


def test_any_encoding_of_the_terminal_will_do(
    inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def output(*arguments: str) -> str:
        written = io.BytesIO()
        say("né 🙂\n".encode(), monkeypatch, "ascii")
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
        assert run([*arguments, "model", "-n", "40", "--seed", "1"]) == 0
        return written.getvalue().decode("ascii")

    assert "\\ufffd" in output("generate")
    assert "\\ufffd" in output("chat")
    assert json.loads(output("generate", "--json"))["prompt"] == "né 🙂\n"


def test_what_is_no_text_does_not_end_a_chat(
    inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say(b"caf\xe9\nhello\n/save state\n", monkeypatch)
    assert run(["chat", "model", "-n", "3"]) == 0
    captured = capsys.readouterr()
    assert "lone surrogate U+DCE9" in captured.err
    assert "10 tokens are in state" in captured.out


def test_a_prompt_keeps_its_line_ends_and_loses_its_byte_order_mark(
    inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = "\ufeffone\r\ntwo\r".encode()
    (inside / "prompt.txt").write_bytes(data)
    for options in (["--prompt-file", "prompt.txt"], []):
        say(data, monkeypatch)
        assert run(["generate", "model", "-n", "1", "--json", *options]) == 0
        assert json.loads(capsys.readouterr().out)["prompt"] == "one\r\ntwo\r"


def test_a_padded_vocabulary_speaks(
    inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "padded", "-p", "a", "-n", "40", "--json"]) == 0
    assert max(json.loads(capsys.readouterr().out)["token_ids"]) < ByteTokenizer().vocab_size
    say(b"one\ntwo\n", monkeypatch)
    assert run(["chat", "padded", "-n", "40"]) == 0
    assert capsys.readouterr().err == ""


def test_a_file_of_any_name_is_scored(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (inside / "LICENSE").write_bytes("\ufeffdo as you like".encode())
    assert run(["eval", "model", "--text", "LICENSE", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == 14
    (inside / "empty").write_text("")
    for name in ("empty", "absent"):
        assert run(["eval", "model", "--text", name]) == 2
        assert only_error(capsys).startswith(f"error: --text is '{name}'")
        assert run(["tokenize", "train", name, "out"]) == 2
        assert only_error(capsys).startswith(f"error: TEXT is '{name}'")


def test_no_command_is_answered_with_the_help_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["tokenize"]):
        assert run(arguments) == 2
        captured = capsys.readouterr()
        assert "Usage: " in captured.out
        assert captured.err == ""


def test_the_help_says_what_cannot_be_seen(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*arguments: str) -> str:
        assert run([*arguments, "--help"]) == 0
        return " ".join(capsys.readouterr().out.replace("│", " ").split())

    assert "exit code 130, SIGTERM with 143" in shown("train")
    assert "but not base" in shown("train")
    assert "standard input, which is read until its end" in shown("generate")
    assert "byte order mark" in shown("eval")
    for command in ([], ["train"], ["generate"], ["eval"], ["convert"], ["info"]):
        # That of --help is typer's own.
        assert shown(*command).count("<bool>") <= 1


def test_a_gpu_beyond_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(RuntimeError, match=r"device is 'cuda:2'; expected at most cuda:1"):
        resolve_device("cuda:2")


def test_without_standard_input_a_text_begins_anew(
    inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert run(["generate", "model", "-n", "2"]) == 0
