"""Training on images of 32 px with fusion and without: accuracy over the seconds that training took."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fambav_training.files import atomic_file
from fambav_training.fusion.budgets import fusion_fields
from fambav_training.gpu.images_file import Images
from fambav_training.gpu.plan import Plan
from fambav_training.gpu.steps import Cell
from fambav_training.paper.tables import TABLE_1_TOKENS
from fambav_training.run.optimization import create_optimizer, create_schedule
from modeling_fambav import FambaVConfig, FambaVForImageClassification

STRATEGIES = ("upper", "none")
_WEIGHT_DECAY, _WARMUP, _LABEL_SMOOTHING, _PADDING = 0.05, 0.1, 0.1, 4


def cells(plan: Plan, images: Images, folder: Path) -> Iterator[Cell]:
    """A cell per epoch and strategy, in turn, so that a stop leaves curves of the same length."""
    runs = {strategy: _Run(plan, images, strategy, folder / f"{strategy}.pt") for strategy in STRATEGIES}
    for epoch in range(1, plan.epochs + 1):
        for strategy, run in runs.items():
            yield Cell(f"{strategy}, epoch {epoch}", lambda run=run, epoch=epoch: run.epoch(epoch))


class _Run:
    """One training, whose state is in a file after every epoch; it goes on from there with the same bits."""

    def __init__(self, plan: Plan, images: Images, strategy: str, path: Path):
        self.plan, self.images, self.path = plan, images, path
        self.device = torch.device(plan.device)
        num_labels = int(images.train_labels.max()) + 1
        side = images.train_images.shape[-1]
        fusion = _fusion(strategy, {"image_size": side, **plan.model})
        self.config = FambaVConfig(image_size=side, num_labels=num_labels, **plan.model, **fusion)
        self.records: list[dict[str, Any]] = []
        self._is_ready = False

    def epoch(self, number: int) -> dict[str, Any]:
        """Train epoch `number`, from 1, and score; one that is trained already is only looked up."""
        self._prepare()
        while len(self.records) < number:
            self._is_ready = False  # until the epoch is saved: whatever ends it leaves weights of no use
            self._train_epoch()
            self._save()
            self._is_ready = True
        return self.records[number - 1]

    def _prepare(self) -> None:
        """Take up the training after the last epoch that was saved, or begin it."""
        if self._is_ready:
            return
        self.records = []
        torch.manual_seed(0)
        self.model = FambaVForImageClassification(self.config).to(self.device)
        self.optimizer = create_optimizer(self.model, self.plan.learning_rate, _WEIGHT_DECAY)
        steps = self.plan.epochs * (len(self.images.train_labels) // self.plan.batch_size)
        self.schedule = create_schedule(self.optimizer, "cosine", _WARMUP, steps)
        self.train_images, self.train_labels, self.test_images, self.test_labels = (
            tensor.to(self.device) for tensor in self.images[:4]
        )
        if self.path.exists():
            state = torch.load(self.path, self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.records = state["records"]
        self._warm_up()
        self._is_ready = True

    def _warm_up(self) -> None:
        """A pass forward and backward that changes nothing but compiles, so that no epoch's clock sees that."""
        self.model.train()
        on_gpu = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(on_gpu):
            rows = torch.arange(self.plan.batch_size, device=self.device)
            self._loss(rows, torch.Generator()).backward()
        self.optimizer.zero_grad()
        self._wait()

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        states = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        with atomic_file(self.path) as new:
            torch.save({**states, "records": self.records}, new)

    def _train_epoch(self) -> None:
        generator = torch.Generator().manual_seed(len(self.records))
        order = torch.randperm(len(self.train_labels), generator=generator)
        batches = order.split(self.plan.batch_size)[: len(order) // self.plan.batch_size]
        self.model.train()
        before, losses = self.records[-1]["train_seconds"] if self.records else 0.0, []
        self._wait()
        started = time.perf_counter()
        for batch in batches:
            loss = self._loss(batch.to(self.device), generator)
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            losses.append(loss.detach())
        self._wait()
        seconds = time.perf_counter() - started
        self.records.append(
            {
                "train_seconds": before + seconds,
                "images_per_second": sum(map(len, batches)) / seconds,
                "train_loss": torch.stack(losses).mean().item(),
                "top1": self._top1(),
            }
        )

    def _loss(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Of these rows of the training images, augmented."""
        pixels = _augmented(self.train_images[rows], generator)
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(_normalized(pixels)).logits
        return F.cross_entropy(logits.float(), self.train_labels[rows], label_smoothing=_LABEL_SMOOTHING)

    @torch.inference_mode()
    def _top1(self) -> float:
        self.model.eval()
        hits = 0
        for pixels, labels in zip(self.test_images.split(500), self.test_labels.split(500)):
            with torch.autocast(self.device.type, torch.bfloat16):
                hits += (self.model(_normalized(pixels)).logits.argmax(1) == labels).sum().item()
        return 100 * hits / len(self.test_labels)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _fusion(strategy: str, model: dict[str, Any]) -> dict[str, Any]:
    """Fields of a strategy that remove the same share of the tokens as in the paper, as `reproduce.py` has them."""
    if strategy == "none":
        return {"fusion_strategy": "none"}
    unfused = FambaVConfig(**model, fusion_strategy="none")
    return fusion_fields(strategy, TABLE_1_TOKENS[strategy], unfused.num_hidden_layers, unfused.num_patches + 1)


def _normalized(pixels: Tensor) -> Tensor:
    """uint8 to about [-2, 2]."""
    return pixels.float() / 63.75 - 2


def _augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Every image at a random place of its padded self, and mirrored or not; (b, 3, h, w), uint8."""
    batch_size, _, height, width = pixels.shape
    padded = F.pad(pixels, (_PADDING,) * 4, value=127)

    def random(high: int) -> Tensor:
        return torch.randint(high, (batch_size, 1), generator=generator).to(pixels.device)

    rows = random(2 * _PADDING + 1) + torch.arange(height, device=pixels.device)
    columns = random(2 * _PADDING + 1) + torch.arange(width, device=pixels.device)
    columns = torch.where(random(2) == 1, columns.flip(1), columns)
    image = torch.arange(batch_size, device=pixels.device)[:, None, None]
    return padded.movedim(1, 3)[image, rows[:, :, None], columns[:, None, :]].movedim(3, 1)
