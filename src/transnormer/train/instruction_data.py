"""From data.path to what an instruction run reads: a tokenizer with its template, conversations.

It is kept in the run directory, so that a resumed run reads the very same tokens in the very same
parts whatever has become of the files at data.path.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from transnormer.config import Config, validate
from transnormer.data import Tokenizer, load_tokenizer
from transnormer.data.chat_template import RESERVED, TEMPLATES, ChatTemplate, template_for
from transnormer.data.conversations import Example, encode_example, read_examples
from transnormer.data.corpus import DEFAULT_HELDOUT, HELDOUT_NAME
from transnormer.data.documents import find_files
from transnormer.data.packed import ConversationSource, pack, write_conversations
from transnormer.data.split import split_by_key
from transnormer.files import atomic_directory, read_json, sha256, write_json
from transnormer.models import checkpoint
from transnormer.models.checkpoint import find_tokenizer
from transnormer.train.adapters import BASE
from transnormer.train.kept_data import check_unchanged
from transnormer.train.objective_config import InstructionConfig
from transnormer.train.recipe import RunConfig
from transnormer.train.training_data import given_tokenizer

_TOKENIZER, _RECORD = "tokenizer", "data.json"
_TRAIN, _HELDOUT = "train", "heldout"
DEFAULT_TEMPLATE = "released"


class InstructionData(NamedTuple):
    """What a run reads; heldout is None where nothing is held out."""

    tokenizer: Tokenizer
    train: ConversationSource
    heldout: ConversationSource | None


class InstructionRecord(Config):
    """All that an instruction run reads: the sha256 of each file in its data."""

    format: Literal["transnormer-run-conversations-1"] = "transnormer-run-conversations-1"
    sha256: dict[str, str]


def open_instruction_data(
    config: RunConfig, folder: Path, tell: Callable[[str], None]
) -> InstructionData:
    """Read the data of a run from `folder`, and make it there first where it is not there yet.

    Raises FileNotFoundError and ValueError where data.path, data.heldout, data.tokenizer or the
    template give nothing usable, and ValueError for files that are not those with which the run
    began.
    """
    if not folder.is_dir():
        with atomic_directory(folder) as temporary:
            _prepare(config, temporary, tell)
    path = folder / _RECORD
    record = validate(InstructionRecord, read_json(path), source=str(path))
    check_unchanged(folder, record.sha256)
    parts = {name.split("/")[0] for name in record.sha256}
    return InstructionData(
        load_tokenizer(folder / _TOKENIZER),
        ConversationSource(folder / _TRAIN),
        ConversationSource(folder / _HELDOUT) if _HELDOUT in parts else None,
    )


def _prepare(config: RunConfig, folder: Path, tell: Callable[[str], None]) -> None:
    objective = config.objective
    assert isinstance(objective, InstructionConfig)
    tokenizer = given_tokenizer(config)
    if tokenizer is None:
        raise ValueError(
            f"data.tokenizer is {config.data.tokenizer!r}; expected the one of model.init_from, "
            "which no new one can replace; leave it out"
        )
    config.model.rows(tokenizer.vocab_size)
    if tokenizer.eos_id is None:
        raise ValueError(
            "data.tokenizer has no end-of-text token; expected one, which ends every answer; take "
            "another tokenizer and model"
        )
    if tokenizer.chat_template is None:
        # data.tokenizer may name the same tokenizer from another place, without the template.
        beside = find_tokenizer(config.model.init_from or "")
        tokenizer.chat_template = None if beside is None else load_tokenizer(beside).chat_template
    template = _template(objective, tokenizer)
    parts = _read_parts(config, objective)
    _tell_shared(parts[_TRAIN], parts[_HELDOUT], tell)
    if any(example.text is None for part in parts.values() for example in part):
        tokenizer.chat_template = template.source
    folder.joinpath(_TOKENIZER).mkdir()
    tokenizer.save(folder / _TOKENIZER)
    for name, part in parts.items():
        if part:
            folder.joinpath(name).mkdir()
            _write(part, template, tokenizer, config, folder / name, tell)
    _tell_epoch(config, ConversationSource(folder / _TRAIN), tell)
    if config.lora is not None:
        folder.joinpath(BASE).mkdir()
        checkpoint.write_weights(checkpoint.load(config.model.init_from or ""), folder / BASE)
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): sha256(path) for path in written}
    write_json(InstructionRecord(sha256=hashes).model_dump(mode="json"), folder / _RECORD)


def _template(objective: InstructionConfig, tokenizer: Tokenizer) -> ChatTemplate:
    named = objective.template
    if named is None:
        return template_for(tokenizer, DEFAULT_TEMPLATE)
    if named == "reserved" and not {*tokenizer.special_tokens, *tokenizer.markers} >= RESERVED:
        raise ValueError(
            "objective.template is 'reserved', and the tokenizer has no "
            f"{' and '.join(sorted(RESERVED))}; expected the released models' vocabulary; take "
            "another template"
        )
    if named in TEMPLATES:
        return ChatTemplate(TEMPLATES[named], tokenizer)
    path = Path(named)
    if not path.is_file():
        raise FileNotFoundError(
            f"objective.template is {named!r}; expected one of {', '.join(TEMPLATES)}, or a jinja2 "
            "file; check the path"
        )
    try:
        source = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"objective.template is {named!r}, which is not UTF-8 at byte {error.start}; expected "
            "a jinja2 file in UTF-8; convert it"
        ) from error
    return ChatTemplate(source, tokenizer, name=named)


def _read_parts(config: RunConfig, objective: InstructionConfig) -> dict[str, Sequence[Example]]:
    data = config.data
    path = data.paths[0]
    if isinstance(data.heldout, str):
        without = {file.resolve() for file in find_files(data.heldout, name=HELDOUT_NAME)}
        return {
            _TRAIN: list(read_examples(path, without=without)),
            _HELDOUT: list(read_examples(data.heldout, name=HELDOUT_NAME)),
        }
    examples = list(read_examples(path))
    share = DEFAULT_HELDOUT if data.heldout is None else data.heldout
    if not share:
        return {_TRAIN: examples, _HELDOUT: []}
    groups = [example.group for example in examples]
    train, heldout = split_by_key(examples, groups, share, objective.split_seed)
    return {_TRAIN: train, _HELDOUT: heldout}


def _tell_shared(
    train: Sequence[Example], heldout: Sequence[Example], tell: Callable[[str], None]
) -> None:
    """Say how many held-out conversations training reads too, where their files share some."""
    read = {(str(example.messages), example.text) for example in train}
    shared = [x.name for x in heldout if (str(x.messages), x.text) in read]
    if shared:
        tell(
            f"{len(shared):,} held-out conversations stand in the training part too, the first at "
            f"{shared[0]}: figures on them say nothing of others"
        )


def _write(
    part: Sequence[Example],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    config: RunConfig,
    directory: Path,
    tell: Callable[[str], None],
) -> None:
    objective = config.objective
    assert isinstance(objective, InstructionConfig)
    made = write_conversations(
        ((example.name, encode_example(example, template, tokenizer)) for example in part),
        directory,
        seq=config.data.seq,
        too_long=objective.too_long,
    )
    what = "training" if directory.name == _TRAIN else "held-out"
    over = f"; {made.cut:,} longer than data.seq are cut" if made.cut else ""
    over += f"; {made.dropped:,} longer ones are left out" if made.dropped else ""
    tell(
        f"{made.conversations:,} {what} conversations, {made.answer_tokens:,} of {made.tokens:,} "
        f"tokens are answers{over}"
    )


def _tell_epoch(config: RunConfig, source: ConversationSource, tell: Callable[[str], None]) -> None:
    """Say how the steps compare with the data: there are no epochs in a recipe."""
    seq = config.data.seq
    lengths = source.lengths()
    rows = len(pack(lengths.tolist(), seq))
    full = int(lengths.sum()) / (rows * seq)
    steps = rows / config.samples_per_step
    tell(
        f"{rows:,} rows of {seq:,} tokens, {full:.1%} full: an epoch is {steps:,.1f} steps, the run "
        f"{config.train.steps / steps:,.2f} epochs"
    )
