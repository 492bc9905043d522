"""What vLLM asks of a recurrent model before it builds one."""

from typing import Any

from vllm.model_executor.models.config import MambaModelConfig

from transnormer.integrations.vllm.support import check_supported


class TransnormerVllmConfig(MambaModelConfig):
    """Blocks of the state's cache as vLLM's other recurrent models have them, and what is refused."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Refuse what the plugin cannot serve, then set the sizes of blocks.

        Raises:
            NotImplementedError: a model that is no TransNormerLLM; speculative decoding.
            ValueError: a state in another dtype than float32; heads that do not divide.
        """
        decoder = vllm_config.model_config.hf_config.decoder_config()
        check_supported(decoder, vllm_config.parallel_config.tensor_parallel_size)
        cache = vllm_config.cache_config
        for name in ("mamba_cache_dtype", "mamba_ssm_cache_dtype"):
            dtype = getattr(cache, name)
            if dtype not in ("auto", "float32"):
                raise ValueError(
                    f"{name} is {dtype!r}; expected 'auto' or 'float32': the slowest heads sum up "
                    "the whole text, which a smaller dtype rounds away"
                )
        if vllm_config.speculative_config is not None:
            raise NotImplementedError(
                "speculative_config is given; expected none: this plugin advances a state by one "
                "token at a time; `transnormer serve` has drafts by lookup"
            )
        # Without this vLLM for CPUs says in its log that it corrects another model.
        cache.mamba_ssm_cache_dtype = "float32"
        super().verify_and_update_config(vllm_config)
