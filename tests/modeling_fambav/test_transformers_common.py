"""transformers' own common tests (`ModelTesterMixin`, `BackboneTesterMixin`, `ConfigTester`), run on small models."""

import copy
import unittest
from unittest.mock import patch

import pytest
import torch
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device

from modeling_fambav import FambaVBackbone, FambaVConfig, FambaVForImageClassification, FambaVModel
from modeling_fambav.modeling_fambav import FambaVPatchEmbeddings
from support.transformers_common_tests import NotAvailableError, prepare_common_tests

try:
    prepare_common_tests()
except NotAvailableError as error:
    pytest.skip(f"transformers' common tests could not be fetched (no network?): {error}", allow_module_level=True)

# The common tests know by these tables, read when they are imported, which of our classes takes labels.
modeling_auto.MODEL_MAPPING_NAMES["fambav"] = "FambaVModel"
modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["fambav"] = "FambaVForImageClassification"

from transformers_tests.test_backbone_common import BackboneTesterMixin  # noqa: E402
from transformers_tests.test_configuration_common import ConfigTester  # noqa: E402
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor  # noqa: E402


class FambaVModelTester:
    """A small model and a batch of images for it, under the names that the common tests read."""

    is_training = True
    batch_size = 3
    image_size = 16
    hidden_size = 32
    num_hidden_layers = 2  # the most that the common tests allow; with two layers, "upper" fuses in both

    def __init__(self, **fusion_fields):
        self.fusion_fields = fusion_fields

    def get_config(self):
        return FambaVConfig(
            image_size=self.image_size,
            patch_size=4,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            state_size=4,
            **self.fusion_fields,
        )

    def prepare_config_and_inputs_for_common(self):
        pixel_values = floats_tensor([self.batch_size, 3, self.image_size, self.image_size])
        return self.get_config(), {"pixel_values": pixel_values}


class FambaVModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (FambaVModel, FambaVForImageClassification)
    has_attentions = False  # scans instead
    test_resize_embeddings = False  # patches, no vocabulary
    # Without this a test is skipped for files that do not open with a copyright line of 2023 or later.
    test_can_init_all_missing_weights_before_2023 = True

    fusion_fields = {"fusion_strategy": "upper", "fusion_tokens": 2}
    expected_sequence_lengths = [15, 13]

    def setUp(self):
        self.model_tester = FambaVModelTester(**self.fusion_fields)

    def test_config(self):
        config_tester = ConfigTester(
            self,
            FambaVConfig,
            has_text_modality=False,
            common_properties=["hidden_size", "num_hidden_layers"],
            num_hidden_layers=self.model_tester.num_hidden_layers,
            image_size=[32, 48],
            hidden_size=36,
            **self.fusion_fields,
        )
        config_tester.run_common_tests()

    def test_hidden_states_output(self):
        # The common test expects as many tokens after every layer as before the first one; fusion removes some.
        config, inputs_dict = self.model_tester.prepare_config_and_inputs_for_common()
        self.assertListEqual(config.sequence_lengths, self.expected_sequence_lengths)
        expected_shapes = [
            (self.model_tester.batch_size, num_tokens, config.hidden_size)
            for num_tokens in [config.num_patches + 1, *config.sequence_lengths]
        ]

        for model_class in self.all_model_classes:
            model = model_class(copy.deepcopy(config)).to(torch_device).eval()
            with torch.no_grad():
                by_argument = model(**inputs_dict, output_hidden_states=True)
                model.config.output_hidden_states = True
                by_config = model(**inputs_dict)
            for outputs in (by_argument, by_config):
                self.assertListEqual([tuple(states.shape) for states in outputs.hidden_states], expected_shapes)

    def test_model_get_set_embeddings(self):
        # The common test expects an `nn.Embedding`; ours is the module that cuts an image into patches.
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            self.assertIsInstance(model.get_input_embeddings(), FambaVPatchEmbeddings)
            replacement = nn.Identity()
            model.set_input_embeddings(replacement)
            self.assertIs(model.get_input_embeddings(), replacement)
            self.assertIsNone(model.get_output_embeddings())

    def test_enable_input_require_grads_with_gradient_checkpointing(self):
        # The common test reads the gradient of `get_input_embeddings().weight` and is skipped where there is none;
        # here the weight is one level down, in the convolution.
        weight = property(lambda module: module.projection.weight)
        with patch.object(FambaVPatchEmbeddings, "weight", weight, create=True):
            super().test_enable_input_require_grads_with_gradient_checkpointing()


@pytest.mark.slow
class FambaVMiddleClassTokenModelTest(FambaVModelTest):
    """Every part of the state that fused tokens carry: tracked class token, sizes, scaled time steps."""

    fusion_fields = {
        "fusion_strategy": "custom",
        "fusion_schedule": [3, 0],
        "cls_token_position": "middle",
        "fusion_reduction": "size_weighted",
        "fusion_order": "appended",
        "fusion_scale_time_step": True,
    }
    expected_sequence_lengths = [14, 14]


@pytest.mark.slow
class FambaVUnfusedModelTest(FambaVModelTest):
    """Plain Vision Mamba."""

    fusion_fields = {"fusion_strategy": "none"}
    expected_sequence_lengths = [17, 17]


class FambaVBackboneTest(BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (FambaVBackbone,)
    config_class = FambaVConfig
    has_attentions = False

    def setUp(self):
        self.model_tester = FambaVModelTester(fusion_strategy="upper", fusion_tokens=2)
