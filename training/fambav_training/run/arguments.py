"""The flags of train.py, beside one for every field of `FambaVConfig`."""

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fambav_training.run.distillation import DISTILLATION_LOSSES
from fambav_training.run.optimization import OPTIMIZERS

# Those that need nothing but the numbers of warm-up steps and of all steps
_SCHEDULES = ("cosine", "cosine_with_restarts", "linear", "polynomial", "constant", "constant_with_warmup")
_CHOICES = {
    "lr_scheduler_type": _SCHEDULES,
    "mixed_precision": (None, "no", "fp16", "bf16"),
    "nonfinite_loss": ("stop", "skip"),
    "release_weights": ("last", "average"),
    "release_dtype": ("float32", "bfloat16"),
    "distillation_loss": DISTILLATION_LOSSES,
    "optimizer": OPTIMIZERS,
}
_MINIMUMS = {
    "num_train_epochs": 1,
    "max_train_steps": 1,
    "max_train_samples": 1,
    "max_eval_samples": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "max_cached_mib": 0,
    "max_corrupt_images": 0,
    "learning_rate": 0.0,
    "weight_decay": 0.0,
    "random_crop_padding": 0,
    "mixup_alpha": 0.0,
    "cutmix_alpha": 0.0,
    "logging_steps": 1,
    "evaluation_epochs": 1,
    "checkpoints_total_limit": 1,
}
_SPACE_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_BELOW_ONE = ("warmup_ratio", "label_smoothing", "ema_decay")
_UP_TO_ONE = ("horizontal_flip_prob", "random_erasing_prob", "distillation_weight")
_OF_DISTILLATION = (
    "distillation_weight",
    "distillation_temperature",
    "distillation_loss",
    "teacher_name_or_path",
    "teacher_trust_remote_code",
    "teacher_views",
)


def _flag(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class TrainingArguments:
    """Flags of the training script. The defaults are the paper's recipe (section 4)."""

    # data
    dataset_name: str = _flag("digits", "Hub id, local folder that load_dataset reads, or 'digits' (built in)")
    image_column_name: str | None = _flag(None, "column with the images; found by its type if not given")
    label_column_name: str | None = _flag(None, "column with the labels; the first of type ClassLabel if not given")
    train_split: str = _flag("train", "split to train on")
    validation_split: str | None = _flag(None, "split to score; if not given, 20% of the training split is set aside")
    max_train_samples: int | None = _flag(None, "use only this many training images")
    max_eval_samples: int | None = _flag(None, "use only this many validation images")
    streaming: bool = _flag(False, "read the dataset while training instead of first; needs max_train_steps")
    max_cached_mib: int = _flag(2048, "images that fit this are decoded once and kept; others by workers, every time")
    dataloader_num_workers: int = _flag(2, "processes that decode images which are not kept")
    max_corrupt_images: int = _flag(10, "images that cannot be read and are skipped, before training stops")
    # recipe
    model_name_or_path: str | None = _flag(None, "start from this checkpoint; a new classifier if the labels differ")
    num_train_epochs: int = _flag(300, "passes over the training images")
    max_train_steps: int | None = _flag(None, "optimizer steps; overrides num_train_epochs")
    per_device_train_batch_size: int = _flag(128, "images per process and step")
    per_device_eval_batch_size: int = _flag(128, "images per process in evaluation")
    gradient_accumulation_steps: int = _flag(1, "batches per optimizer step")
    optimizer: str = _flag("adamw", "adamw, or muon for the large matrices of the layers and adamw for the rest")
    learning_rate: float = _flag(1e-3, "peak learning rate")
    weight_decay: float = _flag(0.1, "not applied to norms, biases, A_log, D, class token and positions")
    lr_scheduler_type: str = _flag("cosine", "schedule of the learning rate, a name that transformers knows")
    warmup_ratio: float = _flag(0.02, "share of the steps in which the learning rate rises linearly")
    label_smoothing: float = _flag(0.1, "share of the target spread over all classes")
    random_crop_padding: int | None = _flag(
        None, "pixels to pad before a random crop; an eighth of the side if not given"
    )
    horizontal_flip_prob: float = _flag(0.5, "probability of a mirrored image")
    mixup_alpha: float = _flag(0.8, "of Beta(alpha, alpha), the mix of two images; 0 is off")
    cutmix_alpha: float = _flag(0.0, "of Beta(alpha, alpha), the area pasted from another image; 0 is off")
    random_erasing_prob: float = _flag(0.25, "probability of an erased rectangle")
    ema_decay: float = _flag(0.9999, "decay of the exponential moving average of the weights")
    distillation_weight: float = _flag(0.0, "share of the loss that a teacher gives instead of the labels; 0 is off")
    distillation_temperature: float = _flag(2.0, "by which the logits of student and teacher are divided")
    distillation_loss: str = _flag("kl", "kl, or standardized: of logits without their mean and scale")
    teacher_name_or_path: str | None = _flag(
        None, "any image classifier; the checkpoint that training starts from, without fusion, if not given"
    )
    teacher_trust_remote_code: bool = _flag(False, "run code that comes with the teacher")
    teacher_views: str | None = _flag(
        None, "folder of store_teacher_views.py instead of a teacher; crops and flips are those that it holds"
    )
    seed: int = _flag(0, "seed of weights, data order, augmentation and validation split")
    # engine
    mixed_precision: str | None = _flag(None, "no, fp16 or bf16; accelerate's own setting if not given")
    cpu: bool = _flag(False, "train on the CPU even if there is an accelerator")
    cuda_graphs: bool = _flag(False, "on a GPU, record a step's passes and replay them: faster for small models")
    nonfinite_loss: str = _flag("stop", "at a loss that is NaN or infinite: stop, or skip the step and count it")
    # what is kept
    output_dir: Path = _flag(Path("outputs/run"), "folder for the trained model and its results")
    release_weights: str = _flag("last", "weights of the released model: those of the last step, or their average")
    release_dtype: str = _flag("float32", "numbers that the released weights are rounded to; bfloat16 halves the file")
    logging_steps: int = _flag(50, "optimizer steps per line of metrics.jsonl")
    evaluation_epochs: int | None = _flag(None, "score after every so many epochs, beside the last")
    checkpointing_steps: int | str | None = _flag(None, "optimizer steps between checkpoints, or 'epoch'")
    checkpoints_total_limit: int | None = _flag(None, "checkpoints to keep, the newest; all if not given")
    resume_from_checkpoint: str | None = _flag(None, "folder of a checkpoint, or 'latest' in output_dir")
    with_tracking: bool = _flag(False, "log to experiment trackers")
    report_to: str = _flag("all", "tracker, such as tensorboard, trackio or wandb, or 'all' that are installed")
    trackio_space_id: str | None = _flag(
        None, "Space OWNER/NAME for trackio's dashboard, which the model card links; a local file if not given"
    )
    push_to_hub: bool = _flag(False, "publish the result on the Hub")
    hub_model_id: str | None = _flag(
        None, "repository to publish to, NAME or OWNER/NAME; named after output_dir if not given"
    )
    hub_private_repo: bool = _flag(False, "create the repository as a private one")

    def __post_init__(self):
        for name, minimum in _MINIMUMS.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= minimum):
                raise ValueError(f"--{name} {value}: expected a number >= {minimum}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed {self.seed}: expected 0 to 2**32 - 1")
        for name in _BELOW_ONE:
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"--{name} {getattr(self, name)}: expected a number in [0, 1)")
        for name in _UP_TO_ONE:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"--{name} {getattr(self, name)}: expected a number in [0, 1]")
        if not (math.isfinite(self.distillation_temperature) and self.distillation_temperature > 0):
            raise ValueError(f"--distillation_temperature {self.distillation_temperature}: expected a number > 0")
        self._check_teacher()
        self._check_dashboard()
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                expected = [choice for choice in choices if choice is not None]
                raise ValueError(f"--{name} {getattr(self, name)}: expected one of {expected}")
        steps = self.checkpointing_steps
        if steps is not None and steps != "epoch" and not (isinstance(steps, int) and steps > 0):
            raise ValueError(f"--checkpointing_steps {steps}: expected a number >= 1 or 'epoch'")
        if self.streaming and self.max_train_steps is None:
            raise ValueError("--streaming: expected --max_train_steps, the length of a stream is not known")
        if self.streaming and self.validation_split is None:
            raise ValueError("--streaming: expected --validation_split, no part of a stream can be set aside")
        if self.streaming and self.dataset_name == "digits":
            raise ValueError("--streaming: expected another --dataset_name, the digits are built in")

    def _check_teacher(self) -> None:
        for name in ("teacher_name_or_path", "teacher_views"):
            value = getattr(self, name)
            if self.distillation_weight == 0 and value is not None:
                raise ValueError(f"--{name} {value}: expected a --distillation_weight above 0")
        if self.teacher_views is None:
            return
        given = f"--teacher_views {self.teacher_views}"
        if self.teacher_name_or_path is not None:
            raise ValueError(f"{given}: expected no --teacher_name_or_path beside it")
        if self.streaming:
            raise ValueError(f"{given}: expected no --streaming, views are found by the images")
        if self.random_erasing_prob > 0:
            raise ValueError(
                f"{given}: expected --random_erasing_prob 0, not {self.random_erasing_prob}; the teacher has not seen "
                "such images"
            )

    def _check_dashboard(self) -> None:
        space = self.trackio_space_id
        if space is None:
            return
        if not _SPACE_ID.fullmatch(space):
            raise ValueError(f"--trackio_space_id {space}: expected OWNER/NAME")
        if not self.with_tracking or self.report_to not in ("trackio", "all"):
            raise ValueError(f"--trackio_space_id {space}: expected --with_tracking --report_to trackio with it")


# Flags that do not change what is trained: a run may be resumed with others.
_FREE = {
    "output_dir",
    "per_device_eval_batch_size",
    "max_eval_samples",
    "max_cached_mib",
    "dataloader_num_workers",
    "max_corrupt_images",
    "nonfinite_loss",
    "cpu",
    "cuda_graphs",
    "release_weights",
    "release_dtype",
    "logging_steps",
    "evaluation_epochs",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "with_tracking",
    "report_to",
    "trackio_space_id",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
}


def recipe_of(args: TrainingArguments, overrides: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint can only be resumed with: flags that shape the run, and the given fields of the model."""
    own = {name: value for name, value in dataclasses.asdict(args).items() if name not in _FREE}
    if args.streaming:  # each worker reads files of its own, so their number is the order of the images
        own["dataloader_num_workers"] = args.dataloader_num_workers
    if args.distillation_weight == 0:  # without a teacher, none of its flags shapes the run
        own = {name: value for name, value in own.items() if name not in _OF_DISTILLATION}
    if args.teacher_views is not None:  # where they lie says nothing; what they hold is in the checkpoint
        del own["teacher_views"]
    return {**own, **{name: list(value) if isinstance(value, tuple) else value for name, value in overrides.items()}}
