"""Training on images of 32 px with fusion and without: accuracy over the seconds that training took."""

import pickle
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fambav_training.data.crops import Crops, take_crops
from fambav_training.files import atomic_file
from fambav_training.gpu.images_file import Images
from fambav_training.gpu.plan import Plan
from fambav_training.gpu.steps import Cell
from fambav_training.paper.tables import table_cells
from fambav_training.run.optimization import create_optimizer, create_schedule
from modeling_fambav import FambaVConfig, FambaVForImageClassification

STRATEGIES = ("upper", "none")
_WEIGHT_DECAY, _WARMUP, _LABEL_SMOOTHING, _PADDING = 0.05, 0.1, 0.1, 4


def cells(
    plan: Plan, images: Images, folder: Path, conditions: dict[str, Any], measured: dict[str, Any]
) -> Iterator[Cell]:
    """A cell per epoch and strategy, in turn, so that a stop leaves curves of the same length.

    Args:
        plan: the model and its training.
        images: to train on and to score.
        folder: of the checkpoints.
        conditions: which a training shares with its checkpoint.
        measured: the cells that are measured already, by name.

    Raises:
        ValueError: if a checkpoint belongs to other conditions or another plan, or is not that of the measured epochs.
    """
    runs = {strategy: _Run(plan, images, strategy, folder / f"{strategy}.pt", conditions) for strategy in STRATEGIES}
    for strategy, run in runs.items():
        epochs = [measured.get(f"{strategy}, epoch {epoch}", {}) for epoch in range(1, plan.epochs + 1)]
        run.check_belongs_to(epochs)
    for epoch in range(1, plan.epochs + 1):
        for strategy, run in runs.items():
            yield Cell(f"{strategy}, epoch {epoch}", lambda run=run, epoch=epoch: run.epoch(epoch))


class _Run:
    """One training, whose state is in a file after every epoch; it goes on from there with the same bits.

    Raises:
        ValueError: if the file is no checkpoint, or one of another model, training or machine.
    """

    def __init__(self, plan: Plan, images: Images, strategy: str, path: Path, conditions: dict[str, Any]):
        self.plan, self.images, self.path = plan, images, path
        self.device = torch.device(plan.device)
        num_labels = int(images.train_labels.max()) + 1
        side = images.train_images.shape[-1]
        fusion = _fusion(strategy, {"image_size": side, **plan.model})
        self.config = FambaVConfig(image_size=side, num_labels=num_labels, **plan.model, **fusion)
        self.records: list[dict[str, Any]] = []
        self._is_ready = False
        training = {name: getattr(plan, name) for name in ("epochs", "batch_size", "learning_rate")}
        self.made_with = {**conditions, **plan.model, **fusion, "image_size": side, **training}
        self.name = secrets.token_hex(4)  # which training a record is of
        if path.exists():
            state = self._read()
            for name, value in self.made_with.items():
                if (found := state["made_with"].get(name)) != value:
                    raise ValueError(
                        f"{path}: trained with {name} {found!r}, now it is {value!r}; give another --output_dir"
                    )
            self.name = state["name"]

    def check_belongs_to(self, epochs: list[dict[str, Any]]) -> None:
        """Refuse to go on where another training was.

        Args:
            epochs: what is measured of every epoch; empty, or with an error, where nothing is.

        Raises:
            ValueError: if some are of another training than the checkpoint, and others are still to come.
        """
        names = {epoch.get("training") for epoch in epochs}
        if names - {self.name, None} and None in names:
            raise ValueError(
                f"{self.path}: expected the checkpoint of the epochs that are measured already; put it back, "
                "or give another --output_dir"
            )

    def _read(self) -> dict[str, Any]:
        try:
            state = torch.load(self.path, "cpu", weights_only=True, mmap=True)
            if isinstance(state, dict) and {"made_with", "name", "records", "model"} <= set(state):
                return state
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{self.path}: cannot be read, {error}") from error
        raise ValueError(f"{self.path}: not a checkpoint of this script")

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
            state = self._read()
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
            self._loss(torch.zeros(4, self.plan.batch_size, dtype=torch.int64, device=self.device)).backward()
        self.optimizer.zero_grad()
        self._wait()

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        states = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        with atomic_file(self.path) as new:
            about = {"made_with": self.made_with, "name": self.name, "records": self.records}
            torch.save({**states, **about}, new)

    def _train_epoch(self) -> None:
        self.model.train()
        before, losses = self.records[-1]["train_seconds"] if self.records else 0.0, []
        self._wait()
        started = time.perf_counter()
        numbers = self._random_numbers(len(self.records))
        for of_batch in numbers.unbind(1):
            loss = self._loss(of_batch)
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            losses.append(loss.detach())
        self._wait()
        seconds = time.perf_counter() - started
        self.records.append(
            {
                "training": self.name,
                "train_seconds": before + seconds,
                "images_per_second": numbers[0].numel() / seconds,
                "train_loss": torch.stack(losses).mean().item(),
                "top1": self._top1(),
            }
        )

    def _random_numbers(self, seed: int) -> Tensor:
        """Arguments of `_loss` for all batches of an epoch, (4, batches, batch size).

        All at once, because the host waits for the device whenever it moves something there.
        """
        generator = torch.Generator().manual_seed(seed)
        number = len(self.train_labels) // self.plan.batch_size * self.plan.batch_size
        order = torch.randperm(len(self.train_labels), generator=generator)[:number]
        highest = (2 * _PADDING + 1, 2 * _PADDING + 1, 2)
        others = [torch.randint(high, (number,), generator=generator) for high in highest]
        return torch.stack([order, *others]).view(4, -1, self.plan.batch_size).to(self.device)

    def _loss(self, numbers: Tensor) -> Tensor:
        """Of a batch: rows of the training images, and the last three arguments of `_augmented`, (4, batch size)."""
        rows, *places = numbers
        pixels = _augmented(self.train_images[rows], *places)
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
    """Fields of a strategy that remove the same share of the tokens as in the paper, those of its row in Table 1."""
    return next(row.fields for row in table_cells("1", model, "ti") if row.name == strategy)


def _normalized(pixels: Tensor) -> Tensor:
    """uint8 to about [-2, 2]."""
    return pixels.float() / 63.75 - 2


def _augmented(pixels: Tensor, down: Tensor, right: Tensor, is_mirrored: Tensor) -> Tensor:
    """Every image as seen from this place of its padded self, and mirrored or not.

    Args:
        pixels: uint8 tensor of shape (b, 3, h, w).
        down, right: where the image begins in the padded one, from 0 to 8; int64 tensors of shape (b,).
        is_mirrored: 0 or 1, of shape (b,).

    Returns:
        uint8 tensor of shape (b, 3, h, w).
    """
    return take_crops(pixels, Crops(down, right, is_mirrored == 1), _PADDING, pixels.new_full((3,), 127))
