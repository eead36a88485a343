"""What a run needs before it starts: processes, model and teacher, and the checks of what was asked for."""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedType
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DynamoBackend, ProjectConfiguration, set_seed
from huggingface_hub import get_token
from transformers import AutoConfig, AutoImageProcessor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fambav_training.machine.processor import warn_of_slow_precision
from fambav_training.release.hub import LOGS
from fambav_training.run.arguments import TrainingArguments
from fambav_training.run.distillation import Teacher, load_teacher
from fambav_training.sources import loading
from fambav_training.teacher.views import TeacherViews
from modeling_fambav import FambaVConfig, FambaVForImageClassification
from modeling_fambav.embeddings import FambaVEmbeddings

# The average of the weights is a copy of the model, and the release is saved by one process.
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def create_accelerator(args: TrainingArguments) -> Accelerator:
    """Processes, threads, precision and random numbers of a run.

    Raises:
        ValueError: if the processes were launched with a setting that splits the model.
    """
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        cpu=args.cpu,
        # The order of the images is a function of seed and epoch
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed, non_blocking=True),
        log_with=args.report_to if args.with_tracking else None,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=args.output_dir / LOGS),
    )
    use_all_cores(accelerator)
    warn_of_slow_precision(accelerator.device, accelerator.mixed_precision)
    set_seed(args.seed)
    if accelerator.distributed_type in _SHARDED:
        raise ValueError(f"{accelerator.distributed_type.value}: expected a setting that keeps the model whole")
    return accelerator


def use_all_cores(accelerator: Accelerator) -> None:
    """Share the cores among the processes of this machine: `accelerate launch` gives each of them one thread."""
    if accelerator.device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        torch.set_num_threads(max(torch.get_num_threads(), cores // local_processes))


def create_model(
    args: TrainingArguments, overrides: dict[str, Any], label_names: list[str]
) -> tuple[FambaVForImageClassification, BaseImageProcessor]:
    """The model and its image processor, new or from a checkpoint, with the labels of the data.

    The class token of a checkpoint can be put elsewhere by `cls_token_position`; its position embedding goes with it.

    Raises:
        ValueError: if the checkpoint is of another model, or its weights do not fit the fields in `overrides`.
        OSError: if there is no such checkpoint, or a file of it is missing or damaged.
    """
    labels = {"id2label": dict(enumerate(label_names)), "label2id": {name: i for i, name in enumerate(label_names)}}
    checkpoint = args.model_name_or_path
    if checkpoint is None:
        config = FambaVConfig(**labels, **overrides)
        height, width = config.image_height_width
        processor = ViTImageProcessorPil(size={"height": height, "width": width}, do_convert_rgb=True)
        return FambaVForImageClassification(config), processor

    with loading(checkpoint, "--model_name_or_path"):
        config = AutoConfig.from_pretrained(checkpoint)
    if config.model_type != FambaVConfig.model_type:
        raise ValueError(f"--model_name_or_path {checkpoint}: expected a fambav model, this is {config.model_type!r}")
    # Not as a field to load with, which would leave its position embedding behind
    fields = dict(overrides)
    if "cls_token_position" in fields:
        config.cls_token_position = fields.pop("cls_token_position")
    with loading(checkpoint, "--model_name_or_path"):
        model, report = FambaVForImageClassification.from_pretrained(
            checkpoint,
            # Whatever the folder's: in half precision the steps of the optimizer and of the average are rounded away
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **labels,
            **fields,
        )
    # A new classifier is meant to be; anything else would be silently random.
    not_loaded = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
    not_loaded = [name for name in not_loaded if not name.startswith("classifier.")]
    if not_loaded or report["unexpected_keys"]:
        changed = {name: value for name, value in fields.items() if getattr(config, name) != value}
        raise ValueError(
            f"--model_name_or_path {checkpoint}: its weights do not fit {changed}, among them "
            f"{sorted([*not_loaded, *report['unexpected_keys']])[0]}"
        )
    _move_class_token(model.fambav.embeddings, config.cls_token_position)
    with loading(checkpoint, "--model_name_or_path"):
        return model, AutoImageProcessor.from_pretrained(checkpoint)


@torch.no_grad()
def _move_class_token(embeddings: FambaVEmbeddings, cls_token_position: str) -> None:
    """Put the class token elsewhere among the patches; it and they keep their position embeddings."""
    rows, num_patches = embeddings.position_embeddings, embeddings.config.num_patches
    index = embeddings.class_index_of(num_patches)
    before, own, after = rows.tensor_split((index, index + 1), dim=1)
    patches = torch.cat((before, after), dim=1)
    embeddings.config.cls_token_position = cls_token_position
    index = embeddings.class_index_of(num_patches)
    rows.copy_(torch.cat((patches[:, :index], own, patches[:, index:]), dim=1))


def create_teacher(
    args: TrainingArguments, processor: BaseImageProcessor, label_names: list[str], device: torch.device
) -> Teacher | TeacherViews | None:
    """What a model learns from beside the labels, on `device`; None without distillation.

    Raises:
        ValueError: if the teacher does not fit the images and classes, or cannot be loaded.
    """
    if args.distillation_weight == 0:
        return None
    if args.teacher_views is not None:
        return TeacherViews(Path(args.teacher_views), label_names)
    flag = "model_name_or_path" if args.teacher_name_or_path is None else "teacher_name_or_path"
    trust_remote_code = args.teacher_trust_remote_code
    return load_teacher(f"--{flag}", getattr(args, flag), processor, label_names, device, trust_remote_code)


def check_channels(config: FambaVConfig) -> None:
    """Raise a `ValueError` if the model does not read RGB, which all images are converted to."""
    if config.num_channels != 3:
        raise ValueError(f"--num_channels {config.num_channels}: expected 3, images are converted to RGB")


def check_trackers(args: TrainingArguments) -> None:
    """Refuse a tracker that accelerate does not know or that is not installed, and a dashboard without a login.

    Raises:
        ValueError: if it is so.
    """
    if not args.with_tracking:
        return
    name = args.report_to
    known = sorted(LOGGER_TYPE_TO_CLASS)
    if name not in ("all", *known):
        raise ValueError(f"--report_to {name}: expected 'all' or one of {known}")
    available = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    if not available or name not in ("all", *available):
        package = name if name != "all" else "tensorboard"
        raise ValueError(f"--report_to {name}: not installed, try `pip install {package}`; installed are {available}")
    if args.trackio_space_id is not None:
        if "trackio" not in available:
            raise ValueError(f"--trackio_space_id {args.trackio_space_id}: not installed, try `pip install trackio`")
        if get_token() is None:
            raise ValueError(f"--trackio_space_id {args.trackio_space_id}: no token; run `hf auth login`")


def start_trackers(accelerator: Accelerator, args: TrainingArguments, recipe: dict[str, Any]) -> None:
    """Open the trackers that the run was created with. A resumed run goes on where trackio had it."""
    trackio = {"name": args.output_dir.resolve().name, "space_id": args.trackio_space_id}
    trackio["resume"] = "never" if args.resume_from_checkpoint is None else "allow"
    values = {name: str(value) for name, value in recipe.items()}
    accelerator.init_trackers("fambav", config=values, init_kwargs={"trackio": trackio})


def check_cuda_graphs(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Refuse to record where there is no GPU, or where two passes have not the same shapes and weights.

    Raises:
        ValueError: if it is so.
    """
    if not args.cuda_graphs:
        return
    if accelerator.device.type != "cuda":
        raise ValueError(f"--cuda_graphs: expected a CUDA device, this run is on {accelerator.device.type!r}")
    if accelerator.num_processes > 1:
        raise ValueError(f"--cuda_graphs: expected one process, there are {accelerator.num_processes}")
    steps = args.gradient_accumulation_steps
    if steps > 1:  # a replay writes over the gradients of the one before
        raise ValueError(f"--cuda_graphs: expected --gradient_accumulation_steps 1, not {steps}")
    backend = accelerator.state.dynamo_plugin.backend
    if backend != DynamoBackend.NO:  # which may record, too
        raise ValueError(f"--cuda_graphs: expected no torch.compile, `accelerate config` has {backend.value}")
    if args.streaming:
        raise ValueError("--cuda_graphs: expected no --streaming, whose last batch is smaller than the others")


def check_teacher(args: TrainingArguments) -> None:
    """Refuse distillation from no teacher, or from one that the run would replace.

    Raises:
        ValueError: if it is so.
    """
    if args.distillation_weight == 0:
        return
    teacher = args.teacher_views or args.teacher_name_or_path or args.model_name_or_path
    if teacher is None:
        raise ValueError(
            f"--distillation_weight {args.distillation_weight}: expected --model_name_or_path, which is the teacher "
            "then, or --teacher_name_or_path, or --teacher_views"
        )
    if Path(teacher).resolve() == args.output_dir.resolve():
        raise ValueError(f"--output_dir {args.output_dir}: expected another folder than the teacher's")
