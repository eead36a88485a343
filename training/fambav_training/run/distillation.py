"""Distillation: a model learns from what a teacher says of the same images, beside their labels.

    loss = (1 - w) * cross-entropy(student, labels) + w * T^2 * KL(softmax(teacher / T) || softmax(student / T))

by Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015, arXiv:1503.02531), section 2. The
gradient of the second term falls as 1 / T^2, so T^2 keeps the shares of the two terms whatever the temperature T is.
With `standardized` logits, by Sun et al., "Logit Standardization in Knowledge Distillation" (CVPR 2024,
arXiv:2403.01427), the student has to find the teacher's order and distances of the classes, not its scale. Of an image
that is a mix of two which the teacher has seen alone, both terms are the mix of those of the two.

A model in which fusion was switched on has a natural teacher: itself, with all its tokens. Any other image classifier
can be one too.
"""

import hashlib

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_utils import PreTrainedModel

from fambav_training.data.augmentation import Targets
from fambav_training.evaluation.scoring import label_indices
from fambav_training.fusion.settings import UNFUSED, set_fusion
from fambav_training.sources import loading
from fambav_training.teacher.input import TeacherInput
from modeling_fambav import FambaVConfig

DISTILLATION_LOSSES = ("kl", "standardized")
_EPSILON = 1e-8  # of a variance, for logits that are all the same


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    kind: str = "kl",
    targets: Targets | None = None,
) -> Tensor:
    """The second term of the loss without its weight, a mean over the images.

    Args:
        student_logits, teacher_logits: `(B, classes)`.
        temperature: above 0; the higher, the more the classes count that the teacher finds unlikely.
        kind: one of `DISTILLATION_LOSSES`.
        targets: if the student saw mixes of two images that the teacher had each seen alone, how they were mixed. The
            student then learns the mix of what the teacher says of the two: its gradient is that of the divergence
            from `share * softmax(teacher / T) + (1 - share) * softmax(partner's / T)`.
    """
    if kind == "standardized":
        student_logits, teacher_logits = standardize(student_logits), standardize(teacher_logits)
    student, teacher = ((logits / temperature).log_softmax(-1) for logits in (student_logits, teacher_logits))
    if targets is None:
        return temperature**2 * nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)

    def divergence(log_probabilities: Tensor) -> Tensor:
        return nn.functional.kl_div(student, log_probabilities, reduction="none", log_target=True).sum(-1)

    return temperature**2 * targets.mean_loss(divergence, teacher)


def standardize(logits: Tensor) -> Tensor:
    """Logits `(B, classes)` minus their mean over their standard deviation, of each image (algorithm 1)."""
    centered = logits - logits.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + _EPSILON).sqrt()


class Teacher:
    """A trained classifier that scores images for a student. It is never trained and in no checkpoint of a run."""

    views: int | None = None  # it sees whatever the student sees

    def __init__(
        self, model: PreTrainedModel, classes: list[int], prepare: TeacherInput | None = None, name: str = ""
    ):
        """`classes` are the model's index of each class of the student; `prepare` makes its images of theirs."""
        self.model, self._classes = model.eval().requires_grad_(False), torch.tensor(classes, device=model.device)
        self._prepare, self.name = prepare, name
        self.pretrained_on: str | None = getattr(model.config, "pretrained_on", None)
        self.is_unfused = model.config.model_type == FambaVConfig.model_type

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor) -> Tensor:
        """Logits `(B, classes)` in the student's order of images `(B, C, H, W)` as the student sees them."""
        if self._prepare is not None:
            pixel_values = self._prepare(pixel_values)
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
    processor: BaseImageProcessor,
    label_names: list[str],
    device: torch.device,
    trust_remote_code: bool = False,
) -> Teacher:
    """A trained image classifier of any architecture; if it is one of ours, with fusion switched off.

    Args:
        flag: the flag that names the teacher, for errors.
        name: folder or Hub id.
        processor: that of the student, whose images the teacher's own processor would not see.
        label_names: the student's classes, by index.
        device: where the teacher works.
        trust_remote_code: whether code that comes with the teacher may run.

    Raises:
        ValueError: if it is no image classifier, does not know the classes, needs its own code and may not run it, or
            has an image processor that cannot be reproduced on batches.
        OSError: if there is no such model.
    """
    try:
        with loading(name, flag):
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            model, report = AutoModelForImageClassification.from_pretrained(
                name, config=config, trust_remote_code=trust_remote_code, output_loading_info=True
            )
    except ValueError as error:
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ValueError(
                f"{flag} {name}: comes with code of its own; read it, and allow it to run by "
                "--teacher_trust_remote_code"
            ) from error
        raise ValueError(f"{flag} {name}: expected an image classifier as the teacher: {error}") from error
    except ImportError as error:
        raise ValueError(f"{flag} {name}: its code needs a package that is not installed: {error}") from error
    if report["missing_keys"]:
        raise ValueError(
            f"{flag} {name}: expected a trained classifier as the teacher, {sorted(report['missing_keys'])[0]} is "
            "missing"
        )
    if config.model_type == FambaVConfig.model_type:
        set_fusion(model.config, UNFUSED)
    try:
        with loading(name, flag):
            teachers_processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
        prepare = TeacherInput(processor, teachers_processor)
        return Teacher(model.to(device), label_indices(label_names, model), prepare, name)
    except (AttributeError, KeyError) as error:
        raise ValueError(f"{flag} {name}: its image processor has no {error}") from error
    except ValueError as error:
        raise ValueError(f"{flag} {name} as the teacher: {error}") from error
