"""TransNormerLLM in vLLM: the plugin that vLLM loads in each of its processes.

``register`` is the entry point ``transnormer`` of the group ``vllm.general_plugins``; nobody else
needs to call it. vLLM itself is imported when it is called, not before.
"""

# The class names that config.json has under ``architectures``: those of transnormer.hf.
ARCHITECTURES = ("TransnormerForCausalLM", "TransnormerDecoderForCausalLM")
_MODEL = "transnormer.integrations.vllm.model:TransnormerForVllm"


def register() -> None:
    """Make the models of this package known to vLLM; a second call changes nothing."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    # The model_types of config.json, known to transformers from here on.
    import transnormer.hf  # noqa: F401
    from transnormer.integrations.vllm.settings import TransnormerVllmConfig

    known = ModelRegistry.get_supported_archs()
    for name in ARCHITECTURES:
        if name not in known:
            # As text: the class is imported where a model is built, and only there.
            ModelRegistry.register_model(name, _MODEL)
        # vLLM finds the settings of recurrent models by name alone, unless they have attention.
        MODELS_CONFIG_MAP[name] = TransnormerVllmConfig
