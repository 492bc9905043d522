"""How each kind of mixer is cut among ranks: one table, and why a layer does not fit it.

The units of a mixer are its heads, or the channels that it mixes apart from each other. A rank has an
equal share of them: the rows of the projections into them, the columns of the one out of them, and
what else is theirs. All other parameters of the mixer are on every rank.
"""

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

from torch import nn

from transnormer.models.decoder import Decoder
from transnormer.nn.channel_mixers import Ffn, Glu
from transnormer.nn.lower_bounds import LowerBounds
from transnormer.nn.norms import Norm
from transnormer.nn.positions import Lrpe, MdLrpe
from transnormer.nn.token_mixers import (
    Cosformer,
    DiagAttention,
    Eos,
    Gau,
    Hgrn1,
    Hgrn2,
    LightNet,
    Lightning,
    Retention,
    Softmax,
    Tpe,
)
from transnormer.nn.token_mixers.hgrn1 import Phase
from transnormer.nn.token_mixers.lightning import ConstantLogDecay
from transnormer.nn.token_mixers.retention import RetentionLogDecay


class Rule(NamedTuple):
    """How one kind of mixer is cut.

    Attributes:
        units: what the ranks share: names of the configuration, and where the module has the
            number. Each is to be a multiple of the ranks; a rank's module has its share.
        columns: projections into the units, by the rows of their weights.
        tensors: dims of other tensors that are cut; one of size 1 is whole.
        fused: projections into several parts, and the sizes of the parts.
        whole_last: every rank needs the last part of those, which is cut all the same.
        needs: further numbers that are to be multiples of the ranks.
        parts: of the channels that the norm and the projection out of the units see.
        norm: the norm is over the channels of all units.
        out: the projection out of the units; none of this name: channels return to their places.
    """

    units: Mapping[str, str]
    columns: tuple[str, ...] = ()
    tensors: Mapping[str, int] = {}
    fused: Mapping[str, Callable[[Any], tuple[int, ...]]] = {}
    whole_last: bool = False
    needs: Mapping[str, str] = {}
    parts: int = 1
    norm: bool = True
    out: str = "out_proj"


_HEADS = {"heads": "config.heads"}

RULES: dict[type[nn.Module], Rule] = {
    Cosformer: Rule(_HEADS, fused={"qkv_proj": lambda m: _thirds(m.qkv_proj)}),
    DiagAttention: Rule(_HEADS, fused={"qkv_proj": lambda m: _thirds(m.qkv_proj)}),
    Eos: Rule(
        _HEADS,
        ("i_proj", "e_proj", "s_proj", "o_key_proj", "o_value_proj", "delta_up_proj"),
        {"oscillation.logit": 0, "oscillation.fixed": 0, "e_matrix": 0, "s_matrix": 0},
    ),
    Ffn: Rule({"hidden_dim": "down_proj.in_features"}, ("up_proj",), out="down_proj"),
    Gau: Rule(
        {"hidden_dim": "hidden_dim"},
        fused={"uvz_proj": lambda m: (m.hidden_dim, m.hidden_dim, m.config.key_dim)},
        whole_last=True,
        needs={"key_dim": "config.key_dim"},
    ),
    Glu: Rule({"hidden_dim": "down_proj.in_features"}, ("gate_proj", "up_proj"), out="down_proj"),
    Hgrn1: Rule(
        {"model_dim": "width"},
        ("input_proj", "forget_proj"),
        fused={"gate_proj": lambda m: (m.width, m.width)},
        parts=2,
    ),
    Hgrn2: Rule({"heads": "heads"}, fused={"in_proj": lambda m: _thirds(m.in_proj)}),
    Lightning: Rule(
        _HEADS,
        ("gate_up_proj",),
        fused={"qkvu_proj": lambda m: _like(m.out_proj.in_features, m.qkvu_proj)},
    ),
    LightNet: Rule(_HEADS, ("q_proj", "k_proj", "v_proj", "gate_up_proj")),
    Retention: Rule(_HEADS, ("q_proj", "k_proj", "v_proj", "gate_proj"), norm=False),
    Softmax: Rule(
        {"kv_heads": "kv_heads", "heads": "config.heads"}, ("q_proj", "k_proj", "v_proj")
    ),
    Tpe: Rule({"model_dim": "model_dim"}, tensors={"mixing": 1}, out=""),
}
# A single head is cut by the channels of its values, which never meet before the norm.
_ONE_HEAD = Rule(
    {"model_dim": "value_dim"},
    ("i_proj", "o_value_proj", "delta_up_proj"),
    {"oscillation.logit": 2, "e_matrix": 2, "s_matrix": 2},
)
# Parts of mixers that hold something of each unit, and along which dim.
OF_UNITS: dict[type[nn.Module], dict[str, int]] = {
    ConstantLogDecay: {"log_decay": 0},
    LowerBounds: {"gamma": 1},
    Lrpe: {"theta": 0},
    MdLrpe: {"theta": 0},
    Phase: {"theta": 0},
    RetentionLogDecay: {"log_decay": 0},
}


def _thirds(linear: nn.Linear) -> tuple[int, ...]:
    return _like(linear.out_features // 3, linear)


def _like(size: int, linear: nn.Linear) -> tuple[int, ...]:
    return (size,) * (linear.out_features // size)


def rule_of(mixer: nn.Module) -> Rule | None:
    """The rule of a token or channel mixer; None where there is none."""
    if isinstance(mixer, Eos) and mixer.config.heads == 1:
        return _ONE_HEAD
    return RULES.get(type(mixer))


def why_not_on_ranks(model: Decoder, layer_index: int, ranks: int) -> str | None:
    """Why the layers of a block cannot be cut among so many ranks; None where they can."""
    block: Any = model.blocks[layer_index]
    for place in ("token_mixer", "channel_mixer"):
        mixer = getattr(block, place)
        if mixer is None:
            continue
        rule = rule_of(mixer)
        if rule is None:
            return f"{place} is a {type(mixer).__name__}, for which no rule says how it is cut"
        numbers = {n: attrgetter(path)(mixer) for n, path in {**rule.units, **rule.needs}.items()}
        norm = getattr(mixer, "norm", None)
        if rule.norm and isinstance(norm, Norm) and norm.config.groups > 1:
            numbers["norm.groups"] = norm.config.groups // rule.parts
        for name, number in numbers.items():
            if number % ranks:
                return f"{place}.{name} is {number}, no multiple of {ranks}"
    return None
