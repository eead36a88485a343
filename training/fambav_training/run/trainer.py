"""The training loop: model, optimizer, schedule and weight average of one run, and its checkpoints.

A run can stop at any step and resume as if it had not: the order of the images is a function of the seed and the
epoch, and all other randomness of a batch (augmentation, dropped paths) of the seed, the epoch, the batch and the
process.

A step never waits for a value from the device. What follows from its loss (`_settle`: to stop, to count it, the
schedule, the average of the weights) waits until the device has the gradients of the next step to compute, and comes
before that step changes a weight. Steps that are logged, saved or the last of an epoch are settled at once.
"""

import dataclasses
import itertools
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.image_processing_utils import BaseImageProcessor

from fambav_training.data.augmentation import Augmentation, mixed_cross_entropy
from fambav_training.data.pixels import normalize
from fambav_training.evaluation.metrics import evaluate
from fambav_training.machine.cuda_graphs import record_passes
from fambav_training.machine.memory import give_back_freed_memory
from fambav_training.machine.provenance import peak_memory_bytes, used_memory_bytes
from fambav_training.machine.transfer import LateValues
from fambav_training.run.arguments import TrainingArguments
from fambav_training.run.checkpointing import (
    CheckpointError,
    checkpoint_path,
    load_checkpoint,
    prune_checkpoints,
    read_state,
    save_checkpoint,
)
from fambav_training.run.distillation import Teacher, distillation_loss
from fambav_training.run.interruption import Interrupted, Interruption
from fambav_training.run.log import MetricsLog
from fambav_training.run.optimization import create_optimizer, create_schedule, create_weight_average, step_unless
from fambav_training.run.position import Position, Step
from fambav_training.teacher.views import TeacherViews
from modeling_fambav import FambaVForImageClassification
from modeling_fambav.backends import uses_cpu_kernels


class NonFiniteLossError(ValueError):
    """A loss that is NaN or infinite."""


class Trainer:
    """One run. `train` continues from wherever it is; `resume` moves it to a checkpoint."""

    def __init__(
        self,
        args: TrainingArguments,
        recipe: dict[str, Any],
        accelerator: Accelerator,
        model: FambaVForImageClassification,
        processor: BaseImageProcessor,
        train_loader: DataLoader,
        validation_loader: DataLoader,
        teacher: Teacher | TeacherViews | None = None,
    ):
        """`recipe` is what checkpoints of this run can only be resumed with; `teacher` is for distillation."""
        self.args, self.recipe, self.accelerator, self.processor = args, recipe, accelerator, processor
        self.teacher = teacher
        has_views = isinstance(teacher, TeacherViews)
        self.augment = Augmentation(
            model.config.image_height_width,
            0 if has_views else args.random_crop_padding,
            0.0 if has_views else args.horizontal_flip_prob,
            args.mixup_alpha,
            args.cutmix_alpha,
            args.random_erasing_prob,
        )
        optimizer = create_optimizer(model, args.learning_rate, args.weight_decay, args.optimizer)
        self.model, self.optimizer, self.validation_loader = accelerator.prepare(model, optimizer, validation_loader)
        # A stream is already divided among the processes.
        self.train_loader = train_loader if args.streaming else accelerator.prepare(train_loader)
        if not args.streaming and len(self.train_loader) == 0:
            raise ValueError(
                f"--per_device_train_batch_size {args.per_device_train_batch_size}: expected at most "
                f"{len(train_loader.dataset)} training images over {accelerator.num_processes} process(es)"
            )
        self.weight_average = create_weight_average(accelerator.unwrap_model(self.model), args.ema_decay)
        self.num_steps = args.max_train_steps or args.num_train_epochs * self._steps_per_epoch()
        self.schedule = create_schedule(self.optimizer, args.lr_scheduler_type, args.warmup_ratio, self.num_steps)
        accelerator.register_for_checkpointing(self.weight_average, self.schedule)
        self.position = Position()
        self._batch_losses: list[Tensor] = []  # of the optimizer step that is being accumulated
        self._unsettled: Step | None = None
        self._logged_losses: list[float] = []  # since the last line of the log
        self.last_loss: float | None = None  # the mean of the last line of the log
        self._stop_signal = 0
        self._stopwatch = 0.0, 0.0  # since when seconds and processor seconds are not counted yet

    def _batches_per_epoch(self) -> int | None:
        """Unknown for a stream."""
        return None if self.args.streaming else len(self.train_loader)

    @property
    def num_epochs(self) -> float:
        """Passes over the images so far, not always whole ones."""
        if self.args.streaming:
            return self.position.epoch
        return round(self.position.step / self._steps_per_epoch(), 2)

    def _steps_per_epoch(self) -> int:
        return math.ceil(len(self.train_loader) / self.args.gradient_accumulation_steps)

    def compile_kernels(self) -> None:
        """Compile the CPU kernels by one small step, so that this is no part of the time and memory of training."""
        model = self.accelerator.unwrap_model(self.model)
        if not uses_cpu_kernels(next(model.parameters())):
            return
        config = model.config
        with torch.random.fork_rng():
            model.train()
            pixel_values = torch.zeros(1, config.num_channels, *config.image_height_width)
            model(pixel_values).logits.sum().backward()
            if isinstance(self.teacher, Teacher):
                self.teacher(pixel_values)
        self.optimizer.zero_grad()

    def record_passes(self) -> None:
        """Record both passes of a step as CUDA graphs, which all further steps replay."""
        image_size = self.accelerator.unwrap_model(self.model).config.image_height_width
        self._logits = record_passes(self.model, self.args.per_device_train_batch_size, image_size)

    def _logits(self, images: Tensor) -> Tensor:
        with self.accelerator.autocast():
            return self.model(pixel_values=images).logits

    # ---- the loop ----

    def train(self, interruption: Interruption) -> None:
        """Train to the last step.

        Raises:
            NonFiniteLossError: if the loss is not finite and such steps are not to be skipped.
            Interrupted: if `interruption` has noted a signal; a checkpoint was saved before.
        """
        position, checkpointing_steps = self.position, self.args.checkpointing_steps
        give_back_freed_memory()
        position.start_memory_bytes = max(position.start_memory_bytes, used_memory_bytes(self.accelerator.device))
        log = MetricsLog(self.accelerator, self.args.output_dir, position.step, position.epoch)
        progress = tqdm(
            total=self.num_steps,
            initial=position.step,
            desc="training",
            disable=not self.accelerator.is_local_main_process,
        )
        while position.step < self.num_steps:
            self._stopwatch = time.perf_counter(), time.process_time()
            for batch in self._rest_of_epoch():
                pixels, labels, *rows = batch
                is_update = self._train_batch(pixels, labels, interruption, *rows)
                position.batch += 1
                position.images += len(labels) * self.accelerator.num_processes
                if not is_update:
                    continue
                progress.update()
                step = position.step + 1  # settled or not
                is_logged = step % self.args.logging_steps == 0
                is_saved = isinstance(checkpointing_steps, int) and step % checkpointing_steps == 0
                if is_logged or is_saved or step == self.num_steps or self._stop_signal:
                    self._settle()
                self._take_time()
                if is_logged:
                    log.write(self._record(progress))
                if step == self.num_steps:
                    break
                if is_saved:
                    self.save_checkpoint()
                if self._stop_signal:
                    self._stop(progress)
                self._stopwatch = time.perf_counter(), time.process_time()  # logs and checkpoints are not counted
            self._settle()
            self._take_time()
            if position.batch == 0:
                raise ValueError(
                    f"--per_device_train_batch_size {self.args.per_device_train_batch_size}: expected at most the "
                    "images of the stream, divided by processes and by --dataloader_num_workers"
                )
            position.epoch, position.batch = position.epoch + 1, 0
            record = {**self._record(progress), "epoch": position.epoch}
            every = self.args.evaluation_epochs
            if every is not None and position.epoch % every == 0 and position.step < self.num_steps:
                record.update(self.evaluate())
            log.write(record)
            if checkpointing_steps == "epoch" or (checkpointing_steps and position.step == self.num_steps):
                self.save_checkpoint()
        progress.close()
        self._measure_memory()

    def _take_time(self) -> None:
        """Add the time since the last call, or since `_stopwatch` was set."""
        now, processor_now = time.perf_counter(), time.process_time()
        self.position.train_seconds += now - self._stopwatch[0]
        self.position.processor_seconds += processor_now - self._stopwatch[1]
        self._stopwatch = now, processor_now

    def _measure_memory(self) -> None:
        position = self.position
        position.peak_memory_bytes = max(position.peak_memory_bytes, peak_memory_bytes(self.accelerator.device))

    def _rest_of_epoch(self) -> Iterator[tuple[Tensor | np.ndarray, ...]]:
        """Batches of this epoch behind those that were already trained on."""
        self.model.train()
        loader = self.train_loader
        if self.args.streaming:
            loader.set_epoch(self.position.epoch)
            yield from itertools.islice(loader, self.position.batch, None)
            return
        if self.position.batch >= len(loader):
            return  # a checkpoint of the last step of an epoch
        loader.set_epoch(self.position.epoch)
        if self.position.batch > 0:
            loader = self.accelerator.skip_first_batches(loader, self.position.batch)
            loader.set_epoch(self.position.epoch)
        yield from loader

    def _train_batch(
        self, pixels: Tensor, labels: Tensor, interruption: Interruption, rows: np.ndarray | None = None
    ) -> bool:
        """Add a batch to the gradient; `rows` are those of the teacher's stored views, if there are any.

        Returns whether this ended an optimizer step.
        """
        args, accelerator, position = self.args, self.accelerator, self.position
        source = [args.seed, position.epoch, position.batch, accelerator.process_index]
        torch.manual_seed(int(np.random.SeedSequence(source).generate_state(1)[0]))
        with accelerator.accumulate(self.model):
            teacher_logits = None
            if rows is not None:
                pixels, teacher_logits = self.teacher.draw(pixels, rows)
            images, targets = self.augment(normalize(pixels, self.processor), labels)
            logits = self._logits(images)
            loss = mixed_cross_entropy(logits.float(), targets, args.label_smoothing)
            if self.teacher is not None:
                if teacher_logits is None:
                    with accelerator.autocast():
                        teacher_logits = self.teacher(images)
                # A teacher in memory has seen the mixed images
                mixed = targets if rows is not None and self.augment.mixes else None
                temperature, kind = args.distillation_temperature, args.distillation_loss
                distilled = distillation_loss(logits.float(), teacher_logits.float(), temperature, kind, mixed)
                loss = loss.lerp(distilled, args.distillation_weight)
            accelerator.backward(loss)
            self._batch_losses.append(loss.detach())
            if not accelerator.sync_gradients:
                return False
            self._settle()  # the step before this one
            self._unsettled = self._take_step(interruption, pixels, labels)
        return True

    def _take_step(self, interruption: Interruption, pixels: Tensor, labels: Tensor) -> Step:
        """Change the weights, unless the loss is not finite, which the device decides."""
        accelerator = self.accelerator
        values = torch.stack(self._batch_losses).mean().unsqueeze(0)
        self._batch_losses.clear()
        if accelerator.num_processes == 1:
            self._stop_signal = interruption.signal_number
        else:  # all have to stop at the same step, and by the same losses
            signal_number = torch.full_like(values, interruption.signal_number)
            losses, signals = accelerator.gather(torch.stack((values, signal_number), -1)).unbind(-1)
            values = torch.stack((losses.mean(), signals.max()))
        step_unless(self.optimizer, ~values[0].isfinite())
        self.optimizer.zero_grad()
        position = dataclasses.replace(self.position)
        return Step(LateValues(values), position, accelerator.step, pixels, labels)

    def _settle(self) -> None:
        """Wait for the loss of the last step, and do what follows from it."""
        if self._unsettled is None:
            return
        step, self._unsettled = self._unsettled, None
        loss, *signal_number = step.values.read()
        if signal_number:
            self._stop_signal = int(signal_number[0])
        if math.isfinite(loss):
            self._logged_losses.append(loss)
        else:
            self._handle_nonfinite(loss, step)
        self.schedule.step()
        self.weight_average.update_parameters(self.accelerator.unwrap_model(self.model))
        self.position.step += 1

    def _handle_nonfinite(self, loss: float, bad: Step) -> None:
        if self.args.nonfinite_loss == "skip":
            self.position.nonfinite_steps += 1
            return
        self.position, self.accelerator.step = bad.position, bad.num_batches
        step, learning_rate = self.position.step + 1, self.schedule.get_last_lr()[0]
        folder = self.args.output_dir / f"nonfinite_step_{step:06d}"
        if self.accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        save_checkpoint(self.accelerator, folder, self._state())
        if self.accelerator.is_main_process:
            batch = {"pixels": bad.pixels.cpu().contiguous(), "labels": bad.labels.cpu()}
            save_file(batch, folder / "batch.safetensors")
        raise NonFiniteLossError(
            f"the loss is {loss} at step {step}, learning rate {learning_rate:.2g}; the weights before that step and "
            f"its last batch are in {folder}, to look at. Resume with --nonfinite_loss skip, or train anew with a "
            "lower --learning_rate"
        )

    def _record(self, progress: tqdm) -> dict[str, Any]:
        """What is logged of the steps since the last record."""
        position = self.position
        record = {
            "step": position.step,
            "learning_rate": self.schedule.get_last_lr()[0],
            "train_seconds": position.train_seconds,
        }
        if self._logged_losses:
            record["train_loss"] = self.last_loss = sum(self._logged_losses) / len(self._logged_losses)
            self._logged_losses.clear()
            progress.set_postfix(loss=f"{record['train_loss']:.3f}")
        return record

    @torch.no_grad()
    def round_weights(self, dtype: torch.dtype) -> None:
        """Round the weights and their average to this format, so that what is scored is what is released."""
        for model in (self.model, self.weight_average.module):
            for values in model.state_dict().values():
                if values.is_floating_point():
                    values.copy_(values.to(dtype))

    def evaluate(self) -> dict[str, float]:
        """Accuracy of the weights and of their average on the validation split, in percent."""
        arguments = self.validation_loader, self.processor, self.accelerator
        scores = evaluate(self.model, *arguments)
        averaged = evaluate(self.weight_average.module, *arguments)
        return {**scores, **{f"ema_{name}": value for name, value in averaged.items()}}

    # ---- checkpoints ----

    def _state(self) -> dict[str, Any]:
        self._measure_memory()
        return {
            "position": dataclasses.asdict(self.position),
            "logged_losses": self._logged_losses,
            "last_loss": self.last_loss,
            "batches_per_epoch": self._batches_per_epoch(),
            "teacher": self._teacher_fingerprint(),
            "arguments": self.recipe,
        }

    def _teacher_fingerprint(self) -> str | None:
        return None if self.teacher is None else self.teacher.fingerprint()

    def save_checkpoint(self) -> Path:
        """Save all that is needed to resume from here."""
        path = checkpoint_path(self.args.output_dir, self.position.step)
        save_checkpoint(self.accelerator, path, self._state())
        if self.accelerator.is_main_process:
            prune_checkpoints(self.args.output_dir, self.args.checkpoints_total_limit)
        return path

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint that `find_checkpoint` has found.

        Raises:
            CheckpointError: if it is damaged, or there were other images or another teacher.
        """
        state = read_state(path)
        # Kept images leave corrupt ones out, decoded ones replace them
        if state["batches_per_epoch"] != self._batches_per_epoch():
            raise CheckpointError(
                f"checkpoint {path}: made with {state['batches_per_epoch']} batches per epoch, expected "
                f"{self._batches_per_epoch()} as in this run; are --dataset_name and --max_cached_mib the same?"
            )
        if state.get("teacher") != self._teacher_fingerprint():
            args = self.args
            kind = "weights" if args.teacher_views is None else "views"
            name = args.teacher_views or args.teacher_name_or_path or args.model_name_or_path
            raise CheckpointError(f"checkpoint {path}: made with another teacher, the {kind} of {name} have changed")
        load_checkpoint(self.accelerator, path)
        self.position, self._logged_losses = Position(**state["position"]), state["logged_losses"]
        self.last_loss = state["last_loss"]

    def _stop(self, progress: tqdm) -> None:
        path = self.save_checkpoint()
        progress.close()
        raise Interrupted(self._stop_signal, f"saved {path}, resume with --resume_from_checkpoint latest")
