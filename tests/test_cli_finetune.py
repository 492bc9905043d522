"""`transnormer finetune` and a chat with what came of it."""

import json
from pathlib import Path

import pytest
import torch

from transnormer import Decoder, save
from transnormer.cli.app import run
from transnormer.data import ByteTokenizer
from transnormer.models import zoo

RECIPE = """
[model]
init_from = "base"
[data]
path = "lines.jsonl"
seq = 64
heldout = 0.5
[train]
steps = 2
tokens_per_step = 64
precision = "float32"
device = "cpu"
[output]
dir = "run"
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small model, two lines and a recipe, in which the commands run."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"model_dim": 32, "num_layers": 1, "heads": 2, "glu_dim": 32}
    special = {"bos_token_id": 257, "eos_token_id": 258}
    save(Decoder(zoo.tnl_custom(vocab_size=259, **sizes).model_copy(update=special)), "base")
    ByteTokenizer().save(Path("base"))
    lines = ({"instruction": thing, "output": "yes"} for thing in ("sky", "sea"))
    Path("lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("ft.toml").write_text(RECIPE)
    return tmp_path


def test_finetune_scores_before_and_after_and_prints_json_last(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["finetune", "ft.toml", "--set", "train.steps=3", "--json"]) == 0
    printed = capsys.readouterr().out.splitlines()
    facts = json.loads(printed[-1])
    assert facts["heldout_before"]["step"] == 0
    assert facts["heldout_after"]["loss"] < facts["heldout_before"]["loss"]
    assert printed[-2] == "talk to it: transnormer chat run"
    assert printed[-4].startswith("held-out answer loss: ")
    assert (Path("run") / "checkpoints" / "step_00000003" / "chat_template.jinja").is_file()
    assert run(["finetune", "ft.toml", "--set", "train.steps=4", "--resume"]) == 0
    assert "continuing from" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["absent.toml"], 2, "absent.toml is not a file"),
        (["ft.toml", "--set", "objective.kind=causal"], 2, "expected 'instruction' for finetune"),
        (["ft.toml", "--set", "model.init_from=nowhere"], 2, "nowhere is not a directory"),
        (["ft.toml", "--set", "data.path=nowhere"], 2, "data.path is 'nowhere'"),
        (["ft.toml", "--set", "lora.rang=2"], 2, "lora.rang is an unknown key; expected one of al"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_run(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["finetune", *arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("run").exists()


def said(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    """What a chat with the model answers and ends with."""
    code = run(["chat", "base", "-n", "4", "--seed", "1", *options])
    return code, "".join(capsys.readouterr())


def test_chat_reads_lines_by_the_template_beside_the_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transnormer.cli.chat import Conversation
    from transnormer.models.state import DecoderState

    lines: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": lines.pop(0))
    read: list[int] = []

    def positions(*options: str) -> list[int]:
        lines[:] = ["sky", "sea", "/quit"]
        read.clear()
        assert said(capsys, *options)[0] == 0
        return list(read)

    answer = Conversation.answer

    def watched(self: Conversation, line: str) -> None:
        answer(self, line)
        state = self._state
        assert isinstance(state, DecoderState)
        read.append(int(state.positions[0]))

    monkeypatch.setattr(Conversation, "answer", watched)
    plain = positions()
    assert plain == [1 + 4 + 4, 1 + 4 + 4 + 4 + 4]
    assert said(capsys, "--system", "s") == (
        2,
        "error: --system is 's'; expected none: the model has no chat template; leave it out\n",
    )
    # Four tokens are no whole answer, so the next line begins with the end of its turn.
    source = "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    Path("base/chat_template.jinja").write_text(source)
    assert positions() == [1 + 3 + 1 + 4, 1 + 3 + 1 + 4 + 1 + 3 + 1 + 4]
    assert positions("--system", "abc")[0] == 1 + 3 + 1 + 3 + 1 + 4
    assert positions("--template", "{text}\n") == plain


def test_the_end_of_an_answer_is_read_once() -> None:
    from transnormer.cli.chat import Turns
    from transnormer.data.chat_template import ChatTemplate

    source = "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    turns = Turns(ChatTemplate(source, ByteTokenizer()), 258, None)
    assert turns.first("sky") == [257, *b"sky", 258]
    assert turns.later("sea", ended=True) == [*b"sea", 258]
    assert turns.later("sea", ended=False) == [258, *b"sea", 258]
