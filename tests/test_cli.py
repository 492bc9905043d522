"""The command line: what each command prints, and every mistake is one line with its exit code."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from decoder_cases import make_model, tnl_config
from train_cases import run_file, some_text

from transnormer import files
from transnormer.cli.app import run
from transnormer.data import ByteTokenizer, train_bpe
from transnormer.models import checkpoint, zoo
from transnormer.models.convert import llama
from transnormer.models.decoder import Decoder


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, a run's TOML, the run itself, and things that are wrong."""
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "corpus.txt").write_text(some_text())
    (folder / "run.toml").write_text(run_file(output="run"))
    (folder / "broken.toml").write_text("[model\n")
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("abc")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert run(["train", "run.toml"]) == 0
    finally:
        os.chdir(before)
    train_bpe([some_text()], 300).save(folder / "bpe")
    shutil.copytree(folder / "run", folder / "tampered")
    weights = checkpoint.find_model(folder / "tampered") / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    bare = folder / "bare"
    checkpoint.save(make_model(tnl_config(vocab_size=259)), bare)
    checkpoint.save(make_model(tnl_config(vocab_size=61)), folder / "small")
    ByteTokenizer().save(folder / "small")
    checkpoint.save(make_model(tnl_config(dropout=0.1)), folder / "dropping")
    return folder


@pytest.fixture
def inside(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workshop as the current folder."""
    monkeypatch.chdir(workshop)
    return workshop


def say(text: str | bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put text on standard input."""
    data = text.encode() if isinstance(text, str) else text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def last_json(capsys: pytest.CaptureFixture[str]) -> dict:
    """The JSON object on the last line."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_train_says_where_it_is_and_ends_with_json(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "run.toml", "--set", "output.dir=again", "--json"]
    assert run([*arguments, "--sample-tokens", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("step 1/4  loss ") for line in lines)
    assert any(line.startswith("step 4/4  loss ") for line in lines)
    facts = json.loads(lines[-1])
    assert facts["step"] == 4
    assert facts["stopped_by"] == "steps"
    assert facts["heldout_before"]["step"] == 0
    assert facts["heldout_after"]["step"] == 4
    assert isinstance(facts["sample"], str)
    before, after = (facts[key]["bits_per_byte"] for key in ("heldout_before", "heldout_after"))
    assert f"held-out bits per byte: {before:.3f} before (step 0), {after:.3f} after" in "\n".join(
        lines
    )
    assert run([*arguments, "--resume"]) == 0
    assert last_json(capsys)["step"] == 4


def test_a_run_out_of_time_says_what_continues_it(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "run.toml", "--set", "output.dir=short"]
    assert run([*arguments, "--set", "train.max_minutes=1e-9"]) == 0
    said = capsys.readouterr().out
    assert (
        "stopped by max_minutes; the same command --resume with a larger train.max_minutes" in said
    )
    assert run([*arguments, "--resume", "--set", "train.max_minutes=5"]) == 0
    assert "stopped by" not in capsys.readouterr().out


def test_generate_prints_the_continuation(
    inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["generate", "run", "-n", "12", "--seed", "1"]
    assert run([*common, "--prompt", "the quick"]) == 0
    text = capsys.readouterr().out
    (inside / "prompt.txt").write_text("the quick")
    assert run([*common, "--prompt-file", "prompt.txt"]) == 0
    assert capsys.readouterr().out == text
    say("the quick", monkeypatch)
    assert run([*common, "--json"]) == 0
    facts = last_json(capsys)
    assert facts["text"] + "\n" == text
    assert facts["prompt"] == "the quick"
    assert facts["prompt_tokens"] == 10
    assert facts["tokens"] == len(facts["token_ids"]) == 12
    assert facts["finish_reason"] == "length"


def test_generate_without_a_prompt_begins_a_text(
    inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    say("", monkeypatch)
    assert run(["generate", "run", "-n", "3", "--json"]) == 0
    assert last_json(capsys)["prompt_tokens"] == 1


def test_generate_ends_before_a_stop_text(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["generate", "run", "--prompt", "the", "-n", "40", "--seed", "1", "--json"]
    assert run(common) == 0
    whole = last_json(capsys)["text"]
    stop = whole[5:7]
    assert run([*common, "--stop", "no such text", "--stop", stop]) == 0
    facts = last_json(capsys)
    assert facts["text"] == whole[: whole.index(stop)]
    assert facts["finish_reason"] == "stop"


def test_eval_scores_every_byte(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "run", "--text", "corpus.txt", "--json"]) == 0
    facts = last_json(capsys)
    assert set(facts) == {"tokens", "bytes", "nats_per_token", "bits_per_byte"}
    assert facts["tokens"] == facts["bytes"] == (inside / "corpus.txt").stat().st_size
    assert run(["eval", "run", "--text", "corpus.txt"]) == 0
    assert f"bits per byte   {facts['bits_per_byte']:.4f}" in capsys.readouterr().out


def test_convert_there_and_back_is_exact(
    inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, back = tmp_path / "released", tmp_path / "back"
    assert run(["convert", "run", str(there), "--to", "released"]) == 0
    assert json.loads((there / "config.json").read_text())["model_type"] == "transnormer"
    assert run(["convert", str(there), str(back), "--to", "transnormer", "--json"]) == 0
    assert last_json(capsys)["tokenizer"] is True
    original = checkpoint.load(inside / "run")
    assert checkpoint.load(back).fingerprint() == original.fingerprint()
    assert run(["generate", str(back), "--prompt", "the", "-n", "2"]) == 0


def test_info_names_model_and_tokenizer(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", "run", "--json"]) == 0
    facts = last_json(capsys)
    model = checkpoint.load(inside / "run")
    assert facts["parameters"] == model.num_parameters()
    assert facts["fingerprint"] == model.fingerprint()
    assert facts["config"] == model.config.model_dump(mode="json")
    assert facts["tokenizer_fingerprint"] == ByteTokenizer().fingerprint
    assert run(["info", "run"]) == 0
    assert f"{model.num_parameters():,}" in capsys.readouterr().out


def test_info_lists_and_shows_published_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info"]) == 0
    assert "tnl-385m" in capsys.readouterr().out.splitlines()
    assert run(["info", "tnl-385m", "--json"]) == 0
    facts = last_json(capsys)
    assert facts["parameters"] == 398_984_192
    # 24 layers of 8 heads of 128 x 128 in float32; the first layer's keys are doubled.
    assert (facts["state_bytes"], facts["state_bytes_per_token"]) == (25 * 8 * 128 * 128 * 4, 0)


def test_info_bounds_the_speed_on_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["info", "tnl-385m", "--device", "h100", "--dtype", "bfloat16"]
    assert run([*command, "--json"]) == 0
    facts = last_json(capsys)
    assert facts["device"] == "NVIDIA H100 80GB HBM3"
    assert set(facts["most_decoded_tokens_per_second"]) == {"1_rows", "32_rows", "256_rows"}
    assert facts["training_bytes"] == {"float32": 16 * 398_984_192, "bfloat16": 8 * 398_984_192}
    # 12 d + 28 d + 6 f bytes a block.
    assert facts["activation_bytes_per_token"] == 24 * (40 * 1024 + 6 * 2816)
    assert run(command) == 0
    rate = facts["most_decoded_tokens_per_second"]["1_rows"]
    line = f"most decoded tokens per second, 1_rows       {rate:,}"
    assert line in capsys.readouterr().out.splitlines()
    assert run(["info", "llama-7b", "--json"]) == 0
    # No formula counts these blocks.
    assert "activation_bytes_per_token" not in last_json(capsys)


def test_info_tells_states_that_grow(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", "hybrid-410m", "--json"]) == 0
    facts = last_json(capsys)
    assert facts["token_mixers"] == "lightning, softmax"
    assert facts["state_bytes"] == 21 * 8 * 128 * 128 * 4
    # Keys, values and whether the slot counts, in each of the three softmax layers.
    assert facts["state_bytes_per_token"] == 3 * (2 * 1024 * 4 + 1)


def test_convert_reads_a_llama_of_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Decoder(
        zoo.llama_custom(vocab_size=300, model_dim=16, num_layers=1, heads=2, glu_dim=8)
    )
    llama.save(model, tmp_path / "llama")
    ByteTokenizer().save(tmp_path / "llama")
    plain = tmp_path / "plain"
    assert run(["convert", str(tmp_path / "llama"), str(plain), "--to", "transnormer"]) == 0
    assert checkpoint.load(plain).fingerprint() == model.fingerprint()
    assert run(["generate", str(plain), "--prompt", "the", "-n", "2"]) == 0
    capsys.readouterr()
    assert run(["convert", str(plain), str(tmp_path / "x"), "--to", "released"]) == 2
    assert "kind is 'softmax'" in capsys.readouterr().err


def test_tokenize_makes_what_train_reads(
    inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bpe, shards = str(tmp_path / "bpe"), str(tmp_path / "shards")
    assert run(["tokenize", "train", "corpus.txt", bpe, "--vocab-size", "300", "--json"]) == 0
    assert last_json(capsys)["vocab_size"] == 300
    assert run(["tokenize", "encode", "corpus.txt", shards, "--tokenizer", bpe, "--json"]) == 0
    made = last_json(capsys)
    parts = made["train"]["num_bytes"] + made["heldout"]["num_bytes"]
    assert parts == (inside / "corpus.txt").stat().st_size
    sets = [f"data.path={shards}", f"data.tokenizer={bpe}", f"output.dir={tmp_path / 'run'}"]
    options = [part for text in [*sets, "data.heldout=0"] for part in ("--set", text)]
    assert run(["train", "run.toml", *options]) == 0
    assert run(["generate", str(tmp_path / "run"), "--prompt", "the", "-n", "3"]) == 0


def chat(lines: list[str], monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """Say lines to a chat."""
    say("".join(line + "\n" for line in lines), monkeypatch)
    assert run(["chat", "run", "-n", "8", "--seed", "3", *options]) == 0


def test_chat_remembers_resets_saves_and_loads(
    inside: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    state = str(tmp_path / "talk.state")
    greedy = ["-t", "0"]
    chat(["hello", f"/save {state}", "more", "/quit"], monkeypatch, *greedy)
    whole = capsys.readouterr().out
    # 1 begin-of-text token, 6 bytes of "hello" and its line end, 8 tokens of the answer.
    assert "15 tokens are in" in whole
    chat([f"/load {state}", "more"], monkeypatch, *greedy)
    resumed = capsys.readouterr().out
    assert resumed.startswith("going on after 15 tokens\n")
    assert whole.endswith(resumed.removeprefix("going on after 15 tokens\n"))
    chat(["other", "/reset", "hello", f"/save {state}"], monkeypatch, *greedy)
    reset = capsys.readouterr().out
    assert whole[: whole.index("15 tokens")] in reset
    assert "15 tokens are in" in reset


def test_a_model_that_cannot_chat_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tnl_config().model_copy(update={"causal": False})
    checkpoint.save(Decoder(config), tmp_path / "both")
    say("hello\n", monkeypatch)
    check_mistake(["chat", str(tmp_path / "both")], 2, "causal = false; expected true", capsys)


def test_a_mistake_in_chat_does_not_end_it(
    inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat(["/dance", "/save", "/save x", "/load absent", "hi", "/quit"], monkeypatch)
    captured = capsys.readouterr()
    assert captured.out.count("\n") >= 1
    for text in ("/dance is no command", "/save has no file", "no conversation yet", "absent"):
        assert text in captured.err


SET = ["train", "run.toml", "--set", "output.dir=new", "--set"]
GENERATE = ["generate", "run", "--prompt", "the", "-n", "2"]
MISTAKES: dict[str, tuple[list[str], int, str]] = {
    "no such command": (["trian"], 2, "No such command 'trian'"),
    "no such option": (["train", "run.toml", "--stepz", "1"], 2, "No such option: --stepz"),
    "no argument": (["generate"], 2, "Missing argument 'CKPT'"),
    "option of another type": ([*GENERATE, "--seed", "x"], 2, "Invalid value for '--seed'"),
    "no such file": (["train", "absent.toml"], 2, "absent.toml is not a file"),
    "a line end in a name": (["train", "ab\nsent.toml"], 2, "ab sent.toml is not a file"),
    "no TOML": (["train", "broken.toml"], 2, "broken.toml is not TOML"),
    "unknown key": ([*SET, "train.stepz=1"], 2, "train.stepz is an unknown key"),
    "wrong type": ([*SET, "train.steps=many"], 2, "train.steps is 'many'; expected an integer"),
    "no override": ([*SET, "train.steps"], 2, "override is 'train.steps'; expected key.subkey"),
    "unknown size": ([*SET, "model.name=tnl-1z"], 2, "model"),
    "sequence of length 0": ([*SET, "data.seq=0"], 2, "data.seq is 0"),
    "unknown optimizer": ([*SET, "optimizer.name=sgdd"], 2, "optimizer.name is 'sgdd'"),
    "several devices": ([*SET, "parallel.tp=2"], 2, "tp 2, 2 ranks; expected as many as the 1 "),
    "missing corpus": ([*SET, "data.path=absent.txt"], 2, "absent.txt"),
    "empty corpus": ([*SET, "data.path=empty.txt"], 2, "empty.txt"),
    "short corpus": ([*SET, "data.path=short.txt"], 2, "data.seq"),
    "corpus not UTF-8": ([*SET, "data.path=latin.txt"], 2, "latin.txt"),
    "missing tokenizer": ([*SET, "data.tokenizer=absent"], 2, "tokenizer is 'absent'"),
    "run exists": (["train", "run.toml"], 2, "which holds a run"),
    "run differs": (
        ["train", "run.toml", "--resume", "--set", "train.seed=9"],
        2,
        "train.seed is 9; expected 0",
    ),
    "diverges": ([*SET, "optimizer.lr=1e30"], 1, "the last good checkpoint is"),
    "missing model": (["generate", "absent/model/x", "-p", "a"], 2, "is not a directory"),
    "tampered model": (["generate", "tampered", "-p", "a"], 2, "model.safetensors has SHA-256"),
    "damaged checkpoint": (
        ["train", "run.toml", "--resume", "--set", "output.dir=damaged"],
        2,
        "damaged",
    ),
    "no tokenizer": (["generate", "bare", "-p", "a"], 2, "bare holds no tokenizer"),
    "other tokenizer": (["generate", "run", "-p", "a", "--tokenizer", "bpe"], 2, "tokenizer bpe"),
    "small vocabulary": (["generate", "small", "-p", "a"], 2, "expected at most 61"),
    "two prompts": ([*GENERATE, "--prompt-file", "corpus.txt"], 2, "--prompt-file are both given"),
    "missing prompt": (["generate", "run", "--prompt-file", "absent"], 2, "absent is not a file"),
    "prompt not UTF-8": (
        ["generate", "run", "--prompt-file", "latin.txt"],
        2,
        "not UTF-8 at byte 3",
    ),
    "temperature": ([*GENERATE, "-t", "-1"], 2, "temperature is -1.0"),
    "top-k": ([*GENERATE, "--top-k", "0"], 2, "top_k is 0"),
    "top-p": ([*GENERATE, "--top-p", "1.5"], 2, "top_p is 1.5"),
    "seed": ([*GENERATE, "--seed", "-1"], 2, "seed is -1"),
    "empty stop": ([*GENERATE, "--stop", ""], 2, "stop holds an empty string"),
    "max-new-tokens": (["generate", "run", "-p", "a", "-n", "-3"], 2, "max_new_tokens is -3"),
    "dtype": ([*GENERATE, "--dtype", "int8"], 2, "dtype is 'int8'; expected one of float64"),
    "device": ([*GENERATE, "--device", "abacus"], 2, "device is 'abacus'"),
    "device of another make": ([*GENERATE, "--device", "mps"], 2, "expected auto, cpu, cuda or"),
    "template": (["chat", "run", "--template", "x"], 2, "template is 'x'"),
    "eval of nothing": (["eval", "run", "--text", "absent.txt"], 2, "absent.txt"),
    "eval of an empty text": (["eval", "run", "--text", "empty.txt"], 2, "empty.txt"),
    "eval without a text": (["eval", "run"], 2, "Missing option '--text'"),
    "convert to another": (["convert", "run", "out", "--to", "coreml"], 2, "--to is 'coreml'"),
    "convert to what nothing reads": (
        ["convert", "run", "out", "--to", "gguf"],
        2,
        "llama.cpp has no model",
    ),
    "convert to another onnx": (
        ["convert", "run", "out", "--to", "onnx", "--dtype", "bfloat16"],
        2,
        "--dtype is 'bfloat16'; expected float32",
    ),
    "convert onto a run": (["convert", "run", "run", "--to", "released"], 2, "run holds"),
    "convert what cannot be": (
        ["convert", "dropping", "out", "--to", "released"],
        2,
        "config.dropout is 0.1",
    ),
    "tokenize into a folder": (["tokenize", "encode", "corpus.txt", "run"], 2, "run exists"),
    "tokenize nothing": (["tokenize", "train", "empty.txt", "out"], 2, "empty.txt"),
    "info on no device": (["info", "tnl-385m", "--device", "tpu"], 2, "device is 'tpu'; expected"),
    "info in half a dtype": (["info", "tnl-385m", "--dtype", "int8"], 2, "--dtype is 'int8'"),
    "info of nothing": (["info", "absent/model/x"], 2, "is not a directory"),
}
if not torch.cuda.is_available():
    MISTAKES["no GPU"] = ([*GENERATE, "--device", "cuda"], 1, "device is 'cuda'; expected a GPU")


def check_mistake(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run a command line that must fail with one clear line."""
    assert run(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    assert message in error


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_is_one_line(
    inside: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "damaged checkpoint":
        shutil.copytree("tampered", "damaged", dirs_exist_ok=True)
        (checkpoint.find_model("damaged").parent / "step_00000002" / "COMPLETE").unlink()
        config = Path("damaged/config.json")
        config.write_text(config.read_text().replace('"dir": "run"', '"dir": "damaged"'))
    check_mistake(*MISTAKES[name], capsys)
    assert not Path("out").exists()
    shutil.rmtree("new", ignore_errors=True)


def test_a_full_disk_is_a_failure_of_the_run(
    inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_json", refuse)
    arguments = ["convert", "run", "out", "--to", "transnormer"]
    check_mistake(arguments, 1, "No space left on device", capsys)
    assert not list(inside.glob("*out*"))
    assert not list(inside.glob(".out*"))


def test_what_nobody_foresaw_is_one_line_and_a_traceback_on_demand(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down() -> list[str]:
        raise KeyError("x")

    monkeypatch.setattr("transnormer.models.zoo.names", break_down)
    check_mistake(["info"], 1, "KeyError: 'x'; transnormer --debug COMMAND shows where", capsys)
    with pytest.raises(KeyError):
        run(["--debug", "info"])


def test_an_interrupt_is_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr("transnormer.models.zoo.names", interrupt)
    assert run(["info"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    commands = ["train", "generate", "chat", "eval", "convert", "tokenize", "info"]
    assert all(f"│ {name} " in text for name in commands)
    for name in commands:
        assert run([name, "--help"]) == 0
    assert run(["--version"]) == 0


def child(*arguments: str, **options: object) -> subprocess.Popen[str]:
    """A command in a process of its own, with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "transnormer", *arguments]
    return subprocess.Popen(command, env=environment, **pipes, **options)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from transnormer.cli.app import run; run(['train', '--help']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'tokenizers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_ctrl_c_ends_training_with_a_checkpoint(workshop: Path, tmp_path: Path) -> None:
    sets = ["--set", "train.steps=1000000", "--set", f"output.dir={tmp_path / 'run'}"]
    process = child("train", "run.toml", *sets, cwd=workshop)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            process.send_signal(signal.SIGINT)
            break
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "stopped by SIGINT; the same command --resume continues the run" in out
    assert checkpoint.newest_complete_step(tmp_path / "run") is not None
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_closed_pipe_ends_quietly(workshop: Path) -> None:
    process = child("generate", "run", "--prompt", "the", "-n", "1000000", cwd=workshop)
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
