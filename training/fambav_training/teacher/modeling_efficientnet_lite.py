"""EfficientNet-Lite as an image classifier of transformers: what `train_teacher.py` fine-tunes.

The network is that of the package `efficientnet-lite-pytorch`. This file is saved with every teacher, so that
`AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)` loads it.
"""

from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, channels_last, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class EfficientNetLiteConfig(PreTrainedConfig):
    """Configuration of [`EfficientNetLiteForImageClassification`].

    Args:
        variant (`str`): `"efficientnet-lite0"` to `"efficientnet-lite4"`.
        image_size (`int`): Side of the square input in pixels.
        pretrained_on (`str`, *optional*): Data that the weights had seen before those of the labels.
    """

    model_type = "efficientnet_lite"

    variant: str = "efficientnet-lite0"
    image_size: int = 224
    pretrained_on: str | None = None


class EfficientNetLiteForImageClassification(PreTrainedModel):
    """EfficientNet-Lite (no squeeze-and-excitation, ReLU6): pixel_values `(B, 3, H, W)` to logits `(B, classes)`."""

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.network = EfficientNet.from_name(
            config.variant, image_size=config.image_size, num_classes=config.num_labels
        )
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """The loss is the mean cross-entropy against `labels` `(B,)`, if they are given."""
        # Depthwise convolutions on a CPU are more than twice as fast with the channels last.
        logits = self.network(pixel_values.contiguous(memory_format=channels_last))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


EfficientNetLiteConfig.register_for_auto_class()
EfficientNetLiteForImageClassification.register_for_auto_class("AutoModelForImageClassification")
