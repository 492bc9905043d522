"""What generation is given: prompts as ids, and the ids that end an answer."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from transnormer.infer.sampling import SamplingConfig
from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.models.inputs import check_state
from transnormer.models.state import DecoderState
from transnormer.nn.state import KVState, tensors_of

Stop = int | Sequence[int | Sequence[int]]


def ends_with_stop(ids: Sequence[int], stops: Sequence[tuple[int, ...]]) -> bool:
    """Whether the last ids are one of the stops."""
    return any(tuple(ids[-len(stop) :]) == stop for stop in stops)


def checked_prompts(input_ids: Tensor | Sequence[Tensor], vocab_size: int) -> list[Tensor]:
    """The prompts as int64 rows; raises ValueError or TypeError for what cannot be read."""
    if isinstance(input_ids, Tensor):
        if input_ids.dim() != 2:
            raise ValueError(
                f"input_ids has shape {list(input_ids.shape)}; expected [batch, seq]; "
                "add a batch dim or pass a list of 1-D tensors"
            )
        rows = list(input_ids)
    else:
        rows = list(input_ids)
        for index, row in enumerate(rows):
            if not isinstance(row, Tensor):
                raise TypeError(f"input_ids[{index}] is a {type(row).__name__}; expected a tensor")
            if row.dim() != 1:
                raise ValueError(f"input_ids[{index}] has shape {list(row.shape)}; expected [seq]")
    if not rows:
        raise ValueError("input_ids holds no prompts; expected at least one")
    return [checked_ids(f"input_ids[{index}]", row, vocab_size) for index, row in enumerate(rows)]


def checked_ids(name: str, ids: Tensor, vocab_size: int) -> Tensor:
    """Ids of one prompt as int64; raises ValueError or TypeError, naming them ``name``."""
    # First: an empty list has no integer dtype.
    if ids.numel() == 0:
        raise ValueError(f"{name} is empty; expected at least one token; start with the bos id")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {ids.dtype}; expected an integer dtype")
    # Unsigned tensors cannot be compared.
    ids = ids.to(torch.int64)
    beyond = ids[(ids < 0) | (ids >= vocab_size)]
    if beyond.numel():
        raise ValueError(
            f"{name} holds the id {int(beyond[0])}; expected 0 <= id < {vocab_size}, the "
            "vocabulary of the model; was it made by another tokenizer?"
        )
    return ids


def is_integer(value: object) -> bool:
    """Whether a value is an integer, numpy's included; a truth value is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def checked_count(name: str, value: int) -> int:
    """An integer of at least 0 as Python's; raises TypeError or ValueError, naming it."""
    if not is_integer(value):
        raise TypeError(f"{name} is {value!r}; expected an integer")
    if value < 0:
        raise ValueError(f"{name} is {value}; expected at least 0")
    return int(value)


def optional_count(name: str, value: int | None) -> int | None:
    """``checked_count`` of what may be None."""
    return None if value is None else checked_count(name, value)


def check_sampling(sampling: SamplingConfig, vocab_size: int) -> None:
    """Raise TypeError or ValueError unless it is a configuration that names tokens there are."""
    if not isinstance(sampling, SamplingConfig):
        raise TypeError(f"sampling is a {type(sampling).__name__}; expected a SamplingConfig")
    for token, _ in sampling.logit_bias:
        if token >= vocab_size:
            raise ValueError(f"logit_bias names the token {token}; expected less than {vocab_size}")


def checked_stops(stop: Stop | None, config: DecoderConfig) -> list[tuple[int, ...]]:
    """Every stop as a sequence of ids; None is the end-of-sequence id of the configuration.

    Raises:
        ValueError: an empty stop, or an id beyond the vocabulary.
        TypeError: something else than integers.
    """
    if stop is None:
        eos = config.eos_token_id
        return [] if eos is None else [(eos,)]
    given: Any = stop
    entries = [given] if is_integer(given) else list(given)
    stops = [(entry,) if is_integer(entry) else tuple(entry) for entry in entries]
    for index, ids in enumerate(stops):
        if not ids:
            raise ValueError(f"stop[{index}] is empty; expected at least one id")
        if not all(map(is_integer, ids)):
            raise TypeError(f"stop[{index}] is {ids}; expected integers; encode text first")
        if not all(0 <= token < config.vocab_size for token in ids):
            raise ValueError(
                f"stop[{index}] is {list(ids)}; expected ids below {config.vocab_size}, the "
                "vocabulary of the model"
            )
    return [tuple(map(int, ids)) for ids in stops]


def checked_state(
    state: DecoderState | None, model: Decoder, ids: Tensor, new_tokens: int
) -> DecoderState | None:
    """A state that a prompt of ids [tokens] may continue by so many more tokens.

    Raises:
        ValueError: not one row of this model's state, or positions that the model does not have.
        TypeError: no state, or a tensor of another dtype.
    """
    limit, start = positions_of(model.config), 0
    if state is not None:
        if not isinstance(state, DecoderState):
            raise TypeError(f"state is a {type(state).__name__}; expected a DecoderState or None")
        empty = model.empty_state(0, device="meta")
        check_state(state, tuple(map(type, empty.layers)), ids[None, :1], None)
        for i, (layer, like) in enumerate(zip(state.layers, empty.layers, strict=True)):
            for x, y in zip(tensors_of(layer), tensors_of(like), strict=True):
                fixed = x.shape[1:] if y.shape[1] else x.shape[2:]
                wanted = y.shape[1:] if y.shape[1] else y.shape[2:]
                if x.dim() != y.dim() or x.shape[0] != 1 or fixed != wanted:
                    raise ValueError(
                        f"state.layers[{i}] has shape {list(x.shape)}; expected "
                        f"{[1, *y.shape[1:]]}, one row of this model's"
                    )
                if x.dtype != y.dtype:
                    raise TypeError(f"state.layers[{i}] is {x.dtype}; expected {y.dtype}")
            if isinstance(layer, KVState) and len({x.shape[1] for x in layer}) > 1:
                raise ValueError(
                    f"state.layers[{i}] has fields of {[x.shape[1] for x in layer]} tokens; "
                    "expected as many keys as values"
                )
        if state.positions.shape != (1,) or int(state.positions[0]) < 0:
            raise ValueError(
                f"state.positions is {state.positions.tolist()}; expected one number of at least 0"
            )
        start = int(state.positions[0])
    if limit and start + len(ids) + new_tokens > limit:
        raise ValueError(
            f"max_new_tokens is {new_tokens} after {start + len(ids)} tokens; expected at most "
            f"{max(0, limit - start - len(ids))}: the model has no position beyond {limit - 1}"
        )
    return state


def positions_of(config: DecoderConfig) -> int:
    """How many positions a model has (learned ones, or cosFormer's), 0 for any number."""
    limits = [config.max_positions]
    limits += [getattr(block.token_mixer, "max_positions", 0) for block in config.blocks]
    return min((limit for limit in limits if limit), default=0)
