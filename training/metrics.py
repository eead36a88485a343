"""Scoring a classifier on a data loader."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers.image_processing_utils import BaseImageProcessor

from data import normalize


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: DataLoader, processor: BaseImageProcessor, accelerator: Accelerator
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent, over all processes; with fewer than five classes, top-5 is top-all."""
    was_training = model.training
    model.eval()
    correct = torch.zeros(2, dtype=torch.long, device=accelerator.device)
    num_images = 0
    for pixels, labels in loader:
        with accelerator.autocast():
            logits = model(pixel_values=normalize(pixels, processor)).logits
        ranked = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
        # Without the repeated samples that fill up the last batch of a distributed loader.
        hits = accelerator.gather_for_metrics(ranked == labels.unsqueeze(-1))
        correct += torch.stack((hits[:, 0].sum(), hits.any(dim=-1).sum()))
        num_images += len(hits)
    model.train(was_training)
    top1, top5 = (100 * correct / num_images).tolist()
    return {"top1": top1, "top5": top5}
