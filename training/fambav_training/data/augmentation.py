"""Augmentation of whole batches on the training device, random for every image, and the loss on mixed labels.

Crop, flip and erasing follow the paper's recipe (section 4), with kornia's per-sample operations.
"""

from collections.abc import Callable
from typing import NamedTuple

import kornia.augmentation as K
import torch
from torch import Tensor, nn

from fambav_training.machine.transfer import to_device


class Targets(NamedTuple):
    """Labels of images that may each be a mix of two of the batch.

    Attributes:
        labels (`Tensor` of shape `(B,)`): class of each image.
        partners (`Tensor` of shape `(B,)`): index of the image that was mixed in; its own where none was.
        weights (`Tensor` of shape `(B,)`): share of the image itself; that of its partner is the rest.
    """

    labels: Tensor
    partners: Tensor
    weights: Tensor

    def mean_loss(self, loss: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
        """The mean over the batch of a loss, that of a mixed image being the mix of its losses against two targets.

        Args:
            loss: from targets `(B, ...)` to a loss `(B,)` of every image.
            target: `(B, ...)`, of every image alone.

        Returns:
            a scalar.
        """
        return (self.weights * loss(target) + (1 - self.weights) * loss(target[self.partners])).mean()


def mixed_cross_entropy(logits: Tensor, targets: Targets, label_smoothing: float) -> Tensor:
    """Mean cross-entropy of logits `(B, classes)` against labels that may be mixed.

    It is linear in the target, so that this is the cross-entropy against mixed probabilities. Outside the model, whose
    own loss would take float labels for a multi-label problem.
    """

    def loss(labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")

    return targets.mean_loss(loss, targets.labels)


class Augmentation:
    """Normalised images `(B, C, H, W)` and labels `(B,)` to augmented images and `Targets`.

    All randomness comes from torch's generator of the CPU, which the trainer seeds before every batch.

    Attributes:
        mixes: whether images are mixed, by mixup or cutmix.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        random_crop_padding: int | None = None,
        horizontal_flip_prob: float = 0.0,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        random_erasing_prob: float = 0.0,
    ):
        """`random_crop_padding` of None is an eighth of the shorter side; 0 is no crop."""
        padding = min(image_size) // 8 if random_crop_padding is None else random_crop_padding
        steps = []
        if padding > 0:
            # Zeros, which are the mean colour of normalised images
            steps.append(K.RandomCrop(image_size, padding=padding, p=1.0))
        if horizontal_flip_prob > 0:
            steps.append(K.RandomHorizontalFlip(p=horizontal_flip_prob))
        if random_erasing_prob > 0:
            steps.append(K.RandomErasing(p=random_erasing_prob, scale=(0.02, 0.33), ratio=(0.3, 3.3)))
        self._single = nn.Sequential(*steps)
        self._mixup_alpha, self._cutmix_alpha = mixup_alpha, cutmix_alpha
        self.mixes = mixup_alpha > 0 or cutmix_alpha > 0
        if cutmix_alpha > 0:
            keys = ["input", "class"]
            self._cutmix = K.RandomCutMixV2(beta=cutmix_alpha, p=1.0, data_keys=keys, use_correct_lambda=True)

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Targets]:
        images = self._single(images)
        has_both = self._mixup_alpha > 0 and self._cutmix_alpha > 0
        if self._cutmix_alpha > 0 and not (has_both and torch.rand(()) < 0.5):
            return self._cut_and_paste(images, labels)
        if self._mixup_alpha > 0:
            return self._mix(images, labels)
        own = torch.arange(len(labels), device=labels.device)
        return images, Targets(labels, own, torch.ones_like(labels, dtype=torch.float32))

    def _mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Targets]:
        # Not kornia's, whose shares are uniform instead of Beta(alpha, alpha)
        batch_size = len(images)
        alpha = torch.full((batch_size,), self._mixup_alpha)
        weights = torch.distributions.Beta(alpha, alpha, validate_args=False).sample()
        weights, order = (to_device(draw, images.device) for draw in (weights, torch.randperm(batch_size)))
        mixed = images.lerp(images[order], (1 - weights).view(-1, 1, 1, 1))
        return mixed, Targets(labels, order, weights)

    def _cut_and_paste(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Targets]:
        # kornia returns the labels of both images; given indices instead, it says where the rectangle came from
        own = torch.arange(len(labels), device=labels.device)
        mixed, cuts = self._cutmix(images, own)  # (number of cuts = 1, B, [own, partner, share of its own])
        _, partners, shares = cuts[0].unbind(-1)
        return mixed, Targets(labels, partners.long(), shares)
