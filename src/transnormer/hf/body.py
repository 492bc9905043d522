"""The decoder without its head as a model of transformers: building, loading, reading tokens."""

from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from transnormer.hf.cache import DecoderCache, Read
from transnormer.hf.config import AnyTransnormerConfig
from transnormer.models.decoder import Block, Decoder

_INITIALIZED = "_is_hf_initialized"


class TransnormerBlock(GradientCheckpointingLayer, Block):
    """A block that transformers can compute again in the backward pass."""


class AnyTransnormerModel(PreTrainedModel):
    """What the models below share: how they are built, loaded, initialised and recomputed."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransnormerBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    # Assisted decoding rolls the state back, see ``DecoderCache``.
    _is_stateful = False
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": OutputRecorder(Block, index=0)}

    transnormer: Decoder
    """The decoder of this package; its weights are these."""

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.transnormer.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another embedding in place; the vocabulary is then its rows."""
        if not isinstance(value, nn.Embedding):
            raise TypeError(f"value is {type(value).__name__}; expected an nn.Embedding")
        decoder = self.transnormer
        decoder.embedding = value
        decoder.config = decoder.config.model_copy(update={"vocab_size": value.num_embeddings})

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the decoder initialises itself, see ``initialize_weights``."""

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise what no checkpoint gave: parameters that are missing, and computed buffers.

        The decoder's own initialisation is used. Where a parameter is missing all of the decoder is
        initialised and what was loaded is put back; buffers alone are computed module by module.
        """
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        given = {name for name, x in tensors.items() if getattr(x, _INITIALIZED, False)}
        decoder = self.transnormer
        missing = {n for n, _ in self.named_parameters() if n not in given}
        head: Any = getattr(self, "lm_head", None)
        if "lm_head.weight" in missing and not getattr(head, _INITIALIZED, False):
            nn.init.normal_(head.weight, std=decoder.config.init_std)
            setattr(head.weight, _INITIALIZED, True)
        if missing - {"lm_head.weight"}:
            _reset(decoder, _INITIALIZED)
            return
        for module in decoder.modules():
            own = [x for _, x in module.named_buffers(recurse=False)]
            if any(not getattr(x, _INITIALIZED, False) for x in own):
                _reset(module, _INITIALIZED)


def _reset(module: nn.Module, flag: str) -> None:
    """Initialise a module and put back those of its tensors that carry a flag."""
    tensors = [*module.parameters(), *module.buffers()]
    kept = [(x, x.clone()) for x in tensors if getattr(x, flag, False)]
    methodcaller("reset_parameters")(module)
    for x, value in kept:
        x.copy_(value)


class AnyTransnormerBody(AnyTransnormerModel):
    """A decoder without its head: token ids to normed hidden states."""

    def __init__(self, config: AnyTransnormerConfig) -> None:
        super().__init__(config)
        # Without a head of its own: that one is beside this model.
        inner = config.decoder_config().model_copy(update={"tie_embeddings": True})
        self.transnormer = Decoder(inner)
        for block in self.transnormer.blocks:
            # A class, not a wrapper: the names of parameters stay as they are.
            block.__class__ = TransnormerBlock
        for x in (*self.transnormer.parameters(), *self.transnormer.buffers()):
            # The decoder has initialised itself, unless it was built without memory.
            setattr(x, _INITIALIZED, not x.is_meta)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states that the head reads, and the cache.

        Args:
            input_ids: int64 [batch, seq].
            attention_mask: [batch, seq] or [batch, past + seq]; 0 at pads, which leave no trace in
                the state, on whichever side they are.
            position_ids: int64 [batch, seq] or [seq]; None continues from the cache. Where they begin
                anew inside a row, without cache and mask, rows are read as packed sequences, each
                with a state of its own; a cache is then not made.
            past_key_values: a ``DecoderCache``; it is updated.
            inputs_embeds: [batch, seq, hidden_size] instead of input_ids.
            use_cache: return a cache; None is the configuration's, and no in training.
            cu_seq_lens_q: bounds of packed sequences, as transformers' flattening collator gives.
            shape: extents of a grid, for bidirectional models, see ``Decoder.forward``.

        Raises:
            ValueError: both or none of input_ids and inputs_embeds; a mask of another shape;
                positions that begin anew beside a cache or a mask that hides something (beside a
                cache a compiled model cannot look).
            TypeError: a cache of another class.
            NotImplementedError: hidden states of several packed rows.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected one of input_ids and inputs_embeds; pass one of them")
        given = inputs_embeds if input_ids is None else input_ids
        assert given is not None
        if given.dim() != (3 if input_ids is None else 2):
            raise ValueError(
                f"the input has shape {list(given.shape)}; expected input_ids [batch, seq] or "
                "inputs_embeds [batch, seq, hidden_size]"
            )
        cache = _checked_cache(past_key_values)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        mask = needed_mask(attention_mask, given.shape[1])
        if position_ids is not None:
            position_ids = position_ids.to(torch.int64).expand(given.shape[0], -1)
        alone = bool(kwargs.get("output_hidden_states") or self.config.output_hidden_states)
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        folded = None
        if cu_seqlens is None and cache is None:
            cu_seqlens = packed_bounds(position_ids, mask)
            folded = None if cu_seqlens is None or len(given) == 1 else given.shape[:2]
        elif cu_seqlens is None:
            check_unpacked(position_ids, mask, "past_key_values")
        if folded is not None:
            if alone:
                raise NotImplementedError(
                    f"output_hidden_states is True with {folded[0]} rows of packed sequences; "
                    "expected one row: give one at a time"
                )
            # Packed sequences are one row: those of one row behind those of the row before.
            given = (input_ids, inputs_embeds, position_ids)
            input_ids, inputs_embeds, position_ids = map(_one_row, given)
        if cache is None and use_cache and self.transnormer.config.causal and cu_seqlens is None:
            cache = DecoderCache()
        x, cache = self._read(
            input_ids,
            inputs_embeds,
            cache,
            mask,
            position_ids,
            cu_seqlens=cu_seqlens,
            shape=kwargs.get("shape"),
            alone=alone,
        )
        if folded is not None:
            x = x.unflatten(1, folded)[0]
        # transformers' annotation is FloatTensor, which no tensor is an instance of.
        hidden: Any = x
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)

    def _read(
        self,
        input_ids: Tensor | None,
        embeddings: Tensor | None,
        cache: DecoderCache | None,
        mask: Tensor | None,
        positions: Tensor | None,
        *,
        cu_seqlens: Tensor | None,
        shape: tuple[int, ...] | None,
        alone: bool,
    ) -> tuple[Tensor, DecoderCache | None]:
        """Hidden states of the tokens; those that a roll-back left to be read come before them."""
        if embeddings is not None:
            ids = torch.zeros(embeddings.shape[:2], dtype=torch.int64, device=embeddings.device)
        else:
            assert input_ids is not None
            ids = input_ids
        count = ids.shape[1]
        read: Read | None = None
        if cache is not None and cache.records:
            read = Read(cache.get_seq_length(), cache.state, input_ids, mask, positions)
            joined = None if alone else cache.joined(read)
            if cache.pending is not None and joined is None:
                self._settle(cache)
                read = read._replace(state=cache.state)
            elif joined is not None and joined.input_ids is not None:
                read, ids = joined, joined.input_ids
                mask, positions = joined.mask, joined.positions
        x, state = self.transnormer.hidden(
            ids,
            None if cache is None else cache.state,
            positions,
            cu_seqlens,
            mask,
            shape=shape,
            keep_state=cache is not None,
            embeddings=embeddings,
        )
        if cache is not None and state is not None:
            cache.replace(state, read, count)
        return x[:, -count:], cache

    def _settle(self, cache: DecoderCache) -> None:
        """Read what is pending on its own."""
        pending = cache.pending
        assert pending is not None
        assert pending.input_ids is not None
        _, state = self.transnormer.hidden(
            pending.input_ids, pending.state, pending.positions, None, pending.mask
        )
        assert state is not None
        cache.settled(state)


def _one_row(x: Tensor | None) -> Tensor | None:
    """[batch, seq, ...] as [1, batch * seq, ...]."""
    return None if x is None else x.flatten(0, 1)[None]


def _checked_cache(cache: Any) -> DecoderCache | None:
    if cache is not None and not isinstance(cache, DecoderCache):
        raise TypeError(
            f"past_key_values is a {type(cache).__name__}; expected a DecoderCache: a recurrent "
            "state is no list of keys and values; pass None or transnormer.hf.DecoderCache()"
        )
    return cache


def needed_mask(attention_mask: Tensor | None, seq: int) -> Tensor | None:
    """The mask of the last ``seq`` tokens, bool; None where it hides nothing.

    Looking costs a wait for the device, as in transformers; without it a mask of ones would take
    the slower way of a mask that hides something.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] < seq:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; expected [batch, past + seq] "
            f"with seq {seq}; other shapes say what a softmax may see"
        )
    mask = attention_mask[:, -seq:].to(torch.bool)
    if torch.compiler.is_compiling():
        return mask
    return None if bool(mask.all()) else mask


def packed_bounds(position_ids: Tensor | None, mask: Tensor | None = None) -> Tensor | None:
    """Bounds of sequences where positions begin anew inside a row; None where they do not.

    Args:
        position_ids: [batch, seq] or None.
        mask: bool [batch, seq] or None.

    Returns:
        int32 [num_sequences + 1], of all rows one behind the other.

    Raises:
        ValueError: positions begin anew beside a mask that hides something.
    """
    return None if position_ids is None else _bounds(position_ids, mask)


# How many there are depends on values. The compiler must not take a packed row for one text.
@torch.compiler.disable
def _bounds(position_ids: Tensor, mask: Tensor | None) -> Tensor | None:
    if mask is not None and not bool(mask.all()):
        check_unpacked(position_ids, mask, "attention_mask")
        return None
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=1) != 1
    if not bool(begins[:, 1:].any()):
        return None
    starts = begins.flatten().nonzero()[:, 0]
    return torch.cat([starts, starts.new_tensor([begins.numel()])]).to(torch.int32)


def check_unpacked(position_ids: Tensor | None, mask: Tensor | None, beside: str) -> None:
    """Raise ValueError where the positions of a row's real tokens begin anew inside it.

    Args:
        position_ids: [batch, seq] or None.
        mask: bool [batch, seq] or None.
        beside: the argument that has no meaning for packed sequences.
    """
    if position_ids is None or position_ids.shape[1] < 2 or torch.compiler.is_compiling():
        return
    # A pad has the position before it, so that it begins nothing.
    real = position_ids if mask is None else position_ids.masked_fill(~mask, -1)
    before = real.cummax(dim=1).values[:, :-1]
    again = (real[:, 1:] <= before) & (real[:, 1:] >= 0)
    if bool(again.any()):
        row, token = again.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids begins anew at token {token + 1} of row {row}, beside {beside}; expected "
            "one sequence a row: packed sequences are read without cache and pads; leave it out, or "
            "give one sequence a row"
        )
