"""Distillation: a model learns from what a teacher says of the same images, beside their labels.

    loss = (1 - w) * cross-entropy(student, labels) + w * T^2 * KL(softmax(teacher / T) || softmax(student / T))

by Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015, arXiv:1503.02531), section 2. The
gradient of the second term falls as 1 / T^2, so T^2 keeps the shares of the two terms whatever the temperature T is.

A model in which fusion was switched on has a natural teacher: itself, with all its tokens.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor
from transformers.image_processing_utils import BaseImageProcessor

from fusion_settings import UNFUSED, set_fusion
from modeling_fambav import FambaVConfig, FambaVForImageClassification
from scoring import label_indices


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """The second term of the loss without its weight, a mean over the images.

    Args:
        student_logits, teacher_logits: `(B, classes)`.
        temperature: above 0; the higher, the more the classes count that the teacher finds unlikely.
    """
    student, teacher = ((logits / temperature).log_softmax(-1) for logits in (student_logits, teacher_logits))
    return temperature**2 * nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


class Teacher:
    """A trained classifier that scores images for a student. It is never trained and in no checkpoint of a run."""

    def __init__(self, model: FambaVForImageClassification, classes: list[int]):
        """`classes` are the model's index of each class of the student."""
        self.model, self._classes = model.eval().requires_grad_(False), torch.tensor(classes, device=model.device)

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor) -> Tensor:
        """Logits `(B, classes)` in the student's order of normalised images `(B, C, H, W)`."""
        return self.model(pixel_values=pixel_values).logits[:, self._classes]

    def fingerprint(self) -> str:
        """SHA-256 of the weights: the same name may hold others when a run is resumed."""
        digest = hashlib.sha256()
        for name, weight in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def load_teacher(
    flag: str,
    name: str,
    student: FambaVConfig,
    processor: BaseImageProcessor,
    label_names: list[str],
    device: torch.device,
) -> Teacher:
    """A trained classifier with fusion switched off, for a student that reads the same images.

    Args:
        flag: the flag that names the teacher, for errors.
        name: folder or Hub id.
        student: configuration of the student.
        processor: that of the student; the teacher sees images that it has normalised.
        label_names: the student's classes, by index.
        device: where the teacher works.

    Raises:
        ValueError: if it is not a fambav classifier, or has other classes, another image size or another
            normalisation than the student.
        OSError: if there is no such model.
    """
    config = AutoConfig.from_pretrained(name)
    if config.model_type != FambaVConfig.model_type:
        raise ValueError(f"{flag} {name}: expected a fambav model as the teacher, this is {config.model_type!r}")
    if config.image_height_width != student.image_height_width:
        height, width = student.image_height_width
        raise ValueError(
            f"{flag} {name}: image_size {config.image_size} of the teacher, expected that of the student, "
            f"{height} x {width} pixels"
        )
    if config.num_labels != len(label_names):
        raise ValueError(
            f"{flag} {name}: the teacher has {config.num_labels} classes, expected the {len(label_names)} of the data"
        )
    teachers_processor = AutoImageProcessor.from_pretrained(name)
    for field in ("image_mean", "image_std", "rescale_factor"):
        expected, found = getattr(processor, field), getattr(teachers_processor, field)
        if not np.array_equal(found, expected):
            raise ValueError(
                f"{flag} {name}: {field} {found} of the teacher's image processor, expected the student's {expected}"
            )
    model, report = FambaVForImageClassification.from_pretrained(name, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(
            f"{flag} {name}: expected a trained classifier as the teacher, {sorted(report['missing_keys'])[0]} is "
            "missing"
        )
    set_fusion(model.config, UNFUSED)
    try:
        return Teacher(model.to(device), label_indices(label_names, model))
    except ValueError as error:
        raise ValueError(f"{flag} {name} as the teacher: {error}") from error
