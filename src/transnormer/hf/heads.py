"""The decoder with its head as a model of transformers: logits, loss, and ``generate``."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from transnormer.hf.body import AnyTransnormerBody, AnyTransnormerModel
from transnormer.hf.cache import DecoderCache, StaticDecoderCache
from transnormer.hf.config import AnyTransnormerConfig
from transnormer.models.decoder import Decoder


class AnyTransnormerHead(AnyTransnormerModel):
    """A decoder with its head: token ids to logits."""

    _tied_weights_keys = {"lm_head.weight": "model.transnormer.embedding.weight"}

    def __init__(self, config: AnyTransnormerConfig) -> None:
        super().__init__(config)
        self.model = AnyTransnormerBody(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(
            self.transnormer.config.model_dim, self.transnormer.config.vocab_size, bias=False
        )
        self.post_init()

    @property
    def transnormer(self) -> Decoder:
        """The decoder of this package, without the head."""
        return self.model.transnormer

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As torch's; also takes the names that tensors have in this model's files.

        transformers' Trainer resumes with the tensors of a file as they are.
        """
        own = self.state_dict().keys()
        renamings = get_model_conversion_mapping(self, add_legacy=False)
        tensors = {}
        for name, x in state_dict.items():
            if name not in own:
                for renaming in renamings:
                    name, _ = renaming.rename_source_key(name)
            tensors[name] = x
        for tied, source in self.all_tied_weights_keys.items():
            if tied not in tensors and source in tensors:
                tensors[tied] = tensors[source]
        return super().load_state_dict(tensors, *args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, the loss and the cache.

        Args:
            labels: int64 [batch, seq], -100 ignored. In a causal model they are the input ids: the
                loss compares token t with the logits of t - 1; in a masked one it does not shift.
                Nats, mean; ``Decoder.loss`` is the one that never makes all logits at once.
            logits_to_keep: only the last ones (0: all), or their indices.
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
                kwargs: as the model's without a head.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


class AnyTransnormerForCausalLM(AnyTransnormerHead, GenerationMixin):
    """A causal decoder with its head, and ``generate``."""

    def __init__(self, config: AnyTransnormerConfig) -> None:
        if not config.decoder_config().causal:
            raise NotImplementedError(
                "causal is False; expected True for a causal language model; use "
                "AutoModelForMaskedLM"
            )
        super().__init__(config)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False: keys and values are not what this model keeps."""
        return False

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Give ``generate`` a ``DecoderCache``, a static one for cache_implementation "static"."""
        given = model_kwargs.get("past_key_values")
        wanted = generation_config.cache_implementation
        if given is not None or generation_config.use_cache is False:
            parent: Any = super()
            parent._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
            return
        if wanted not in (None, "dynamic", "static"):
            raise NotImplementedError(
                f"cache_implementation is {wanted!r}; expected None, 'dynamic' or 'static': a "
                "recurrent state has no keys to move or to quantize"
            )
        cache = DecoderCache()
        if wanted == "static":
            rows = batch_size * max(
                generation_config.num_beams, generation_config.num_return_sequences
            )
            cache = StaticDecoderCache(self.transnormer.empty_state(rows))
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """None: the cache knows where each row stands, whatever of its mask is given again."""

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
        """The mask as it is: there are no scores to be masked."""
        return attention_mask

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: DecoderCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As transformers'; the tokens that ``generate`` adds itself are no pads and get no mask."""
        parent: Any = super()
        inputs = parent.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        # A prompt that is read token by token has no length here, and may hold pads.
        if next_sequence_length == 1 and not is_first_iteration and past_key_values is not None:
            inputs.pop("attention_mask", None)
        return inputs
