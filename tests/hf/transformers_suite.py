"""transformers' own tests of models, run on these; ``test_conformance.py`` puts this file there.

Beside its own suite transformers' source distribution lacks three modules that it imports; empty
ones stand in for them. Labels are made by the class names in transformers' tables, so the classes
are entered there.
"""

import unittest
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from transnormer.hf import (
    TransnormerConfig,
    TransnormerDecoderConfig,
    TransnormerDecoderForCausalLM,
    TransnormerDecoderModel,
    TransnormerForCausalLM,
    TransnormerModel,
)
from transnormer.models import zoo
from transnormer.nn.token_mixers import LightningConfig, SoftmaxConfig

from ...generation.test_utils import GenerationTesterMixin
from ...test_configuration_common import ConfigTester
from ...test_modeling_common import ModelTesterMixin, ids_tensor
from ...test_training_mixin import TrainingTesterMixin

for _config, _head, _body in (
    (TransnormerConfig, TransnormerForCausalLM, TransnormerModel),
    (TransnormerDecoderConfig, TransnormerDecoderForCausalLM, TransnormerDecoderModel),
):
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[_config.model_type] = _head.__name__
    modeling_auto.MODEL_MAPPING_NAMES[_config.model_type] = _body.__name__


class ModelTester:
    """Sizes and inputs of the suite."""

    is_training = True
    batch_size, seq_length, vocab_size = 3, 7, 99
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def get_config(self) -> PreTrainedConfig:
        raise NotImplementedError

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Any]]:
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class ReleasedTester(ModelTester):
    def get_config(self) -> PreTrainedConfig:
        return TransnormerConfig(
            vocab_size=99,
            decoder_embed_dim=32,
            decoder_layers=2,
            decoder_attention_heads=4,
            hidden_dim=32,
            glu_dim=48,
        )


class HybridTester(ModelTester):
    def get_config(self) -> PreTrainedConfig:
        pattern = (LightningConfig(heads=4, lrpe=True), SoftmaxConfig(heads=4, kv_heads=2))
        config = zoo.hybrid_custom(
            vocab_size=99, model_dim=32, num_layers=2, glu_dim=48, pattern=pattern
        )
        return TransnormerDecoderConfig(decoder=config, pad_token_id=0)


class Suite(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    # There are no weights of attention to return, and torch.export sees no cache of this class.
    has_attentions = False
    test_torch_exportable = False


class ReleasedModelTest(Suite, unittest.TestCase):
    all_model_classes = (TransnormerForCausalLM, TransnormerModel)
    model_tester = ReleasedTester()

    def test_config(self) -> None:
        ConfigTester(self, config_class=TransnormerConfig, decoder_embed_dim=32).run_common_tests()


class HybridModelTest(Suite, unittest.TestCase):
    all_model_classes = (TransnormerDecoderForCausalLM, TransnormerDecoderModel)
    model_tester = HybridTester()
