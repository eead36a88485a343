"""Famba-V: Vision Mamba with cross-layer token fusion. Importing this package registers it with the Auto classes."""

from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from .backends import selective_scan_backend, set_selective_scan_backend
from .configuration_fambav import FambaVConfig
from .modeling_fambav import FambaVBackbone, FambaVForImageClassification, FambaVModel, FambaVPreTrainedModel
from .token_fusion import Matching, match_tokens, unmerge

__version__ = "0.1.0"

AutoConfig.register(FambaVConfig.model_type, FambaVConfig)
AutoModel.register(FambaVConfig, FambaVModel)
AutoModelForImageClassification.register(FambaVConfig, FambaVForImageClassification)
AutoBackbone.register(FambaVConfig, FambaVBackbone)
AutoImageProcessor.register(FambaVConfig, image_processor_classes={"pil": ViTImageProcessorPil})

# `save_pretrained` then copies the code beside the weights, for people who do not have this package.
FambaVConfig.register_for_auto_class()
FambaVModel.register_for_auto_class("AutoModel")
FambaVForImageClassification.register_for_auto_class("AutoModelForImageClassification")
FambaVBackbone.register_for_auto_class("AutoBackbone")

__all__ = [
    "FambaVBackbone",
    "FambaVConfig",
    "FambaVForImageClassification",
    "FambaVModel",
    "FambaVPreTrainedModel",
    "Matching",
    "match_tokens",
    "selective_scan_backend",
    "set_selective_scan_backend",
    "unmerge",
]
