"""Segment drawn shapes with a backbone that fuses tokens: what unmerging is worth where every patch counts.

    python training/segment_shapes.py

Trains the same small model three times, from the same weights on the same images, about a minute in all on a CPU:
    no fusion           every patch keeps a token of its own
    fusion, unmerged    the map of `FambaVBackbone`: every patch gets the token that it was fused into
    fusion, spread      without token maps: the surviving tokens, in their order, spread evenly over the grid

Prints the mean intersection over union of each on images that were not trained on.
"""

import argparse
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fambav_training.machine.memory import keep_freed_memory
from fambav_training.markdown import markdown_table
from fambav_training.run.optimization import create_optimizer
from modeling_fambav import FambaVBackbone, FambaVConfig

CLASSES = ("background", "circle", "square", "triangle")


class Arm(NamedTuple):
    """One of the ways to a map that are compared."""

    fusion_strategy: str
    unmerges: bool


class Result(NamedTuple):
    """`mean_iou` is in percent, over held-out images."""

    sequence_lengths: list[int]
    train_seconds: float
    mean_iou: float


ARMS = {
    "no fusion": Arm("none", unmerges=True),
    "fusion, unmerged": Arm("upper", unmerges=True),
    "fusion, spread": Arm("upper", unmerges=False),
}


def draw_shapes(num_images: int, image_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Circles, squares and triangles of random colours and places on noise, one to three per image.

    Returns:
        pixel values `(num_images, 3, image_size, image_size)` and classes `(num_images, image_size, image_size)`.
    """
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:image_size, :image_size]
    pixels = random.normal(0, 0.3, (num_images, 3, image_size, image_size)).astype(np.float32)
    labels = np.zeros((num_images, image_size, image_size), dtype=np.int64)
    for image, label in zip(pixels, labels):
        for _ in range(random.integers(1, 4)):
            shape = random.integers(1, len(CLASSES))
            radius = random.uniform(1 / 8, 1 / 4) * image_size
            y, x = rows - random.uniform(0, image_size), columns - random.uniform(0, image_size)
            inside = {
                "circle": y**2 + x**2 < radius**2,
                "square": np.maximum(abs(y), abs(x)) < radius,
                "triangle": (y < radius) & (2 * abs(x) - y < radius),
            }[CLASSES[shape]]
            color = random.choice((-1, 1)) * random.uniform(0.7, 1.5, (3, 1)).astype(np.float32)
            image[:, inside] += color
            label[inside] = shape
    return torch.from_numpy(pixels), torch.from_numpy(labels)


def spread_over_grid(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """What one would write without token maps: (B, T, D) -> (B, D, *grid), patch p of P gets token floor(p T / P)."""
    return F.interpolate(tokens.mT, size=grid[0] * grid[1], mode="nearest").unflatten(2, grid)


class Segmenter(nn.Module):
    """A backbone and a linear classifier of its patches: (B, 3, H, W) -> logits (B, classes, H, W)."""

    def __init__(self, config: FambaVConfig, unmerges: bool):
        super().__init__()
        self.backbone = FambaVBackbone(config)
        self.head = nn.Conv2d(config.hidden_size, len(CLASSES), kernel_size=1)
        self.unmerges = unmerges

    def forward(self, pixel_values: Tensor) -> Tensor:
        outputs = self.backbone(pixel_values, output_hidden_states=True)
        features = outputs.feature_maps[-1]
        if not self.unmerges:
            tokens = outputs.hidden_states[-1][:, 1:]  # the class token stands first
            features = spread_over_grid(tokens, features.shape[-2:])
        return F.interpolate(self.head(features), size=pixel_values.shape[-2:], mode="bilinear")


def train(model: Segmenter, pixels: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    """Train on random batches, with cross-entropy over all pixels."""
    optimizer = create_optimizer(model, args.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.steps, pct_start=0.1)
    order = torch.Generator().manual_seed(args.seed)
    model.train()
    for _ in range(args.steps):
        batch = torch.randint(len(pixels), (args.batch_size,), generator=order)
        loss = F.cross_entropy(model(pixels[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def mean_iou(model: Segmenter, pixels: Tensor, labels: Tensor, batch_size: int) -> float:
    """Mean over the classes of the intersection over union of all pixels, in percent."""
    model.eval()
    predicted = torch.cat([model(batch).argmax(1) for batch in pixels.split(batch_size)])
    ious = []
    for index in range(len(CLASSES)):
        truth, found = labels == index, predicted == index
        ious.append((truth & found).sum() / (truth | found).sum())
    return 100 * torch.stack(ious).mean().item()


def compare(args: argparse.Namespace) -> dict[str, Result]:
    """Train and score every arm, from the same weights on the same images."""
    pixels, labels = draw_shapes(args.num_images, args.image_size, seed=args.seed)
    held_out = draw_shapes(args.num_images // 8, args.image_size, seed=args.seed + 1)
    results = {}
    for name, arm in ARMS.items():
        config = FambaVConfig(
            image_size=args.image_size,
            patch_size=4,
            hidden_size=64,
            num_hidden_layers=4,
            state_size=8,
            fusion_strategy=arm.fusion_strategy,
            fusion_tokens=args.fusion_tokens,
        )
        torch.manual_seed(args.seed)
        model = Segmenter(config, arm.unmerges)
        start = time.perf_counter()
        train(model, pixels, labels, args)
        seconds = time.perf_counter() - start
        results[name] = Result(config.sequence_lengths, seconds, mean_iou(model, *held_out, args.batch_size))
    return results


def table(results: dict[str, Result]) -> str:
    rows = [
        {
            "map": name,
            "tokens per layer": " ".join(map(str, result.sequence_lengths)),
            "training, s": f"{result.train_seconds:.1f}",
            "mean IoU, %": f"{result.mean_iou:.1f}",
        }
        for name, result in results.items()
    ]
    return markdown_table(rows)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Segment drawn shapes with fused tokens, unmerged and not.")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of each model")
    parser.add_argument("--batch_size", type=int, default=32, help="images per step")
    parser.add_argument("--num_images", type=int, default=2048, help="training images; an eighth more are scored")
    parser.add_argument("--image_size", type=int, default=48, help="side of an image in pixels; a patch has 4")
    parser.add_argument("--fusion_tokens", type=int, default=24, help="tokens removed by each of the last 3 layers")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the images")
    return parser.parse_args(arguments)


def main() -> None:
    keep_freed_memory()
    print(table(compare(parse_arguments())))


if __name__ == "__main__":
    main()
