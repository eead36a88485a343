"""A trained classifier: loading it with one fusion or another, and scoring it on labelled images."""

import time
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from fambav_training.data.labeled_images import LabeledImages, random_subset
from fambav_training.data.pixels import CachedImages, normalize
from fambav_training.evaluation.metrics import evaluate, ranked_classes
from fambav_training.fusion.settings import set_fusion
from fambav_training.fusion.speed import measured_speedup
from fambav_training.sources import loading
from modeling_fambav import FambaVConfig

logger = logging.get_logger(__name__)

# A sweep has many rows, and no decision hangs on one of them
_MAX_SECONDS_OF_A_ROW = 3.0


def load_classifier(name: str, fusion: dict[str, Any]) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A trained model and its image processor, with these fusion fields instead of its own.

    Raises:
        ValueError, StrictDataclassError: if the model is not one of ours, or a field has a wrong value.
        OSError: if there is no such model.
    """
    with loading(name):
        model = AutoModelForImageClassification.from_pretrained(name)
    if model.config.model_type != FambaVConfig.model_type:
        raise ValueError(f"{name}: expected a fambav model, this is {model.config.model_type!r}")
    set_fusion(model.config, fusion)
    with loading(name):
        return model, AutoImageProcessor.from_pretrained(name)


def label_indices(label_names: list[str], model: PreTrainedModel) -> list[int]:
    """The model's index of every class of a dataset, by name.

    Raises:
        ValueError: if the model does not know a class.
    """
    known = {str(name): int(index) for name, index in model.config.label2id.items()}
    unknown = [name for name in label_names if name not in known]
    if not unknown:
        return [known[name] for name in label_names]
    if all(name == f"LABEL_{index}" for name, index in known.items()):
        if len(known) != len(label_names):
            raise ValueError(
                f"the model names none of its {len(known)} classes, expected the {len(label_names)} of the dataset"
            )
        logger.warning(f"the model names none of its {len(known)} classes; they are taken in the order of the dataset")
        return list(range(len(label_names)))
    raise ValueError(f"class {unknown[0]!r} of the dataset: expected one of the model's, {sorted(known)}")


class Scorer:
    """A classifier and the validation images, ready to be scored again and again while its fusion changes.

    Attributes:
        model: the classifier; its configuration may be changed between two scores.
        pixel_values: the first batch, as the model receives it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: BaseImageProcessor,
        images: LabeledImages,
        accelerator: Accelerator,
        batch_size: int,
        max_samples: int | None = None,
        seed: int = 0,
    ):
        """Decode the images; `seed` chooses `max_samples` of them."""
        dataset = random_subset(images.validation, max_samples, seed)
        self._tensors = CachedImages(dataset, images.image_column, images.label_column, processor)
        self._tensors.labels = torch.tensor(label_indices(images.label_names, model))[self._tensors.labels]
        loader = DataLoader(self._tensors, batch_size, collate_fn=lambda batch: batch)
        self.model, self._processor, self._accelerator = model.eval(), processor, accelerator
        self._prepared_model, self._loader = accelerator.prepare(model, loader)
        self.pixel_values = normalize(self._tensors.pixels[:batch_size].to(accelerator.device), processor)

    def score(self) -> dict[str, float]:
        """Accuracy in percent, images, and images/s from pixels to scores."""
        with torch.inference_mode():  # kernels are compiled at the first call, which is no part of the speed
            self._prepared_model(self.pixel_values[:1])
        started = time.perf_counter()
        scores = evaluate(self._prepared_model, self._loader, self._processor, self._accelerator)
        seconds = time.perf_counter() - started
        num_images = len(self._tensors)
        return {**scores, "validation_images": num_images, "images_per_second": num_images / seconds}

    def predictions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The most likely class and the label of every image, each `(images,)`, as the model's indices."""
        batches = ranked_classes(self._prepared_model, self._loader, self._processor, self._accelerator)
        ranked, labels = zip(*batches)
        return torch.cat(ranked)[:, 0], torch.cat(labels)

    def score_and_time(self) -> dict[str, float]:
        """The same, with the speed of the forward pass alone, of the first batch.

        Besides images/s, `speedup` is how many times as fast it is as without fusion; the two are measured in turn, so
        that a machine that does other things too changes it less than the images/s.
        """
        measured = measured_speedup(self.model, self.pixel_values, {}, _MAX_SECONDS_OF_A_ROW)
        images_per_second = len(self.pixel_values) / measured.seconds
        return {**self.score(), "images_per_second": images_per_second, "speedup": measured.times}
