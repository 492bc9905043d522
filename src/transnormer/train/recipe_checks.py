"""What keys of a recipe mean nothing beside others: classification, instructions, adapters, copies."""

from typing import TYPE_CHECKING

from transnormer.data.documents import EMBEDDED
from transnormer.models.float8 import MULTIPLE
from transnormer.train.objective_config import ClassificationConfig, InstructionConfig

if TYPE_CHECKING:
    from transnormer.train.recipe import RunConfig

# What one line is for the objectives that read a line at a time.
_FIRST = {"classification": "a start token and a text", "instruction": "a prompt and an answer"}


def check_lines(config: "RunConfig") -> None:
    """Raise ValueError for keys that mean nothing where every line of data.path is a sample."""
    objective = config.objective
    if not isinstance(objective, ClassificationConfig | InstructionConfig):
        return
    kind = objective.kind
    fixed = {
        "data.packing": (config.data.packing, "stream"),
        "data.weights": (config.data.weights, None),
        "data.epochs": (config.data.epochs, None),
        "train.eval_bytes": (config.train.eval_bytes, 0),
        "model.tie_embeddings": (config.model.tie_embeddings, None),
        "optimizer.base_dim": (config.optimizer.base_dim, None),
    }
    for key, (value, only) in fixed.items():
        if value != only:
            raise ValueError(
                f"{key} is {value}; expected it unset: it means nothing to objective.kind = "
                f"{kind!r}; leave it out"
            )
    if config.data.seq < 2:
        raise ValueError(f"data.seq is {config.data.seq}; expected at least 2: {_FIRST[kind]}")
    if len(config.data.paths) > 1 or config.data.paths[0] == EMBEDDED:
        fields = "messages, prompt and completion, or instruction and output"
        if isinstance(objective, ClassificationConfig):
            fields = f"{objective.text_field!r} and {objective.label_field!r}"
        raise ValueError(
            f"data.path is {config.data.path!r}; expected one path of JSON lines with {fields} for "
            f"objective.kind = {kind!r}"
        )
    if isinstance(objective, InstructionConfig) and config.model.init_from is None:
        raise ValueError(
            "model.init_from is missing; expected a trained model for objective.kind = "
            "'instruction'; set it to a run, a step or a saved model"
        )


def check_outer(config: "RunConfig") -> None:
    """Raise ValueError where copies of the model cannot go apart as the rest of the recipe says."""
    if config.parallel.outer is not None and config.guard.action == "rollback":
        raise ValueError(
            "guard.action is 'rollback' beside [parallel.outer]; expected 'off' or 'skip': its "
            "snapshots do not hold what lies between the copies; change it, or leave the table out"
        )


def check_float8(config: "RunConfig") -> None:
    """Raise ValueError where float8 products would sum over other than multiples of 16 tokens."""
    train = config.train
    if train.float8 == "none":
        return
    if isinstance(config.objective, ClassificationConfig | InstructionConfig):
        raise ValueError(
            f"train.float8 is {train.float8!r}; expected 'none' for objective.kind = "
            f"{config.objective.kind!r}: its batches are as long as their longest line, and "
            f"products sum over multiples of {MULTIPLE} tokens"
        )
    # A segment lies on one rank, a row without segments on all that read it together.
    for key, tokens, least in (
        ("data.seq", config.data.seq, MULTIPLE * config.parallel.sp),
        ("train.segment_tokens", train.segment_tokens or 0, MULTIPLE),
    ):
        if tokens % least:
            raise ValueError(
                f"{key} is {tokens} beside train.float8 = {train.float8!r}; expected a multiple of "
                f"{least}: products sum over multiples of {MULTIPLE} tokens on each rank"
            )


def check_weights(config: "RunConfig") -> None:
    """Raise ValueError for bfloat16 weights whose small updates would be lost, or overwritten."""
    if config.train.weights != "bfloat16":
        return
    for key, value, only, why in (
        ("train.precision", config.train.precision, "bfloat16", "they are what is multiplied"),
        ("optimizer.name", config.optimizer.name, "adamw", "plain updates are too small for them"),
    ):
        if value != only:
            raise ValueError(
                f"{key} is {value!r} beside train.weights = 'bfloat16'; expected {only!r}: {why}; "
                "change it, or set train.weights to 'float32'"
            )
    if config.parallel.outer is not None and config.optimizer.states == "float32":
        raise ValueError(
            "optimizer.states is 'float32' beside train.weights = 'bfloat16' and [parallel.outer]; "
            "expected 'bfloat16': an outer step moves the weights, not the rest of them that the "
            "optimizer keeps; change it, or set train.weights to 'float32'"
        )


def check_lora(config: "RunConfig") -> None:
    """Raise ValueError where adapters cannot be trained as the rest of the recipe says."""
    if config.lora is None:
        return
    wanted = {
        "objective.kind": (config.objective.kind, "instruction"),
        "optimizer.name": (config.optimizer.name, "adamw"),
        "train.weights": (config.train.weights, "float32"),
    }
    for key, (value, only) in wanted.items():
        if value != only:
            raise ValueError(
                f"{key} is {value!r} beside [lora]; expected {only!r}; change it, or leave [lora] "
                "out"
            )
