"""`transnormer chat`: a prompt loop whose memory is the model's state."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transnormer.cli import common

if TYPE_CHECKING:
    from transnormer.data.chat_template import ChatTemplate
    from transnormer.data.tokenizers import Tokenizer
    from transnormer.models.decoder import Decoder
    from transnormer.models.state import DecoderState

_COMMANDS = """/reset       forget the conversation
/save FILE   write the state of the conversation
/load FILE   go on from a state that was saved with this model
/help        this list
/quit        leave (or Ctrl-D)"""
_LINE = "{text}\n"


def chat(
    checkpoint: common.Checkpoint,
    max_new_tokens: common.MaxNewTokens = 256,
    temperature: common.Temperature = 0.8,
    top_k: common.TopK = None,
    top_p: common.TopP = None,
    seed: common.Seed = None,
    stop: common.Stop = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="What the model reads for a line of yours, {text}; default: as the chat template "
            "beside the model has it, or else the line.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(
            help="A system message, for a model with a chat template.", show_default=False
        ),
    ] = None,
    tokenizer: common.TokenizerOption = None,
    device: common.Device = "auto",
    dtype: common.Dtype = None,
) -> None:
    """Talk to a model; it remembers all of the conversation in a state of constant size.

    Lines that begin with / are commands: /reset, /save FILE, /load FILE, /help, /quit. A model
    that was fine-tuned reads the others as its chat template has it; one that was not tuned for
    dialogue continues what it reads.
    """
    if template is not None and "{text}" not in template:
        raise ValueError(f"template is {template!r}; expected {{text}} in it, where your line goes")
    from transnormer.config import validate
    from transnormer.infer.sampling import SamplingConfig

    values = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampling = validate(SamplingConfig, values, source="options of chat")
    model = common.open_model(checkpoint, device, dtype)
    if not model.config.causal:
        raise ValueError(
            f"{checkpoint} is a model with causal = false; expected true: only a causal model "
            "generates; take another"
        )
    from transnormer.infer.text import begin_id

    words = common.open_tokenizer(checkpoint, tokenizer, model)
    conversation = Conversation(
        model,
        words,
        sampling.model_dump(),
        _reader(begin_id(model, words), words, template, system),
        max_new_tokens=max_new_tokens,
        seed=seed,
        stop=stop or [],
    )
    if sys.stdin.isatty():
        common.write_line(f"{model.num_parameters():,} parameters; /help lists the commands")
    _talk(conversation)


def _talk(conversation: "Conversation") -> None:
    """Read lines until the last one, and answer them or do what they say."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.split()[:1] in (["/quit"], ["/exit"]):
            return
        try:
            if line.startswith("/"):
                _obey(conversation, line)
            else:
                conversation.answer(line)
        except KeyboardInterrupt:
            # It ends the answer, not the conversation; at the prompt it ends the command.
            common.write_line("")
        except ValueError as error:
            typer.echo(f"error: {error}", err=True)


class Lines:
    """A line of the user by one pattern; nothing stands between an answer and the next line."""

    def __init__(self, begin: int, tokenizer: "Tokenizer", pattern: str) -> None:
        self._begin, self._tokenizer, self._pattern = begin, tokenizer, pattern

    def first(self, line: str) -> list[int]:
        """What the model reads for the first line."""
        return [self._begin, *self.later(line, ended=True)]

    def later(self, line: str, *, ended: bool) -> list[int]:
        """What it reads for a line after an answer."""
        return self._tokenizer.encode(self._pattern.replace("{text}", line))


class Turns:
    """A line of the user as the chat template beside the model has it."""

    def __init__(self, template: "ChatTemplate", eos: int | None, system: str | None) -> None:
        self._template, self._eos = template, eos
        self._before = [] if system is None else [{"role": "system", "content": system}]

    def first(self, line: str) -> list[int]:
        """What the model reads for the first line."""
        return self._template.encode([*self._before, {"role": "user", "content": line}])

    def later(self, line: str, *, ended: bool) -> list[int]:
        """What it reads for a line after an answer, whose end it has read or not."""
        ids = self._template.follow([{"role": "user", "content": line}])
        return ids[1:] if ended and ids[:1] == [self._eos] else ids


def _reader(
    begin: int, tokenizer: "Tokenizer", pattern: str | None, system: str | None
) -> Lines | Turns:
    """How lines are read: by the pattern, else the chat template, else one after the other."""
    if pattern is None and tokenizer.chat_template is not None:
        from transnormer.data.chat_template import ChatTemplate

        return Turns(ChatTemplate(tokenizer.chat_template, tokenizer), tokenizer.eos_id, system)
    if system is not None:
        why = "--template is given" if pattern is not None else "the model has no chat template"
        raise ValueError(f"--system is {system!r}; expected none: {why}; leave it out")
    return Lines(begin, tokenizer, _LINE if pattern is None else pattern)


def _obey(conversation: "Conversation", line: str) -> None:
    """Carry out a command; a file that cannot be used does not end the conversation."""
    try:
        said = conversation.command(line)
    except OSError as error:
        typer.echo(f"error: {common.explain(error)}", err=True)
    else:
        common.write_line(said)


class Conversation:
    """A state, and what is needed to go on from it."""

    def __init__(
        self,
        model: "Decoder",
        tokenizer: "Tokenizer",
        sampling: dict[str, float | int | None],
        reader: Lines | Turns,
        *,
        max_new_tokens: int,
        seed: int | None,
        stop: list[str],
    ) -> None:
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._max_new_tokens, self._seed, self._stop = max_new_tokens, seed, stop
        self._state: DecoderState | None = None
        self._turn = 0
        self._reader = reader
        # Whether the state has read the end-of-text token of its last answer.
        self._ended = True

    def answer(self, line: str) -> None:
        """Read a line and stream the answer; the state then holds both."""
        import torch

        from transnormer.infer.generate import generate
        from transnormer.infer.text import TextStream

        if self._state is None:
            ids = self._reader.first(line)
        else:
            ids = self._reader.later(line, ended=self._ended)
        generation = generate(
            self._model,
            torch.tensor([ids]),
            max_new_tokens=self._max_new_tokens,
            temperature=float(self._sampling["temperature"] or 0.0),
            top_k=None if self._sampling["top_k"] is None else int(self._sampling["top_k"]),
            top_p=self._sampling["top_p"],
            seed=None if self._seed is None else self._seed + self._turn,
            state=self._state,
        )
        self._turn += 1
        try:
            common.stream_out(TextStream(generation, self._tokenizer, stop=self._stop))
            common.write_piece("\n")
        finally:
            self._state = generation.state
            self._ended = generation.token_ids[0][-1:] == [self._tokenizer.eos_id]

    def command(self, line: str) -> str:
        """Carry out a line that begins with /, and return what to say."""
        from transnormer.models.state import DecoderState

        name, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        if name == "/help":
            return _COMMANDS
        if name == "/reset":
            self._state = None
            return "the conversation is forgotten"
        if name not in ("/save", "/load"):
            raise ValueError(f"{name} is no command; expected one of these:\n{_COMMANDS}")
        if not argument:
            raise ValueError(f"{name} has no file; expected {name} FILE")
        path = Path(argument).expanduser()
        if name == "/load":
            self._state, self._ended = DecoderState.load(path, self._model), True
            return f"going on after {int(self._state.positions[0]):,} tokens"
        if self._state is None:
            raise ValueError("there is no conversation yet; expected one; say something first")
        self._state.save(path, self._model)
        return f"{int(self._state.positions[0]):,} tokens are in {path} ({path.stat().st_size:,} bytes)"
