"""Top-k accuracy as an `evaluate` metric that needs no network, and scoring a classifier with it."""

from collections.abc import Iterator

import datasets
import evaluate as evaluate_library
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers.image_processing_utils import BaseImageProcessor

from fambav_training.data.pixels import normalize

_MAX_K = 5


class TopKAccuracy(evaluate_library.Metric):
    """Share of images, in percent, whose class is among the k that a model finds most likely.

    Predictions are classes from the most to the least likely; with fewer classes than k, all of them count.
    """

    def _info(self) -> evaluate_library.MetricInfo:
        features = {
            "predictions": datasets.Sequence(datasets.Value("int64")),
            "references": datasets.Value("int64"),
        }
        return evaluate_library.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions: list of ranked classes; references: class; k: list of k",
            features=datasets.Features(features),
        )

    def _compute(
        self, predictions: list[list[int]], references: list[int], k: tuple[int, ...] = (1, _MAX_K)
    ) -> dict[str, float]:
        hits = torch.tensor(predictions) == torch.tensor(references).unsqueeze(-1)
        return {f"top{one_k}": 100 * hits[:, :one_k].any(dim=-1).double().mean().item() for one_k in k}


@torch.no_grad()
def ranked_classes(
    model: nn.Module, loader: DataLoader, processor: BaseImageProcessor, accelerator: Accelerator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches, over all processes: the likeliest classes `(B, k)` from the most likely on, and the labels `(B,)`."""
    for pixels, labels in loader:
        with accelerator.autocast():
            logits = model(pixel_values=normalize(pixels, processor)).logits
        ranked = logits.topk(min(_MAX_K, logits.shape[-1]), dim=-1).indices
        # Without the repeated samples that fill up the last batch of a distributed loader
        ranked, labels = accelerator.gather_for_metrics((ranked, labels))
        yield ranked.cpu(), labels.cpu()


def evaluate(
    model: nn.Module, loader: DataLoader, processor: BaseImageProcessor, accelerator: Accelerator
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent, over all processes."""
    was_training = model.training
    model.eval()
    metric = TopKAccuracy(keep_in_memory=True)
    for ranked, labels in ranked_classes(model, loader, processor, accelerator):
        metric.add_batch(predictions=ranked, references=labels)
    model.train(was_training)
    return metric.compute()
